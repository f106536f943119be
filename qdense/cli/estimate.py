"""How long a run on a person's own rows takes, from a rough count of their tokens, which needs no tokenizer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qdense.data.rows import Row
    from qdense.planning.plan import Plan
    from qdense.recipe import Recipe

_CHARACTERS_PER_TOKEN = 3  # English has about 4; a low estimate keeps answers from being cut off
_CHARACTERS_OF_A_TURN = 30  # what a chat template adds to each


def rough_token_counts(rows: Sequence[Row]) -> list[int]:
    """Tokens of each row, by its characters."""
    from qdense.data.templates import TEMPLATES

    template = TEMPLATES["alpaca"]

    def num_characters(row: Row) -> int:
        if row.messages:
            return sum(len(message.content) + _CHARACTERS_OF_A_TURN for message in row.messages)
        if row.kind == "text":
            return len(row.output)
        return len(template.training_prompt(row)) + len(template.response(row))

    return [math.ceil(num_characters(row) / _CHARACTERS_PER_TOKEN) for row in rows]


def predicted_time(plan: Plan, recipe: Recipe, rows: Sequence[Row]) -> str:
    """The run's steps, and how long they take on consumer cards, or on the only card that is planned for; the steps alone if no
    speed is predicted."""
    num_training = max(1, math.floor(recipe.data.fraction * (len(rows) - recipe.data.validation_rows)))
    num_steps = recipe.training.num_steps(num_training)
    mean_tokens = statistics.fmean(min(count, recipe.data.max_length) for count in rough_token_counts(rows))
    # The last step of an epoch may be smaller than the others.
    full = num_steps * recipe.training.batch_size
    num_rows = full if recipe.training.max_steps else min(full, recipe.training.epochs * num_training)
    num_tokens = num_rows * mean_tokens
    hours = {
        card: num_tokens / speed / 3600 for card, speed in plan.speeds.items() if "RTX" in card or len(plan.speeds) == 1
    }
    times = ", ".join(
        f"{f'{hour:.1f} h' if hour >= 1 else f'{max(1, round(60 * hour))} min'} on an {card}"
        for card, hour in hours.items()
    )
    return f"{num_steps:,} steps" + (f", predicted from shapes alone: {times}" if times else "")

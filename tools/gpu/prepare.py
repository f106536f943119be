"""Writes what tools/gpu/measure.py needs and a GPU machine without tokenizer lacks: how long real training rows are.

    .venv/bin/python tools/gpu/prepare.py ../shared/data/ft-training_set/math_10k_genuine_1824.json .gpu/lengths.json

The rows' lengths in tokens of SmolLM2's tokenizer, shuffled, uncut; no text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from qdense.data.examples import encode_rows
from qdense.data.sources import load_training_set
from qdense.modeling.smollm2 import prepare_smollm2
from qdense.recipe import recipe_from_tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    tables = {"model": {"name": "smollm2-135m"}, "data": {"path": str(arguments.data), "max_length": 2**20}}
    recipe = recipe_from_tables(tables, source="tools/gpu/prepare.py")
    tokenizer = AutoTokenizer.from_pretrained(prepare_smollm2(print))
    rows = load_training_set(recipe.data, None).rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    lengths = [len(example.input_ids) for example in encode_rows(rows, order, tokenizer, recipe.data).examples]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(lengths))
    print(f"{len(lengths)} lengths, mean {sum(lengths) / len(lengths):.0f}, in {arguments.output}")


if __name__ == "__main__":
    main()

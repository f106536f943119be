"""Draw a finished run's live display again, from its own recipe and metrics, as an SVG for the README.

    python tools/capture_display.py runs/demo-seed-42-... --step 30 --width 100 --output tools/results/display.svg

Nothing is made up: the panel is rebuilt from recipe.toml, the rest is the run's recorded events up to the step.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from rich.console import Console

from qdense.events import StepDone, TrainingStarted, Validated
from qdense.recipe import load_recipe
from qdense.runs import RunFolder
from qdense.training.metrics import read_metrics
from qdense.ui.training import TrainingDisplay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int, required=True, help="the last step that is shown")
    parser.add_argument("--width", type=int, default=100, help="columns")
    parser.add_argument(
        "--memory-total-bytes", type=int, default=0, help="of the machine that trained (default: this one)"
    )
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    import psutil

    run = RunFolder(arguments.run)
    recipe, provenance = load_recipe(run.recipe), run.provenance()
    console = Console(
        record=True, width=arguments.width, force_terminal=True, file=io.StringIO(), color_system="truecolor"
    )
    display = TrainingDisplay(console)
    display.update(
        TrainingStarted(
            title=f"{recipe.adapter.method} on {recipe.model.name}",
            facts=tuple(provenance["summary"].items()),
            num_steps=provenance["num_steps"],
            first_step=0,
            memory_total_bytes=arguments.memory_total_bytes or psutil.virtual_memory().total,
            memory_name="process" if "CPU" in provenance["device"] else "GPU",
        )
    )
    for line in read_metrics(run.metrics):
        kind = line.pop("event")
        if line["step"] <= arguments.step:
            display.update(StepDone(**line) if kind == "step" else Validated(**line))
    console.print(display.render())
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(arguments.output), title=f"qdense train recipes/{recipe.output.dir.split('/')[1]}.toml")


if __name__ == "__main__":
    main()

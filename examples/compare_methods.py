"""Find out which method wins on your data: from scratch, LiT, or 3T, on equal terms and with intervals.

    python examples/compare_methods.py [--out runs/example-compare] [--steps 100] [--seeds 0 1]

Every method sees the same images in the same order and tries the same learning rates. The result is a table, and a page
report.html with curves and examples. A run that is interrupted continues when the same command is given again. The same
in one command:

    threetowers compare tiny --data FOLDER --third colours=file:TOWER --seeds 0 1 --lrs 1e-3 3e-3
"""

from dataclasses import replace
from pathlib import Path

import tyro

from squares import captioned, labelled
from threetowers.compare.comparison import compare
from threetowers.config import CompareConfig, InputConfig, PretrainConfig
from threetowers.recipes import PRESETS
from threetowers.report.page import write_report
from threetowers.report.terminal import text_table
from threetowers.train.pretrain import pretrain


def main(out: Path = Path("runs/example-compare"), steps: int = 100, seeds: tuple[int, ...] = (0, 1)) -> None:
    tower = out / "colours"
    pretrain(PretrainConfig(data=str(labelled(out / "labelled")), steps=steps, batch_size=32), tower)

    # what all runs share; each method is trained with it
    config = replace(
        PRESETS["tiny"](),
        data=str(captioned(out / "photos")),
        third=(f"colours=file:{tower}",),
        steps=steps,
        inputs=InputConfig(val_fraction=0.2, test_fraction=0.2, workers=0),
    )
    options = CompareConfig(methods=("baseline", "lit", "3t"), seeds=seeds, lrs=(1e-3, 3e-3))
    result = compare(config, options, out)
    if result is None:
        print("stopped; the same command continues")
        return
    print(text_table(result))
    print(f"report: {write_report(out)}")


if __name__ == "__main__":
    tyro.cli(main)

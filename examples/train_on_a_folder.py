"""Train 3T on a folder of images with captions, beside a frozen tower, and evaluate it.

    python examples/train_on_a_folder.py [--out runs/example-train] [--steps 150]

The images have their captions in .txt files. The frozen tower is a small classifier of colours, trained here because
published weights would have to be downloaded. With data and a tower of your own, the same in one command:

    threetowers train tiny --data FOLDER --third timm:resnet50 --out runs/mine
"""

from dataclasses import replace
from pathlib import Path

import tyro

from squares import captioned, labelled
from threetowers.config import InputConfig, PretrainConfig
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.recipes import PRESETS
from threetowers.train.loop import train
from threetowers.train.pretrain import pretrain


def main(out: Path = Path("runs/example-train"), steps: int = 150) -> None:
    data = captioned(out / "photos")
    tower = out / "colours"
    accuracy = pretrain(
        PretrainConfig(data=str(labelled(out / "labelled")), steps=steps, batch_size=32), tower
    )
    print(f"the frozen tower names {accuracy:.0%} of the colours")

    config = replace(
        PRESETS["tiny"](),
        data=str(data),
        third=(f"file:{tower}",),
        method="3t",
        steps=steps,
        inputs=InputConfig(val_fraction=0.1, test_fraction=0.1, workers=0),
    )
    train(config, out / "run")
    print(evaluate_run(out / "run").text())


if __name__ == "__main__":
    tyro.cli(main)

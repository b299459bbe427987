"""Try a loss of your own without changing the package: the pieces of a run, and a training loop of your own.

    python examples/add_a_loss.py [--out runs/example-loss] [--steps 100]

The loss is the hinge loss of VSE++ (arXiv 1707.05612, equation 6), which looks at the hardest negative of each sample
only. Here it is added to the losses of 3T, on the views of image and text. This loop has no checkpoints, no resume and
no log: once a loss has shown its worth, give it a name and a place in the package, as CONTRIBUTING.md describes, and
`threetowers train` does the rest.
"""

from dataclasses import replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from squares import captioned, labelled
from threetowers.config import InputConfig, PretrainConfig
from threetowers.data.loader import batches
from threetowers.recipes import PRESETS
from threetowers.run.setup import prepare
from threetowers.train.loop import validate
from threetowers.train.optim import adamw
from threetowers.train.pretrain import pretrain


def hinge_loss(a: Tensor, b: Tensor, margin: float = 0.2) -> Tensor:
    """Mean over unit vectors a, b [B, D] of max(0, margin + cosine of the hardest negative − cosine of the pair)."""
    cosines = a @ b.T
    positive = cosines.diagonal()
    others = cosines.masked_fill(torch.eye(len(a), dtype=torch.bool, device=a.device), -1.0)
    rows = (margin + others.amax(dim=1) - positive).relu()
    columns = (margin + others.amax(dim=0) - positive).relu()
    return (rows + columns).mean()


def main(out: Path = Path("runs/example-loss"), steps: int = 100, weight: float = 0.5) -> None:
    tower = out / "colours"
    pretrain(PretrainConfig(data=str(labelled(out / "labelled")), steps=steps, batch_size=32), tower)
    config = replace(
        PRESETS["tiny"](),
        data=str(captioned(out / "photos")),
        third=(f"file:{tower}",),
        inputs=InputConfig(val_fraction=0.2, test_fraction=0.1, workers=0),
    )
    # data, tokenizer, the trainable model, and the frozen features, which are computed and stored here
    setup = prepare(config, out / "run")
    model, optimizer = setup.model, adamw(setup.model, config.optim)

    model.train()
    for step, batch in enumerate(batches(setup.reader(), 0, steps)):
        batch = batch.to(setup.device)
        thirds = setup.thirds.features(batch)
        feats = model.features(pixels=batch.pixels, tokens=batch.tokens, thirds=thirds)
        loss, rows = model.loss(feats)  # the rows of 3T, weighted
        hinge = hinge_loss(model.view("img", feats), model.view("txt", feats))
        optimizer.zero_grad()
        (loss + weight * hinge).backward()
        optimizer.step()
        model.clamp_scale()
        if (step + 1) % 20 == 0:
            values = {name: value.item() for name, value in {**rows, "hinge": hinge}.items()}
            print(f"step {step + 1}:", ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    print("validation:", {name: round(value, 3) for name, value in validate(setup).items()})


if __name__ == "__main__":
    tyro.cli(main)

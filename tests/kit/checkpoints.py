"""Checkpoints as trainers write them."""

from pathlib import Path

import torch


class Settings:
    """A class of the trainer's own."""

    lr = 0.1


def own_class(folder: Path) -> None:
    torch.save({"state_dict": {"weight": torch.ones(2)}, "settings": Settings()}, folder / "own.pt")


def several_nests(folder: Path) -> None:
    weights = {"weight": torch.ones(2)}
    torch.save({"model_state": weights, "model_ema": weights, "epoch": 3}, folder / "several.pt")

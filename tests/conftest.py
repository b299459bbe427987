"""Fixtures that several test files share; no test reaches beyond this machine."""

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two test workers on two cores must not spin against each other

import numpy as np
import pytest
import torch
from PIL import Image

from kit.runs import TINY_INPUTS, TINY_PAIR
from kit.towers import timm_folder
from threetowers.config import OptimConfig, RunConfig

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (230, 210, 40)}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails every connection that leaves the loopback interface."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family != socket.AF_UNIX and str(address[0]) not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to connect to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indexes and fetched shards of tests do not go where the user's are."""
    os.environ["THREETOWERS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captions table over 96 PNG files: one coloured square at one of four places."""
    folder = tmp_path_factory.mktemp("photos")
    rows = ["path,caption_0,caption_1"]
    rng = np.random.default_rng(0)
    for index in range(96):
        colour = list(COLOURS)[index % 4]
        place = ["top left", "top right", "bottom left", "bottom right"][index // 4 % 4]
        pixels = rng.integers(0, 60, (40, 48, 3)).astype(np.uint8)
        y, x = (4 if "top" in place else 22), (4 if "left" in place else 28)
        pixels[y : y + 14, x : x + 14] = COLOURS[colour]
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
        rows.append(f"{index:03d}.png,a {colour} square at the {place} {index},the {place} is {colour}")
    (folder / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder / "captions.csv"


@pytest.fixture(scope="session")
def timm_tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A timm network with random weights, saved in timm's local-dir format, with preprocessing of its own."""
    return timm_folder(tmp_path_factory.mktemp("tower"), 5, 48, 0.9, "bilinear")


@pytest.fixture
def tiny_config(photos: Path, timm_tower: str, tmp_path: Path) -> Callable[..., RunConfig]:
    """A run of a second on `photos`; keyword arguments replace fields."""

    def make(**changes: Any) -> RunConfig:
        config = RunConfig(
            data=str(photos),
            third=(timm_tower,),
            steps=6,
            batch_size=16,
            log_every_steps=2,
            checkpoint_every_steps=100,
            device="cpu",
            embeddings=str(tmp_path / "embeddings"),
            pair=TINY_PAIR,
            inputs=TINY_INPUTS,
            optim=OptimConfig(lr=1e-3, warmup_steps=2),
        )
        return replace(config, **changes)

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the tests of a file share, such as a run that is trained once."""
    return tmp_path_factory.mktemp("module")

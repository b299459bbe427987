"""A frozen tower runs over images in pieces of the fastest size, and its features do not depend on the size."""

import time
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from threetowers.store.pieces import SIZES, TRIES, Pieces
from threetowers.towers.frozen.load import load_frozen


class Recorder:
    """A tower that notes the size of every piece, and takes as long as the clock of the test says."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.sizes: list[int] = []
        self.now = 0.0
        self._seconds = seconds

    def __call__(self, pixels: Tensor) -> Tensor:
        self.sizes.append(len(pixels))
        self.now += self._seconds.get(len(pixels), 1.0) * len(pixels)
        return pixels.float()


@pytest.mark.parametrize("fastest", SIZES)
def test_every_size_is_tried_and_the_fastest_is_kept(fastest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = Recorder({size: 0.5 if size == fastest else 1.0 for size in SIZES})
    monkeypatch.setattr(time, "perf_counter", lambda: tower.now)
    run = Pieces(tower, torch.device("cpu"))  # type: ignore[arg-type]
    pixels = torch.arange(1024, dtype=torch.uint8)[:, None]
    assert torch.equal(run(pixels), pixels.float())
    assert [size for size in tower.sizes[: TRIES * len(SIZES)] if size not in SIZES] == []
    assert {tower.sizes.count(size) >= TRIES for size in SIZES} == {True}
    tower.sizes.clear()
    run(pixels)
    assert set(tower.sizes) == {fastest}


@pytest.mark.parametrize("number", [1, 2, 3, 7, 8, 9, 31, 63, 100, 255])
def test_pieces_are_powers_of_two_that_fall_at_the_end(number: int) -> None:
    tower = Recorder({})
    run = Pieces(tower, torch.device("cpu"))  # type: ignore[arg-type]
    pixels = torch.arange(number, dtype=torch.uint8)[:, None]
    assert torch.equal(run(pixels), pixels.float())
    assert sum(tower.sizes) == number
    assert all(size & (size - 1) == 0 for size in tower.sizes)
    rest = tower.sizes[
        next((i for i, size in enumerate(tower.sizes) if size < min(SIZES)), len(tower.sizes)) :
    ]
    assert all(a > b for a, b in pairwise(rest)), "what is left over gets smaller"


def test_other_devices_take_the_whole_batch() -> None:
    sizes: list[int] = []

    def tower(pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        return torch.zeros(len(pixels), 1)

    Pieces(tower, torch.device("meta"))(torch.zeros(100, 1, device="meta"))  # type: ignore[arg-type]
    assert sizes == [100]


def test_features_are_those_of_the_whole_batch(timm_tower: str) -> None:
    tower = load_frozen(timm_tower, "third")
    pixels = torch.randint(0, 256, (77, 3, tower.image.size, tower.image.size), dtype=torch.uint8)
    torch.testing.assert_close(
        Pieces(tower, torch.device("cpu"))(pixels), tower(pixels), rtol=1e-5, atol=1e-5
    )

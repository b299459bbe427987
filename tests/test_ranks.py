"""Ranks from fp32 tiles are those of fp64 scores: at every tile size, with ties, whatever precision is allowed."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from threetowers.evaluate import ranks as ranks_module
from threetowers.evaluate.ranks import both_ranks
from threetowers.evaluate.retrieval import weighted_ranks
from threetowers.objective.losses import unit

System = tuple[Tensor, Tensor]


def reference(
    systems: list[System], weightings: list[tuple[float, ...]], owner: Tensor
) -> tuple[Tensor, Tensor]:
    """By `weighted_ranks`, one direction after the other; images without a text have the rank −1."""
    num_images = len(systems[0][0])
    captioned = owner.unique()
    i2t = torch.full((len(weightings), num_images), -1)
    i2t[:, captioned] = weighted_ranks(
        [(image[captioned], text) for image, text in systems], weightings, captioned, owner
    )
    t2i = weighted_ranks(
        [(text, image) for image, text in systems], weightings, owner, torch.arange(num_images)
    )
    return i2t, t2i


def features(kind: str, rows: int, width: int, generator: torch.Generator) -> Tensor:
    """`ties`: few different vectors. `near`: vectors that differ in the last bits of fp32. `plain`: random ones."""
    if kind == "ties":
        return unit(torch.randint(-1, 2, (rows, width), generator=generator).float())
    base = torch.randn(1 if kind == "near" else rows, width, generator=generator)
    if kind == "near":
        base = base + 2e-7 * torch.randn(rows, width, generator=generator)
    return unit(base)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["ties", "near", "plain"]),
    st.tuples(st.integers(1, 23), st.integers(1, 40), st.integers(1, 33)),
    st.integers(1, 9),
    st.integers(0, 2**32),
    st.sampled_from([[(1.0,)], [(1.0, 0.0), (0.3, 0.7), (-0.5, 1.5)]]),
    st.sampled_from([0.0, 0.02, 1.0]),
)
def test_ranks_are_those_of_exact_scores(
    kind: str,
    shape: tuple[int, int, int],
    block: int,
    seed: int,
    weightings: list[tuple[float, ...]],
    dense: float,
) -> None:
    """dense: the share of close scores from which a whole tile is computed exactly."""
    num_images, num_texts, width = shape
    generator = torch.Generator().manual_seed(seed)
    systems = [
        (features(kind, num_images, width + i, generator), features(kind, num_texts, width + i, generator))
        for i in range(len(weightings[0]))
    ]
    owner = torch.randint(0, num_images, (num_texts,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_module, "_DENSE", dense)
        found = both_ranks(systems, weightings, owner, block)
    for direction, expected in zip(found, reference(systems, weightings, owner), strict=True):
        assert direction.tolist() == expected.tolist()


@pytest.fixture
def low_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_ranks_do_not_depend_on_the_precision_that_is_allowed(low_precision: None) -> None:
    """bf16 products and autocast would put most of these scores into another order."""
    generator = torch.Generator().manual_seed(0)
    image = unit(torch.randn(300, 64, generator=generator))
    text = unit(image + 0.01 * torch.randn(300, 64, generator=generator))
    owner = torch.arange(300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = both_ranks([(image, text)], [(1.0,)], owner, 64)
    torch.set_float32_matmul_precision("highest")
    assert [each.tolist() for each in found] == [
        each.tolist() for each in reference([(image, text)], [(1.0,)], owner)
    ]

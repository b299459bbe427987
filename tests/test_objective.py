"""Losses of rows against their written formulas, and the tables of the methods."""

import math
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from threetowers.config import Method, ObjectiveConfig, RunConfig, StartConfig
from threetowers.errors import UsageError
from threetowers.objective import losses, pairs
from threetowers.objective.kinds import LOSSES, Compared

SIZES = st.integers(1, 17)


def vectors(num: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return losses.unit(torch.randn(num, width, generator=generator))


@given(num=SIZES, width=st.integers(1, 9), seed=st.integers(0, 99), scale=st.sampled_from([1.0, 10.0, 100.0]))
@settings(deadline=None)
def test_softmax_is_the_mean_of_two_cross_entropies(num: int, width: int, seed: int, scale: float) -> None:
    a, b = vectors(num, width, seed), vectors(num, width, seed + 1)
    logits = scale * a.double() @ b.double().T
    target = torch.arange(num)
    expected = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    torch.testing.assert_close(
        losses.softmax_loss(a, b, torch.tensor(scale)).double(), expected, rtol=1e-5, atol=2e-5
    )


@given(num=SIZES, seed=st.integers(0, 99))
@settings(deadline=None)
def test_sigmoid_is_the_written_double_sum(num: int, seed: int) -> None:
    a, b = vectors(num, 5, seed), vectors(num, 5, seed + 1)
    scale, bias = torch.tensor(7.0), torch.tensor(-3.0)
    total = 0.0
    for i in range(num):
        for j in range(num):
            z = 1.0 if i == j else -1.0
            total -= math.log(1 / (1 + math.exp(-z * (7.0 * float(a[i] @ b[j]) - 3.0))))
    assert float(losses.sigmoid_loss(a, b, scale, bias)) == pytest.approx(total / num, rel=1e-4, abs=1e-5)


@given(num=st.integers(2, 12), seed=st.integers(0, 99), data=st.data())
@settings(deadline=None)
def test_masked_duplicates_are_no_negatives(num: int, seed: int, data: st.DataObject) -> None:
    """With a mask, each sample's loss equals the loss over its own positive and its true negatives alone."""
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=num, max_size=num)))
    a, b = vectors(num, 4, seed), vectors(num, 4, seed + 1)
    scale = torch.tensor(5.0)
    negatives = losses.duplicate_mask(ids)
    terms = []
    for x, y in ((a, b), (b, a)):
        for i in range(num):
            columns = [i, *(j for j in range(num) if ids[j] != ids[i])]
            terms.append(F.cross_entropy(5.0 * (x[i] @ y[columns].T)[None], torch.tensor([0])))
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(losses.softmax_loss(a, b, scale, negatives), expected, rtol=1e-5, atol=1e-5)
    all_different = losses.duplicate_mask(torch.arange(num))
    torch.testing.assert_close(
        losses.softmax_loss(a, b, scale, all_different), losses.softmax_loss(a, b, scale)
    )
    bias = torch.tensor(-1.0)
    torch.testing.assert_close(
        losses.sigmoid_loss(a, b, scale, bias, all_different), losses.sigmoid_loss(a, b, scale, bias)
    )


def test_logits_are_fp32_under_autocast() -> None:
    """bf16 logits at scale 100 are off by up to 0.2; the loss must not depend on the towers' precision."""
    a, b = vectors(32, 16, 0), vectors(32, 16, 1)
    exact = losses.softmax_loss(a, b, torch.tensor(100.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.softmax_loss(a, b, torch.tensor(100.0)), exact)
        sigmoid = losses.sigmoid_loss(a, b, torch.tensor(100.0), torch.tensor(0.0))
    assert torch.equal(sigmoid, losses.sigmoid_loss(a, b, torch.tensor(100.0), torch.tensor(0.0)))


def test_unit_is_safe_at_zero_and_in_low_precision() -> None:
    features = torch.zeros(2, 4, requires_grad=True)
    losses.unit(features).sum().backward()
    assert features.grad is not None and torch.isfinite(features.grad).all()
    assert losses.unit(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_one_sample_has_no_softmax_loss() -> None:
    a, b = vectors(1, 4, 0), vectors(1, 4, 1)
    assert float(losses.softmax_loss(a, b, torch.tensor(10.0))) == 0.0


def test_accuracy_counts_both_directions() -> None:
    a = torch.eye(3)
    b = torch.stack([a[0], a[1], a[1]])  # text 2 is at image 1: one miss from the image, one from the text
    assert float(losses.contrastive_accuracy(a, b)) == pytest.approx(2 / 3)


def test_the_tables_of_the_methods() -> None:
    third = pairs.three_towers(["third"])
    assert [(r.a, r.b) for r in third] == [
        ("img", "txt"), ("img@third", "third@img"), ("txt@third", "third@txt"),
    ]  # fmt: skip
    assert [r.weight for r in third] == [pytest.approx(1 / 3)] * 3
    assert [r.name for r in third] == ["img-txt", "img-third", "txt-third"]
    two = pairs.three_towers(["third_a", "third_b"])
    assert [r.weight for r in two] == pytest.approx([1 / 3, 1 / 6, 1 / 6, 1 / 6, 1 / 6])
    assert pairs.baseline() == (pairs.Row("img", "txt", 1.0),)
    assert [(r.a, r.b, r.kind) for r in pairs.regression(["third"])[1:]] == [
        ("img@third", "third", "cosine"), ("txt@third", "third", "cosine"),
    ]  # fmt: skip


def test_heads_can_be_on_either_side_of_a_third_row() -> None:
    sides = {
        heads: [(row.a, row.b) for row in pairs.three_towers(["third"], heads=heads)[1:]]
        for heads in get_args(pairs.Heads)
    }
    assert sides == {
        "both": [("img@third", "third@img"), ("txt@third", "third@txt")],
        "third": [("img", "third@img"), ("txt", "third@txt")],
        "main": [("img@third", "third"), ("txt@third", "third")],
        "none": [("img", "third"), ("txt", "third")],
    }
    rows = pairs.objective(RunConfig(third=("timm:x",), objective=ObjectiveConfig(heads="third"))).rows
    assert rows == pairs.three_towers(["third"], heads="third") and len({row.name for row in rows}) == 3


def test_the_list_of_methods_has_the_names_that_a_configuration_takes() -> None:
    assert tuple(pairs.METHODS) == get_args(Method)
    assert len({entry.label for entry in pairs.METHODS.values()}) == len(pairs.METHODS)


@pytest.mark.parametrize("method", pairs.METHODS)
def test_every_method_is_a_table_and_only_the_baseline_needs_no_third(method: Method) -> None:
    entry = pairs.METHODS[method]
    table = pairs.objective(RunConfig(method=method, third=("timm:x",)))
    assert table.rows[0].name == "img-txt" and table.image == entry.image
    assert len({row.name for row in table.rows}) == len(table.rows)
    faces_third = table.image != "own" or any("third" in view for view in table.views())
    assert entry.needs_third == faces_third == (method != "baseline")
    assert entry.summary[0].isupper() and entry.summary.endswith(".")
    if method != "baseline":
        with pytest.raises(UsageError, match="--third"):
            pairs.objective(RunConfig(method=method))
    several = RunConfig(method=method, third=("a=timm:x", "b=timm:y"))
    if entry.max_thirds == 1:
        with pytest.raises(UsageError, match="one frozen tower"):
            pairs.objective(several)
    elif entry.needs_third:
        if entry.image == "start":
            with pytest.raises(
                UsageError, match=r"start\.image: 'third' .* its third towers are third_a, third_b"
            ):
                pairs.objective(several)
            several = replace(several, start=StartConfig(image="third_a"))
        faced = {pairs.tower_of(view) for view in pairs.objective(several).views()}
        assert {"third_a", "third_b"} <= faced


def test_labels_name_the_third_tower_and_keep_unknown_methods() -> None:
    assert pairs.method_label("3t", "matched") == "3T (matched)"
    assert pairs.method_label("lit-unlocked") == "LiT unlocked" and pairs.method_label("other") == "other"


def test_weights_are_used_as_written_and_checked() -> None:
    options = ObjectiveConfig(weights=(1.0, 0.0, 2.0))
    assert [r.weight for r in pairs.objective(RunConfig(third=("timm:x",), objective=options)).rows] == [
        1,
        0,
        2,
    ]
    with pytest.raises(UsageError, match=r"objective\.weights"):
        pairs.objective(RunConfig(third=("timm:x",), objective=ObjectiveConfig(weights=(1.0, 1.0))))


def test_the_list_of_losses_has_the_names_that_rows_and_configurations_take() -> None:
    assert set(LOSSES) == set(get_args(pairs.Kind))
    options = get_type_hints(ObjectiveConfig)
    assert set(LOSSES) == {*get_args(options["kind"]), *get_args(options["regression"])}


@given(kind=st.sampled_from(sorted(LOSSES)), num=SIZES, seed=st.integers(0, 99))
def test_every_kind_of_loss_is_least_where_the_views_agree(kind: pairs.Kind, num: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = losses.unit(torch.randn(num, 16, generator=generator)).requires_grad_()
    scale, bias = torch.tensor(10.0), torch.tensor(-5.0)
    agreeing = LOSSES[kind].loss(Compared(a, a, scale, bias))
    opposed = LOSSES[kind].loss(Compared(a, -a, scale, bias))
    assert agreeing.ndim == 0 and torch.isfinite(agreeing)
    if num > 1 or kind != "softmax":  # a batch of one has nothing to be told from
        assert agreeing < opposed
    assert torch.autograd.grad(agreeing, a)[0].shape == a.shape

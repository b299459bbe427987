"""Zero-shot classification: class vectors, accuracy, and encoders with known scores."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from threetowers.errors import DataError, UsageError
from threetowers.evaluate.zero_shot import accuracy, class_embeddings, label_ranks, per_class_accuracy, prompt
from threetowers.objective.losses import unit


def encode(texts: list[str]) -> Tensor:
    """A different vector of a different length for every text."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) for text in texts]
    vectors = [torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(vectors)


def scored(image: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    return accuracy(label_ranks(image, classes, labels), labels, len(classes))


def test_a_class_is_the_renormalised_mean_of_its_normalised_prompts() -> None:
    vectors = {"a cat": [3.0, 0.0], "cat!": [0.0, 0.5], "a dog": [0.0, -2.0], "dog!": [0.0, -1.0]}
    classes = class_embeddings(
        lambda texts: torch.tensor([vectors[text] for text in texts]), ["cat", "dog"], ["a {}", "{c}!"]
    )
    expected = torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [0.0, -1.0]])
    torch.testing.assert_close(classes, expected)


@pytest.mark.parametrize(("num_classes", "num_templates"), [(1, 1), (700, 3), (3, 1500), (2000, 1)])
def test_classes_keep_their_order_over_many_calls(num_classes: int, num_templates: int) -> None:
    names = [f"thing {i}" for i in range(num_classes)]
    templates = [f"{i} {{}}" for i in range(num_templates)]
    classes = class_embeddings(encode, names, templates)
    assert classes.shape == (num_classes, 6)
    for row in (0, num_classes // 2, num_classes - 1):
        alone = class_embeddings(encode, [names[row]], templates)
        torch.testing.assert_close(classes[row : row + 1], alone)


def test_prompts_take_names_with_braces_and_backslashes_as_they_are() -> None:
    assert prompt("a {c}, yes a {}.", r"{}\1{c}") == r"a {}\1{c}, yes a {}\1{c}."


@pytest.mark.parametrize(
    ("names", "templates", "error", "message"),
    [
        ([], ["{}"], DataError, "0 class names and 1 templates"),
        (["cat"], [], DataError, "1 class names and 0 templates"),
        (["cat"], ["{}", "a photo"], UsageError, "template 1 'a photo' has no place"),
    ],
)
def test_missing_names_templates_and_places_are_refused(
    names: list[str], templates: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        class_embeddings(encode, names, templates)


def test_embeddings_that_are_not_finite_or_too_few_are_refused() -> None:
    with pytest.raises(DataError, match=r"classes 0 to 1.*not finite"):
        class_embeddings(lambda texts: torch.full((len(texts), 2), torch.nan), ["a", "b"], ["{}"])
    with pytest.raises(DataError, match="2 prompts gave 1"):
        class_embeddings(lambda texts: torch.ones(1, 2), ["a", "b"], ["{}"])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 20), st.booleans())
def test_accuracy_is_that_of_a_full_sort_with_ties_last(
    seed: int, num_classes: int, num_images: int, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(-1, 2, (num_images, 3), generator=generator).float()
    classes = torch.randint(-1, 2, (num_classes, 3), generator=generator).float()
    if not ties:
        image = image + torch.rand(num_images, 3, generator=generator)
        classes = classes + torch.rand(num_classes, 3, generator=generator)
    labels = torch.randint(0, num_classes, (num_images,), generator=generator)

    scores = (image.double().numpy() @ classes.double().numpy().T).astype(np.float32)
    own = np.arange(num_classes) == labels.numpy()[:, None]
    places = [int(np.argmax(mine[np.lexsort((mine, -row))])) for row, mine in zip(scores, own, strict=True)]
    hits = np.array(places) < 1
    per_class = [hits[labels.numpy() == c].mean() for c in range(num_classes) if c in labels]

    result = scored(image, classes, labels)
    assert result["top1"] == hits.mean()
    assert result["mean_per_class"] == pytest.approx(np.mean(per_class))
    assert ("top5" in result) == (num_classes > 5)
    if num_classes > 5:
        assert result["top5"] == (np.array(places) < 5).mean()


def test_oracles() -> None:
    classes, labels = torch.eye(8), torch.arange(24) % 8
    assert scored(classes[labels], classes, labels) == {"top1": 1.0, "top5": 1.0, "mean_per_class": 1.0}
    constant = unit(torch.rand(17)).expand(8, -1)
    assert scored(constant[labels], constant, labels) == {"top1": 0.0, "top5": 0.0, "mean_per_class": 0.0}


def test_absent_classes_are_nan_and_do_not_enter_the_mean() -> None:
    classes = torch.eye(4)
    labels = torch.tensor([0, 0, 0, 2])
    image = classes[torch.tensor([0, 0, 1, 2])]
    per_class = per_class_accuracy(label_ranks(image, classes, labels), labels, len(classes))
    assert per_class[[0, 2]].tolist() == [pytest.approx(2 / 3), 1.0]
    assert per_class[[1, 3]].isnan().all()
    result = scored(image, classes, labels)
    assert result == {"top1": 0.75, "mean_per_class": pytest.approx(5 / 6)}


@pytest.mark.parametrize(
    ("image", "labels", "message"),
    [
        (torch.eye(3), torch.tensor([0, 3, 1]), "row 1 names class 3"),
        (torch.eye(3), torch.tensor([0, 1, -1]), "row 2 names class -1"),
        (torch.eye(3), torch.tensor([0, 1]), "one class index per image"),
        (torch.eye(3), torch.tensor([0.0, 1.0, 2.0]), "int64"),
        (torch.ones(3, 2), torch.arange(3), "2 wide, class embeddings 3"),
        (torch.eye(3) * torch.inf, torch.arange(3), "row 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(image: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_ranks(image, torch.eye(3), labels)

"""Retrieval ranks and recalls against a full sort, and encoders with known scores."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from threetowers.errors import DataError, UsageError
from threetowers.evaluate.clip_benchmark import clip_benchmark_result
from threetowers.evaluate.retrieval import (
    Ranks,
    System,
    combined_ranks,
    ranks_from_features,
    recalls,
)
from threetowers.objective.losses import unit


def sorted_rank(scores: np.ndarray, right: np.ndarray) -> int:
    """Place of the first right candidate when all are sorted by score, the right ones last among equals."""
    return int(np.argmax(right[np.lexsort((right, -scores))]))


def reference(image: Tensor, text: Tensor, text_image: Tensor) -> tuple[list[int], list[int]]:
    scores = (image.double().numpy() @ text.double().numpy().T).astype(np.float32)
    owner = text_image.numpy()
    captioned = [i for i in range(len(image)) if i in owner]
    i2t = [sorted_rank(scores[i], owner == i) for i in captioned]
    t2i = [sorted_rank(scores[:, m], np.arange(len(image)) == owner[m]) for m in range(len(text))]
    return i2t, t2i


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and owners; small integers as features make ties common."""
    num_images, num_texts, width = (draw(st.integers(1, high)) for high in (9, 14, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def features(rows: int) -> Tensor:
        return torch.randint(-1, 2, (rows, width), generator=generator).float()

    image, text = features(num_images), features(num_texts)
    if draw(st.booleans()):
        image, text = unit(image + torch.rand(num_images, 1, generator=generator)), unit(text)
    return image, text, torch.randint(0, num_images, (num_texts,), generator=generator)


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(1, 16))
def test_ranks_are_those_of_a_full_sort_with_ties_last(
    problem: tuple[Tensor, Tensor, Tensor], block: int
) -> None:
    image, text, text_image = problem
    ranks = ranks_from_features(image, text, text_image, block=block)
    i2t, t2i = reference(image, text, text_image)
    assert ranks.i2t.tolist() == i2t
    assert ranks.t2i.tolist() == t2i
    assert ranks.i2t_image.tolist() == sorted(set(text_image.tolist()))
    assert ranks.t2i_image.tolist() == text_image.tolist()


def test_perfect_encoder_scores_one() -> None:
    image = torch.eye(40)
    text_image = torch.arange(40).repeat_interleave(5)[torch.randperm(200)]
    result = recalls(ranks_from_features(image, image[text_image], text_image, block=7), ks=(1, 5))
    assert result == dict.fromkeys(("i2t_r@1", "i2t_r@5", "t2i_r@1", "t2i_r@5", "mean_r@1"), 1.0)


def test_random_encoder_scores_chance() -> None:
    generator = torch.Generator().manual_seed(3)
    num_images, per_image = 800, 5
    num_texts = num_images * per_image
    image = unit(torch.randn(num_images, 64, generator=generator))
    text = unit(torch.randn(num_texts, 64, generator=generator))
    result = recalls(ranks_from_features(image, text, torch.arange(num_texts) // per_image))
    for k in (1, 5, 10):
        chances = {
            "t2i": (num_texts, k / num_images),
            # At least one of the image's own captions among k drawn from all of them.
            "i2t": (num_images, 1 - stats.hypergeom.pmf(0, num_texts, per_image, k)),
        }
        for direction, (queries, chance) in chances.items():
            low, high = stats.binom.ppf([1e-4, 1 - 1e-4], queries, chance)
            assert low <= round(result[f"{direction}_r@{k}"] * queries) <= high, (direction, k)


@pytest.mark.parametrize(("num_images", "num_texts", "width"), [(513, 520, 37), (37, 41, 512), (12, 12, 3)])
def test_constant_encoder_scores_zero_whatever_the_matrix_shape(
    num_images: int, num_texts: int, width: int
) -> None:
    same = unit(torch.randn(width, generator=torch.Generator().manual_seed(width)))
    text_image = torch.arange(num_texts) % num_images
    ranks = ranks_from_features(
        same.expand(num_images, -1), same.expand(num_texts, -1), text_image, block=100
    )
    assert set(recalls(ranks).values()) == {0.0}


def test_any_caption_of_the_image_is_a_hit_and_own_captions_do_not_stand_in_the_way() -> None:
    image = unit(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    text = unit(torch.tensor([[1.0, 0.1], [1.0, 0.2], [-1.0, 0.0], [0.0, 1.0]]))
    ranks = ranks_from_features(image, text, torch.tensor([0, 0, 0, 1]))
    assert ranks.i2t.tolist() == [0, 0]
    assert ranks.t2i.tolist() == [0, 0, 1, 0]


def test_images_without_a_caption_are_candidates_but_not_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    image = unit(torch.randn(6, 8, generator=generator))
    alone = ranks_from_features(image, image, torch.arange(6))
    twins = ranks_from_features(torch.cat([image, image[:2]]), image, torch.arange(6))
    assert len(twins.i2t) == 6
    assert torch.equal(twins.i2t, alone.i2t)
    assert twins.t2i.tolist() == [1, 1, 0, 0, 0, 0]  # the twin of the right image ties with it


def test_every_image_and_every_text_is_queried_once_past_the_last_full_block() -> None:
    image = unit(torch.randn(11, 4, generator=torch.Generator().manual_seed(1)))
    whole = ranks_from_features(image, image.flip(0), torch.arange(11), block=11)
    for block in (1, 2, 4, 10, 100):
        parts = ranks_from_features(image, image.flip(0), torch.arange(11), block=block)
        assert torch.equal(parts.i2t, whole.i2t) and torch.equal(parts.t2i, whole.t2i)


def test_recalls_count_ranks_below_k() -> None:
    ranks = Ranks(torch.tensor([0, 4, 5, 9]), torch.tensor([0, 0, 1, 10]), torch.arange(4), torch.arange(4))
    assert recalls(ranks) == {
        "i2t_r@1": 0.25, "i2t_r@5": 0.5, "i2t_r@10": 1.0,
        "t2i_r@1": 0.5, "t2i_r@5": 0.75, "t2i_r@10": 0.75,
        "mean_r@1": 0.375,
    }  # fmt: skip
    assert recalls(ranks, ks=(5,))["mean_r@1"] == 0.375
    i2t, t2i = ranks.hits(5)
    assert i2t.tolist() == [True, True, False, False] and t2i.tolist() == [True, True, True, False]
    with pytest.raises(UsageError, match="at least 1"):
        recalls(ranks, ks=(0, 1))


def test_half_precision_features_are_scored_beyond_their_own_precision() -> None:
    image = torch.eye(3, dtype=torch.bfloat16)
    text = torch.tensor([[1, 0, 0], [0, 1, 0.001], [0, 0.001, 1]], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert recalls(ranks_from_features(image, text, torch.arange(3)))["mean_r@1"] == 1.0


GOOD = torch.eye(4)


@pytest.mark.parametrize(
    ("image", "text", "text_image", "message"),
    [
        (GOOD.clone().index_fill_(0, torch.tensor(2), torch.nan), GOOD, torch.arange(4), "image features.*row 2"),
        (GOOD, GOOD.clone().index_fill_(0, torch.tensor(1), torch.inf), torch.arange(4), "text features.*row 1"),
        (GOOD, torch.ones(4, 3), torch.arange(4), "4 wide and text features 3"),
        (GOOD, GOOD, torch.arange(3), "one image index per text"),
        (GOOD, GOOD, torch.arange(4).float(), "int64"),
        (GOOD, GOOD, torch.tensor([0, 1, 4, 2]), "row 2 names image 4"),
        (GOOD, GOOD, torch.tensor([0, -1, 3, 2]), "row 1 names image -1"),
        (torch.empty(0, 4), GOOD, torch.arange(4), "image features.*matrix"),
        (GOOD, torch.empty(0, 4), torch.empty(0, dtype=torch.int64), "text features.*matrix"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(
    image: Tensor, text: Tensor, text_image: Tensor, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ranks_from_features(image, text, text_image)


def test_systems_on_different_data_are_refused() -> None:
    with pytest.raises(DataError, match=r"system 1: 3 images and 4 texts, but system 0 has 4 and 4"):
        combined_ranks([System(GOOD, GOOD), System(GOOD[:3], GOOD)], [(0.5, 0.5)], torch.zeros(4).long())


def test_results_carry_the_names_of_clip_benchmark() -> None:
    metrics = recalls(ranks_from_features(torch.eye(2), torch.eye(2), torch.tensor([0, 0])), ks=(1, 5))
    assert metrics["i2t_r@1"] == 1.0 and metrics["t2i_r@1"] == 0.5
    assert clip_benchmark_result("wds/flickr30k", "m", "", "zeroshot_retrieval", metrics) == {
        "dataset": "wds/flickr30k", "model": "m", "pretrained": "", "task": "zeroshot_retrieval", "language": "en",
        "metrics": {
            "text_retrieval_recall@1": 1.0, "text_retrieval_recall@5": 1.0,
            "image_retrieval_recall@1": 0.5, "image_retrieval_recall@5": 1.0,
        },
    }  # fmt: skip
    result = clip_benchmark_result(
        "d", "m", "p", "zeroshot_classification", {"top1": 0.5, "top5": 0.9, "mean_per_class": 0.4}, "de"
    )
    assert result["metrics"] == {"acc1": 0.5, "acc5": 0.9, "mean_per_class_recall": 0.4}
    assert result["language"] == "de"
    with pytest.raises(UsageError, match=r"'top1' does not belong to task 'zeroshot_retrieval'"):
        clip_benchmark_result("d", "m", "p", "zeroshot_retrieval", {"top1": 0.5})

"""What every evaluator of the list does: oracles score 1, chance scores chance, and the items give the metrics."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from threetowers.config import RunConfig
from threetowers.evaluate.encode import Encoded, EvaluationData, Labelled
from threetowers.evaluate.evaluation import EVALUATORS, Evaluator, evaluate, evaluate_run
from threetowers.evaluate.result import Result
from threetowers.objective.losses import unit
from threetowers.train.loop import train

NUM_IMAGES, NUM_CAPTIONS, NUM_LABELLED, NUM_CLASSES = 120, 240, 180, 12
SIZES = {"i2t_rank": NUM_IMAGES, "t2i_rank": NUM_CAPTIONS, "classes/rank": NUM_LABELLED}
TEXT_IMAGE = torch.arange(NUM_CAPTIONS) // 2
LABELS = torch.arange(NUM_LABELLED) % NUM_CLASSES

every_evaluator = pytest.mark.parametrize("evaluator", EVALUATORS, ids=lambda e: e.measure.__name__)


def random(rows: int, seed: int) -> Tensor:
    return unit(torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed)))


def noisy(exact: Tensor, knowledge: float, seed: int) -> Tensor:
    """What an encoder gives instead of the exact vectors: these with knowledge 1, noise with knowledge 0."""
    return unit(knowledge * exact + (1 - knowledge) * random(len(exact), seed))


def encoded(knowledge: float, seed: int) -> Encoded:
    views = {}
    for place, (image, text) in enumerate((("img", "txt"), ("third@txt", "txt@third"))):
        views[image] = random(NUM_IMAGES, seed + place)
        views[text] = noisy(views[image][TEXT_IMAGE], knowledge, seed + 10 + place)
    return Encoded(views, TEXT_IMAGE, torch.arange(NUM_IMAGES), [f"caption {i}" for i in range(NUM_CAPTIONS)])


def data(knowledge: float) -> EvaluationData:
    """Validation, test and labelled data of an encoder that is right always (1), in part, or by chance (0)."""
    classes = random(NUM_CLASSES, 0)
    image = noisy(classes[LABELS], knowledge, 1)
    names = [f"class {i}" for i in range(NUM_CLASSES)]
    return EvaluationData(
        encoded(knowledge, 20), encoded(knowledge, 50), Labelled(image, classes, LABELS, names)
    )


def metrics(sections: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Every single number of a result by its path, for example `combination/third/chosen`; α is no metric."""
    for name, value in sections.items():
        if isinstance(value, float) and name != "alpha":
            yield f"{path}{name}", value
        elif isinstance(value, Mapping):
            yield from metrics(value, f"{path}{name}/")


def measured(evaluator: Evaluator, knowledge: float) -> Result:
    result = evaluator.measure(data(knowledge))
    assert result is not None
    return result


@every_evaluator
def test_an_encoder_that_is_always_right_scores_one(evaluator: Evaluator) -> None:
    result = measured(evaluator, 1.0)
    found = dict(metrics(result.sections))
    assert found and set(found.values()) == {1.0}
    assert all(int(ranks.max()) == 0 for ranks in result.items.values())


@every_evaluator
def test_an_encoder_that_knows_nothing_scores_chance(evaluator: Evaluator) -> None:
    for path, value in metrics(measured(evaluator, 0.0).sections):
        name = path.split("/")[-1]
        num = int(name.split("@")[1]) if "@" in name else 5 if name == "top5" else 1
        chance = num / (NUM_CLASSES if "per_class" in path or path.startswith("zero_shot") else NUM_IMAGES)
        # one class has 15 images; elsewhere 120 queries or more share the chance
        slack = 0.35 if path.startswith("per_class") else 0.12
        assert abs(value - chance) < slack, path


@every_evaluator
def test_items_are_one_per_query_and_give_the_metrics(evaluator: Evaluator) -> None:
    result = measured(evaluator, 0.3)
    assert result.items and set(result.saved) <= result.items.keys()
    for name, ranks in result.items.items():
        (size,) = (size for suffix, size in SIZES.items() if name.endswith(suffix))
        assert ranks.shape == (size,) and ranks.dtype == torch.int64 and int(ranks.min()) >= 0
    for path, value in metrics(result.sections):
        assert value == pytest.approx(from_items(path, result.items)), path


def from_items(path: str, items: Mapping[str, Tensor]) -> float:
    """A metric recomputed from the ranks alone."""
    section, _, name = path.rpartition("/")

    def share(rank: Tensor, k: int) -> float:
        return float((rank < k).double().mean())

    if name == "mean_r@1" or name == "chosen":
        return sum(share(items[f"{section}/{way}_rank"], 1) for way in ("i2t", "t2i")) / 2
    if "_r@" in name:
        way, _, k = name.partition("_r@")
        return share(items[f"{section}/{way}_rank"], int(k))
    ranks = items["classes/rank"]
    if section == "per_class":
        return share(ranks[int(name.removeprefix("class ")) == LABELS], 1)
    return share(ranks, 5 if name == "top5" else 1)  # as many images of every class: mean_per_class is top1


@every_evaluator
def test_sections_are_those_that_the_list_names(evaluator: Evaluator) -> None:
    result = measured(evaluator, 0.3)
    assert tuple(result.sections) == evaluator.sections
    assert json.loads(json.dumps(result.sections)) == result.sections, "plain values"
    assert result.lines and all(line.isprintable() for line in result.lines)


@every_evaluator
def test_absent_data_give_none(evaluator: Evaluator) -> None:
    assert evaluator.measure(EvaluationData()) is None
    full = data(1.0)
    alone = [
        evaluator.measure(replace(EvaluationData(), **{part: getattr(full, part)})) for part in vars(full)
    ]
    needs = {"retrieval": 2, "combination": 0, "zero_shot": 1}  # how many parts suffice on their own
    assert sum(result is not None for result in alone) == needs.get(evaluator.measure.__name__, 1)


def test_a_section_stands_for_one_evaluator_and_is_empty_without_data() -> None:
    names = [section for evaluator in EVALUATORS for section in evaluator.sections]
    assert len(set(names)) == len(names)
    evaluation, saved = evaluate(EvaluationData(), "photos", 0, 3)
    assert evaluation.as_dict() == {
        "data": "photos", "num_val": 0, "num_test": 3, "repeated_captions": {},
        **{name: {} for name in names}, "num_bad": 0,
    }  # fmt: skip
    assert not saved
    assert evaluation.text() == (
        "no validation images with captions, so no retrieval on them\n"
        "no test images with captions, so no retrieval on them"
    )


def test_what_is_written_has_the_keys_and_tensors_of_the_format(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    for name in ("red", "blue"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (40, 40), name).save(tmp_path / "classes" / name / f"{index}.png")
    train(tiny_config(classes=str(tmp_path / "classes"), steps=2), tmp_path / "run")
    evaluation = evaluate_run(tmp_path / "run")
    written = json.loads((tmp_path / "run" / "evaluation.json").read_bytes())
    assert list(written) == [
        "data", "num_val", "num_test", "repeated_captions", "val", "test", "combination", "zero_shot", "per_class",
        "num_bad", "schema", "clip_benchmark",
    ]  # fmt: skip
    assert {key: written[key] for key in evaluation.as_dict()} == evaluation.as_dict()
    assert [row["task"] for row in written["clip_benchmark"]] == [
        "zeroshot_retrieval",
        "zeroshot_classification",
    ]
    parts = {
        "img",
        "img@third",
        "index",
        "text_group",
        "text_image",
        "third@img",
        "third@txt",
        "txt",
        "txt@third",
    }
    tensors = load_file(tmp_path / "run" / "features.safetensors")
    assert tensors.keys() == {f"{part}/{name}" for part in ("val", "test") for name in parts} | {
        "classes/rank"
    }
    assert tensors["classes/rank"].shape == (6,)
    assert not list((tmp_path / "run").glob(".*.tmp")), "nothing of the writing is left"

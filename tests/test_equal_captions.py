"""Equal captions are right for each other's images: in ranks, in every evaluation, in the log and in the report."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from kit.pictures import encoded as file_of
from kit.pictures import noise
from kit.runs import Config
from threetowers.commands.validate import validate
from threetowers.compare import runs as compare_module
from threetowers.compare.claims import Measured, difference
from threetowers.compare.comparison import compare
from threetowers.compare.figures import _interval
from threetowers.compare.showcase import showcase
from threetowers.config import CompareConfig, RunConfig
from threetowers.data.open import open_source, splits
from threetowers.data.repeats import caption_key, repeated_captions, repeated_share, text_groups
from threetowers.data.tokenize import OpenClipTokenizer, Tokenizer, train_tokenizer
from threetowers.errors import DataError
from threetowers.evaluate import evaluation as evaluation_module
from threetowers.evaluate import ranks as ranks_module
from threetowers.evaluate.encode import Encoded, EvaluationData, captions_of, encode
from threetowers.evaluate.evaluation import evaluate, evaluate_run, save_features
from threetowers.evaluate.ranks import both_ranks
from threetowers.evaluate.retrieval import ranks_from_features, weighted_ranks
from threetowers.model import ThreeTowers
from threetowers.objective.losses import contrastive_accuracy, unit
from threetowers.objective.pairs import tower_of
from threetowers.processes import ALONE
from threetowers.report.page import write_report
from threetowers.run.setup import assemble
from threetowers.train import loop
from threetowers.train.log import step_metrics
from threetowers.train.loop import train
from threetowers.train.step import StepResult

# Ranks against a boolean matrix of all right answers


def right_answers(text_image: Tensor, text_group: Tensor, num_images: int) -> np.ndarray:
    """bool [N, M]: whether the image has a text that is equal to this one."""
    right = np.zeros((num_images, len(text_image)), dtype=bool)
    for image, group in zip(text_image.tolist(), text_group.tolist(), strict=True):
        right[image] |= text_group.numpy() == group
    return right


def dense_ranks(scores: np.ndarray, right: np.ndarray) -> list[int]:
    """The rank of each row: the wrong scores that reach the row's best right one; −1 for a row without right ones."""
    return [
        int((row[~answers] >= row[answers].max()).sum()) if answers.any() else -1
        for row, answers in zip(scores, right, strict=True)
    ]


def features(kind: str, rows: int, width: int, generator: torch.Generator) -> Tensor:
    """`ties`: few different vectors. `near`: vectors that differ in the last bits of fp32. `plain`: random ones."""
    if kind == "ties":
        return unit(torch.randint(-1, 2, (rows, width), generator=generator).float())
    base = torch.randn(1 if kind == "near" else rows, width, generator=generator)
    return unit(base + 2e-7 * torch.randn(rows, width, generator=generator))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["ties", "near", "plain"]),
    st.tuples(st.integers(1, 14), st.integers(1, 40), st.integers(1, 9), st.integers(1, 40)),
    st.sampled_from([[(1.0,)], [(1.0, 0.0), (0.25, 0.75), (-0.5, 1.5)]]),
    st.booleans(),
    st.tuples(st.integers(1, 9), st.sampled_from([0, 1, 3, 8]), st.sampled_from([1, 2, 1 << 14])),
    st.integers(0, 2**32),
)
def test_ranks_are_those_of_a_boolean_matrix_of_right_answers(
    kind: str,
    shape: tuple[int, int, int, int],
    weightings: list[tuple[float, ...]],
    equal_vectors: bool,
    tiles: tuple[int, int, int],
    seed: int,
) -> None:
    """Texts of a group have equal vectors, or as it may be where they were encoded in different batches."""
    num_images, num_texts, width, num_groups = shape
    block, few, pairs = tiles
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, num_images, (num_texts,), generator=generator)
    group = 7 * torch.randint(0, num_groups, (num_texts,), generator=generator) - 3
    systems = []
    for extra in range(len(weightings[0])):
        image, text = (features(kind, rows, width + extra, generator) for rows in (num_images, num_texts))
        if equal_vectors:
            text = text[[group.tolist().index(number) for number in group.tolist()]]
        systems.append((image, text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_module, "_FEW", few)
        patch.setattr(ranks_module, "_PAIRS", pairs)
        i2t, t2i = both_ranks(systems, weightings, owner, block, group)
    right = right_answers(owner, group, num_images)
    exact = [(image.double().numpy() @ text.double().numpy().T).astype(np.float32) for image, text in systems]
    for place, weights in enumerate(weightings):
        scores = np.float32(weights[0]) * exact[0]
        for weight, score in zip(weights[1:], exact[1:], strict=True):
            scores = scores + np.float32(weight) * score
        assert i2t[place].tolist() == dense_ranks(scores, right)
        assert t2i[place].tolist() == dense_ranks(scores.T, right.T)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["ties", "near", "plain"]), st.integers(0, 2**32))
def test_without_a_repeated_caption_ranks_are_those_of_own_captions(kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image, text = features(kind, 12, 6, generator), features(kind, 30, 6, generator)
    owner = torch.cat([torch.arange(12), torch.randint(0, 12, (18,), generator=generator)])
    alone = ranks_from_features(image, text, owner)
    numbered = ranks_from_features(image, text, owner, torch.randperm(30, generator=generator))
    for ranks in (alone, numbered):
        own = torch.arange(12)
        assert ranks.i2t.tolist() == weighted_ranks([(image, text)], [(1.0,)], own, owner)[0].tolist()
        assert ranks.t2i.tolist() == weighted_ranks([(text, image)], [(1.0,)], owner, own)[0].tolist()
        assert ranks.i2t_image.tolist() == own.tolist() and ranks.t2i_image.tolist() == owner.tolist()
        assert ranks.num_independent() == 12


def test_groups_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match="text_group: one number per text"):
        ranks_from_features(torch.eye(3), torch.eye(3), torch.arange(3), torch.arange(2))


def test_images_that_share_captions_are_drawn_together() -> None:
    """0 and 2 share a caption, 2 and 3 another; 4 repeats its own; 5 has no caption."""
    owner = torch.tensor([0, 2, 2, 3, 1, 4, 4])
    group = torch.tensor([9, 9, 5, 5, 1, 2, 2])
    ranks = ranks_from_features(torch.eye(6), torch.eye(6)[owner], owner, group)
    assert ranks.i2t_image.tolist() == [0, 1, 0, 0, 4]
    assert ranks.t2i_image.tolist() == [0, 0, 0, 0, 1, 4, 4]
    assert ranks.num_independent() == 3


def test_figures_of_images_that_all_share_captions_have_no_interval() -> None:
    ranks = ranks_from_features(torch.eye(4), torch.eye(4), torch.arange(4), torch.zeros(4).long())
    measured = Measured({"retrieval/mean_r@1": 1.0}, {"main": ranks})
    runs = {("a", ""): {0: measured}, ("b", ""): {0: measured}}
    assert difference(runs, ("a", ""), ("b", ""), "retrieval/mean_r@1") == (0.0, -np.inf, np.inf, 1)
    assert _interval([1.0], measured, "retrieval/mean_r@1") == (1.0, None, None)


# Which captions are equal


def test_case_white_space_and_encoding_make_no_other_caption() -> None:
    same = ["A Red Square.", " a red\tsquare. ", "a red square .", "a red&nbsp;square."]
    assert len({caption_key(caption) for caption in same}) == 1
    assert caption_key("caf\u00e9 \u2019s") == caption_key("cafe\u0301 's") == caption_key("CAF\u00c9's")
    other = ["a red square", "a red squares.", "a red square!", "a book about C", "a book about C++"]
    assert len({caption_key(caption) for caption in other}) == len(other)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "trained": lambda: train_tokenizer(["Aa . é", "a&b 1 2's"] * 3, vocab_size=300, context_length=40),
    "open_clip": lambda: OpenClipTokenizer(40),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_captions_with_equal_tokens_are_equal(name: str) -> None:
    """So that a tower that reads whole captions can always score 1."""
    rng = np.random.default_rng(0)
    pieces = ["a", "A", "'", "s", "é", "e\u0301", ".", ",", " ", "  ", "&", "&amp;", "1", "ß", "_"]
    captions = ["".join(rng.choice(pieces, rng.integers(1, 6))) for _ in range(6_000)]
    keys: dict[bytes, set[str]] = {}
    for caption, tokens in zip(captions, TOKENIZERS[name]()(captions).numpy(), strict=True):
        keys.setdefault(tokens.tobytes(), set()).add(caption_key(caption))
    assert len(keys) < len(set(captions)), "some have equal tokens"
    assert [found for found in keys.values() if len(found) > 1] == []


def test_what_a_model_does_not_read_counts() -> None:
    """A short context makes no two captions equal, and so nothing easier."""
    captions = ["a b c d e f g h", "a b c d e f g i"]
    tokens = train_tokenizer(captions, vocab_size=300, context_length=5)(captions)
    assert torch.equal(tokens[0], tokens[1])
    assert text_groups(captions).tolist() == [0, 1]


def test_the_share_of_repeated_captions_is_that_of_other_images() -> None:
    own = np.array([0, 0, 1, 1, 2, 2])
    assert repeated_share(own, np.array([0, 0, 1, 2, 2, 3])) == pytest.approx(2 / 6)
    assert repeated_share(own, np.arange(6)) == 0.0
    assert repeated_share(own[:0], own[:0]) == 0.0


# From files to figures

SIZES = (2, 3, 4, 5)


def numbers(num_images: int, shift: int = 0) -> list[int]:
    """The number of each image's thing: as many images in a row as SIZES says have the same."""
    found = [number for number, size in enumerate(SIZES * num_images) for _ in range(size)][:num_images]
    return found[-shift:] + found[:-shift] if shift else found


@pytest.fixture(scope="session")
def repeating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders train, val and test of different pictures; each caption is that of two to five images."""
    root = tmp_path_factory.mktemp("repeating")
    for seed, (part, num_images) in enumerate((("train", 42), ("val", 14), ("test", 28))):
        (root / part).mkdir()
        for i, (thing, place) in enumerate(zip(numbers(num_images), numbers(num_images, 3), strict=True)):
            (root / part / f"{i:02d}.png").write_bytes(file_of(noise(9, 9, 100 * seed + i), "PNG"))
            shown = f"A thing {thing}" if i % 2 else f"a  thing {thing}"
            (root / part / f"{i:02d}.txt").write_text(f"{shown}\nat place {place}")
    return root


Encoder = Callable[..., Encoded]


def knowing(everything: bool) -> Encoder:
    """`encode` whose vectors hold the right answers and nothing else, or are random."""

    def told(*arguments: Any, **options: Any) -> Encoded:
        found = encode(*arguments, **options)
        if not found.captions:
            return found
        groups = text_groups(found.captions)
        text = torch.eye(int(groups.max()) + 1)[groups]
        image = torch.zeros(len(found.index), text.shape[1]).index_add_(0, found.text_image, text).sign()
        for place, view in enumerate(sorted(found.views)):
            known = text if len(found.views[view]) == len(text) else image
            generator = torch.Generator().manual_seed(place)
            found.views[view] = unit(known if everything else torch.randn(known.shape, generator=generator))
        return found

    return told


def config_of(tiny_config: Config, repeating: Path, **changes: Any) -> RunConfig:
    return tiny_config(data=str(repeating), batch_size=8, steps=2, **changes)


def figures(sections: dict[str, Any]) -> dict[str, float]:
    """Every recall of an evaluation by section and name."""
    found = {f"{part}/{name}": value for part in ("val", "test") for name, value in sections[part].items()}
    for third, swept in sections["combination"].items():
        found |= {
            f"{third}/{part}/{i}": value for part in ("val", "test") for i, value in enumerate(swept[part])
        }
    return found


def test_an_oracle_scores_one_in_evaluate_and_in_validation_while_training(
    tiny_config: Config, repeating: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (evaluation_module, loop):
        monkeypatch.setattr(module, "encode", knowing(True))
    train(config_of(tiny_config, repeating), tmp_path / "run")
    result = evaluate_run(tmp_path / "run")
    found = figures(result.sections)
    assert len(found) == 2 * 7 + 2 * 21 and set(found.values()) == {1.0}
    other = evaluate_run(tmp_path / "run", data=str(repeating / "train")).sections["test"]
    assert set(other.values()) == {1.0}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row[name] for row in rows for name in row if name.startswith("val/")} == {1.0}


def test_figures_by_the_plain_convention_and_the_share_are_written(
    tiny_config: Config, repeating: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_module, "encode", knowing(True))
    train(config_of(tiny_config, repeating, method="baseline", third=()), tmp_path / "run")
    result = evaluate_run(tmp_path / "run")
    assert (
        "retrieval on 28 test images, 100.0% of their captions repeated: image → text R@1 100.0%"
        in result.text()
    )
    written = json.loads((tmp_path / "run" / "evaluation.json").read_bytes())
    assert written["repeated_captions"] == {"val": 1.0, "test": 1.0}
    plain = written["clip_benchmark"][0]["metrics"]
    assert plain["image_retrieval_recall@1"] == 0.0, "an equal caption's image ties"
    assert plain["image_retrieval_recall@10"] == 1.0
    assert written["test"]["t2i_r@1"] == 1.0


def expected_recall(right: np.ndarray, k: int) -> float:
    """The chance that one right answer is among k drawn ones, mean over the rows."""
    return float(np.mean(1 - stats.hypergeom.pmf(0, right.shape[1], right.sum(1), k)))


def test_a_random_encoder_scores_chance() -> None:
    """At chance a query with more right answers finds one more often."""
    num_images, generator = 700, torch.Generator().manual_seed(0)
    captions = [f"thing {number}" for number in numbers(num_images)]
    captions += [f"place {number}" for number in numbers(num_images, 3)]
    owner = torch.arange(num_images).repeat(2)
    views = {
        name: unit(torch.randn(rows, 32, generator=generator)) for name, rows in (("img", 700), ("txt", 1400))
    }
    part = Encoded(views, owner, torch.arange(num_images), captions)
    found = evaluate(EvaluationData(test=part), "things", 0, num_images)[0].sections["test"]
    right = right_answers(owner, part.text_group, num_images)
    for k in (1, 5, 10):
        for name, answers in (("i2t", right), ("t2i", right.T)):
            expected = expected_recall(answers, k)
            # queries with equal captions succeed together: up to five answers for one draw
            slack = 4 * (expected * (1 - expected) * 5 / len(answers)) ** 0.5
            assert abs(found[f"{name}_r@{k}"] - expected) < slack, (name, k)


@pytest.mark.parametrize("everything", [True, False], ids=["oracle", "random"])
def test_compare_scores_an_oracle_one_and_a_random_encoder_chance(
    tiny_config: Config, repeating: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything: bool
) -> None:
    monkeypatch.setattr(evaluation_module, "encode", knowing(everything))
    config = replace(config_of(tiny_config, repeating), embeddings=None)
    options = CompareConfig(methods=("baseline", "lit", "3t"), seeds=(0,), lrs=(1e-3,))
    result = compare(config, options, tmp_path)
    assert result is not None
    found = [row for row in result["summary"] if row["metric"].endswith("_r@1")]
    assert {row["task"] for row in found} == {"retrieval", "combination", "control", "third"}
    shown = [
        [item["right"] for item in answer["items"]]
        for example in result["examples"]
        for answer in example["answers"]
    ]
    if everything:
        assert {row["mean"] for row in found} == {1.0}
        assert all(row["low"] == row["high"] == 1.0 for row in found if row["low"] is not None)
        assert all(items[0] and sum(items) >= 2 and items == sorted(items, reverse=True) for items in shown)
    else:
        chance = sum(size**2 for size in SIZES) / sum(SIZES) / 28  # of a caption that is drawn
        assert abs(np.mean([row["mean"] for row in found]) - chance) < 0.1
        assert not all(items[0] for items in shown)
    assert result["settings"]["repeated_captions"] == "validation 100.0%, test 100.0%"
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert re.search(r"captions that are equal to one of another image</dt><dd>validation 100.0%, test", page)


def test_examples_show_the_captions_of_their_images_where_images_repeat(
    tiny_config: Config, tmp_path: Path
) -> None:
    """Picture i has the captions `i 0`, `i 1` and `i 2`, each in a sample of its own."""
    (tmp_path / "photos").mkdir()
    for k in range(3):
        for i in range(5):
            (tmp_path / "photos" / f"{k}{i}.png").write_bytes(file_of(noise(9, 9, i), "PNG"))
            (tmp_path / "photos" / f"{k}{i}.txt").write_text(f"{i} {k}")
    config = tiny_config(data=str(tmp_path / "photos"), batch_size=2, method="baseline", third=())
    setup, source = assemble(config, tmp_path / "run"), open_source(str(tmp_path / "photos"))
    found = encode(setup.model, source, setup.tokenizer, {}, torch.device("cpu"))
    assert captions_of(source, found.index.tolist()) == found.captions
    save_features(tmp_path / "features.safetensors", EvaluationData(test=found), {})
    system = ("baseline", "", "baseline", load_file(tmp_path / "features.safetensors"))
    examples = showcase([system], source, source, tmp_path)["examples"]
    assert {example["direction"] for example in examples} == {"t2i", "i2t"}
    for example in examples:
        image, caption = example["truth"], example["query"]
        if example["direction"] == "i2t":
            image, caption = example["query_image"], example["truth"]
        assert re.search(r"test-(\d)\.png", image)[1] == caption[0]  # type: ignore[index]


def test_a_comparison_of_an_earlier_version_is_evaluated_again_and_not_trained(
    tiny_config: Config, repeating: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[Path] = []

    def counted(folder: Path) -> Any:
        evaluated.append(folder)
        return evaluate_run(folder)

    monkeypatch.setattr(compare_module, "evaluate_run", counted)
    config = replace(config_of(tiny_config, repeating, method="baseline", third=()), embeddings=None)
    options = CompareConfig(methods=("baseline",), seeds=(0,), lrs=(1e-3,))
    first = compare(config, options, tmp_path)
    (folder,) = evaluated
    compare(config, options, tmp_path)
    assert len(evaluated) == 1
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    file = folder / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 1, "test": {"mean_r@1": 0.0}}))
    again = compare(config, options, tmp_path)
    assert first is not None and again is not None and again["results"] == first["results"]
    assert len(evaluated) == 2 and (folder / "model.safetensors").stat().st_mtime_ns == weights


def test_validate_says_the_share_of_both_parts(tiny_config: Config, repeating: Path, tmp_path: Path) -> None:
    lines = list(validate(config_of(tiny_config, repeating, method="baseline", third=()), tmp_path / "run"))
    for part in ("validation", "test"):
        assert (
            f"{part} captions: 100.0% are equal to one of another image, and each of the images is right"
            in lines
        )
    assert repeated_captions(splits(str(repeating))[2]) == 1.0


# In a batch


def oracle_view(batch_images: Tensor, batch_captions: Tensor, text_thirds: bool) -> Callable[..., Tensor]:
    """Vectors of a batch that hold, by the modality of each view's row, which image or which captions they are of."""
    captions = torch.eye(len(batch_captions))[batch_captions.unique(return_inverse=True)[1]]
    own = (batch_images[:, None] == batch_images).float()
    described = unit((own @ captions).sign())  # an image: all captions that it has in the batch

    def view(self: ThreeTowers, name: str, feats: Any) -> Tensor:
        if tower_of(name) == "txt" or (tower_of(name) == "third" and text_thirds):
            return captions
        if "txt" in name or name == "img" or text_thirds:
            return described
        return unit(own)  # images that are compared with images

    return view


@pytest.mark.parametrize("text_thirds", [False, True])
def test_an_oracle_scores_one_in_the_log_of_training(
    tiny_config: Config, repeating: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_thirds: bool
) -> None:
    setup = assemble(config_of(tiny_config, repeating, embeddings=None), tmp_path / "run")
    setup.thirds.set_norms(setup.model, setup.train)
    batch = replace(setup.reader()[range(32)], bad=[])
    batch.image_ids[1] = batch.image_ids[0]  # an image that is drawn twice
    assert len(batch.caption_ids.unique()) < 24
    setup.model.text_thirds = ("third",) if text_thirds else ()
    zero = torch.zeros(())
    result = StepResult(zero, {}, {}, zero, batch)

    def logged() -> list[float]:
        found = step_metrics(setup.model, result, ALONE)
        return [value for name, value in found.items() if name.startswith("train/accuracy/")]

    with monkeypatch.context() as patch:
        patch.setattr(ThreeTowers, "view", oracle_view(batch.image_ids, batch.caption_ids, text_thirds))
        assert logged() == [1.0, 1.0, 1.0]
    seeds = iter(range(10))

    def random(self: ThreeTowers, name: str, feats: Any) -> Tensor:
        return unit(torch.randn(32, 8, generator=torch.Generator().manual_seed(next(seeds))))

    monkeypatch.setattr(ThreeTowers, "view", random)
    assert max(logged()) < 0.3


def test_equal_captions_are_right_for_each_others_images_and_not_for_any() -> None:
    """Captions 0 and 1 are equal, images 1 and 2 are; every sample but the third finds a partner that is right."""
    a, b = torch.eye(4), torch.eye(4)[[1, 0, 3, 2]]
    image_ids, caption_ids = torch.tensor([5, 6, 6, 7]), torch.tensor([8, 8, 9, 4])
    assert float(contrastive_accuracy(a, b)) == 0.0
    assert float(contrastive_accuracy(a, b, (image_ids, caption_ids))) == 0.5
    assert float(contrastive_accuracy(a, b, (image_ids, image_ids))) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32))
def test_without_repeats_the_accuracy_is_that_of_own_partners(num: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (unit(torch.randint(-1, 2, (num, 4), generator=generator).float()) for _ in range(2))
    ids = torch.randperm(50, generator=generator)
    scores, own = a @ b.T, torch.arange(num)
    expected = 0.5 * ((scores.argmax(1) == own).float().mean() + (scores.argmax(0) == own).float().mean())
    assert contrastive_accuracy(a, b) == contrastive_accuracy(a, b, (ids[:num], ids[-num:])) == expected

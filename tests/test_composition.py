"""Answers to choices: oracles, chance, ties, and the plain reference."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kit.pictures import picture
from kit.runs import Config
from threetowers.data.choices import UNREADABLE, ChoiceRow, ChoiceSet, Task, choice_set, open_choices
from threetowers.data.formats.files import FileSource
from threetowers.errors import DataError
from threetowers.evaluate import composition
from threetowers.evaluate.composition import CHANCE, Answers, answer
from threetowers.evaluate.encode import encode, encode_texts
from threetowers.evaluate.statistics import bootstrap_interval
from threetowers.objective.losses import unit
from threetowers.run.setup import assemble

TASKS = tuple(CHANCE)
every_task = pytest.mark.parametrize("task", TASKS)
WIDTH = 64
NUM_TEXTS = {"one_caption": 2, "two_captions": 3, "matching": 2}
NUM_IMAGES = {"one_caption": 1, "two_captions": 1, "matching": 2}


def random(rows: int, seed: int, width: int = WIDTH) -> Tensor:
    return unit(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def images(num: int) -> FileSource:
    source = FileSource("pictures", "pictures", "/nowhere")
    return source.fill((f"{i}.png", 100 + i, "", -1) for i in range(num))


def chosen_from(task: Task, num: int, *, shared: int = 1, categories: int = 3) -> ChoiceSet:
    """Choices with texts of their own, `shared` neighbours of which have the same images."""
    per = NUM_IMAGES[task]
    rows = [
        ChoiceRow(
            f"c{i % categories}/{i}",
            f"c{i % categories}",
            tuple(i // shared * per + k for k in range(per)),
            tuple(f"text {i} {k}" for k in range(NUM_TEXTS[task])),
        )
        for i in range(num)
    ]
    return choice_set("set", "some choices", task, rows, images(-(-num // shared) * per))


def oracle(choices: ChoiceSet) -> tuple[Tensor, Tensor]:
    """Of an encoder that knows what belongs together: an image is the sum of its right texts."""
    text = random(len(choices.texts), 0, 256)
    image = torch.zeros(len(choices.images), 256)
    for choice in choices.choices:
        if choices.task == "two_captions":  # right captions are alike
            first, second, _ = choice.texts
            text[second] = unit(text[first : first + 1] + 0.1 * text[second : second + 1])[0]
        if choices.task == "matching":
            image[list(choice.images)] += text[list(choice.texts)]
        else:
            image[choice.images[0]] += text[list(choice.texts[:-1])].sum(dim=0)
    return unit(image), text


@every_task
def test_an_encoder_that_knows_all_scores_one(task: Task) -> None:
    choices = chosen_from(task, 60, shared=2)
    answers = answer(choices, *oracle(choices))
    assert answers.metrics() == dict.fromkeys(CHANCE[task], 1.0)
    assert answers.by_category() == {f"c{i}": answers.metrics() for i in range(3)}


@every_task
def test_an_encoder_that_knows_nothing_scores_chance(task: Task) -> None:
    num = 4_000
    choices = chosen_from(task, num)
    answers = answer(choices, random(len(choices.images), 1), random(len(choices.texts), 2))
    for name, chance in CHANCE[task].items():
        assert abs(answers.metrics()[name] - chance) < 4 * (chance * (1 - chance) / num) ** 0.5, name


@every_task
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_encoder_that_gives_everything_the_same_vector_scores_zero(task: Task, dtype: torch.dtype) -> None:
    choices = chosen_from(task, 70)
    same = random(1, 3, width=33).to(dtype)
    for image, text in (
        (same.expand(len(choices.images), -1), same.expand(len(choices.texts), -1)),
        (random(len(choices.images), 4, 33).to(dtype), same.expand(len(choices.texts), -1)),
    ):
        answers = answer(choices, image, text)
        assert set(answers.metrics().values()) == {0.0}


def test_scores_that_differ_by_rounding_alone_are_ties() -> None:
    """The same numbers in another order have the same sum, but not in the last bits of fp64."""
    choices = chosen_from("one_caption", 200)
    right = random(200, 5).double() / 3  # whose sums are rounded
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))
    text = torch.stack([right, right[:, order]], dim=1).flatten(0, 1)
    image = torch.full((200, WIDTH), WIDTH**-0.5)
    assert answer(choices, image, text).metrics() == {"accuracy": 0.0}


def test_an_encoder_that_sees_words_but_not_their_order_scores_zero_on_winoground() -> None:
    """Its captions have the same words: a bag of words gives both the same vector."""
    rows = [ChoiceRow(f"{i}", "all", (2 * i, 2 * i + 1), (f"a {i} on b", f"b on a {i}")) for i in range(9)]
    choices = choice_set("set", "", "matching", rows, images(18))
    words = sorted({word for text in choices.texts for word in text.split()})
    bag = unit(torch.tensor([[float(text.split().count(word)) for word in words] for text in choices.texts]))
    answers = answer(choices, random(18, 0, len(words)), bag)
    assert set(answers.metrics().values()) == {0.0}


def test_chance_is_the_share_of_orders_of_the_scores() -> None:
    """Of scores that are independent and alike in distribution every order is equally probable."""
    orders = list(itertools.permutations(range(4)))

    def share(right: Callable[[tuple[int, ...]], bool]) -> float:
        return sum(map(right, orders)) / len(orders)

    # a, b, c, d: first image with both captions, second image with both captions
    found = {
        "text": share(lambda s: s[0] > s[1] and s[3] > s[2]),
        "image": share(lambda s: s[0] > s[2] and s[3] > s[1]),
        "group": share(lambda s: s[0] > s[1] and s[3] > s[2] and s[0] > s[2] and s[3] > s[1]),
    }
    assert CHANCE["matching"] == pytest.approx(found)
    three = share(lambda s: s[0] > s[2] and s[1] > s[2])
    assert CHANCE["two_captions"] == pytest.approx({"image_text": three, "text_only": three})
    assert CHANCE["one_caption"] == {"accuracy": share(lambda s: s[0] > s[1])}


def plain(choices: ChoiceSet, image: Tensor, text: Tensor) -> dict[str, list[bool]]:
    """The same answers, one choice and one score at a time."""
    found: dict[str, list[bool]] = {name: [] for name in CHANCE[choices.task]}
    for choice in choices.choices:
        pictures = [image[i].double() for i in choice.images]
        captions = [text[t].double() for t in choice.texts]
        score = [[float((p @ c).float()) for c in captions] for p in pictures]
        if choices.task == "one_caption":
            found["accuracy"].append(score[0][0] > score[0][1])
        elif choices.task == "two_captions":
            found["image_text"].append(min(score[0][:2]) > score[0][2])
            alike, *apart = (float((captions[a] @ captions[b]).float()) for a, b in ((0, 1), (0, 2), (1, 2)))
            found["text_only"].append(alike > max(apart))
        else:
            (a, b), (c, d) = score
            found["text"].append(a > b and d > c)
            found["image"].append(a > c and d > b)
            found["group"].append(min(a, d) > max(b, c))
    return found


@settings(max_examples=60, deadline=None)
@given(
    task=st.sampled_from(TASKS),
    num=st.integers(1, 23),
    shared=st.integers(1, 3),
    width=st.sampled_from([1, 2, 17]),
    seed=st.integers(0, 2**30),
    double=st.booleans(),
    block=st.sampled_from([1, 5, 4_096]),
    levels=st.sampled_from([0, 2]),
)
def test_answers_equal_the_plain_reference(
    task: Task, num: int, shared: int, width: int, seed: int, double: bool, block: int, levels: int
) -> None:
    """In any block size, with one choice, in fp32 and fp64, and with ties (`levels`: few different values)."""
    choices = chosen_from(task, num, shared=shared)
    image, text = random(len(choices.images), seed, width), random(len(choices.texts), seed + 1, width)
    if levels:
        image, text = (image * levels).round() / levels, (text * levels).round() / levels
    if double:
        image, text = image.double(), text.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composition, "BLOCK", block)
        answers = answer(choices, image, text)
    assert {name: hits.tolist() for name, hits in answers.hits.items()} == plain(choices, image, text)
    assert answers.ids == [choice.id for choice in choices.choices]


def test_categories_and_means() -> None:
    """Two of three choices of a category are right, and none of the other's one."""
    rows = [ChoiceRow(f"{i}", "ab"[i == 3], (i,), (f"right {i}", f"wrong {i}")) for i in range(4)]
    choices = choice_set("set", "", "one_caption", rows, images(4))
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(4, 1)
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    answers = answer(choices, image, text)
    assert answers.metrics() == {"accuracy": 0.5}
    assert answers.by_category() == {"a": {"accuracy": pytest.approx(2 / 3)}, "b": {"accuracy": 0.0}}
    assert answers.category_mean() == {"accuracy": pytest.approx(1 / 3)}


def test_a_choice_without_a_difference_counts_as_wrong() -> None:
    rows = [ChoiceRow("0", "a", (0,), ("a cat", "a cat")), ChoiceRow("1", "a", (0,), ("a cat", "a dog"))]
    choices = choice_set("set", "", "one_caption", rows, images(1))
    answers = answer(choices, torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert answers.hits["accuracy"].tolist() == [False, True]
    assert [problem.reason for problem in answers.problems] == ["equal captions"]


def test_choices_that_share_an_image_are_one_group() -> None:
    rows = [
        ChoiceRow(f"{i}", "all", pair, (f"a {i}", f"b {i}"))
        for i, pair in enumerate([(0, 1), (2, 3), (4, 1), (5, 4), (6, 7)])
    ]
    choices = choice_set("set", "", "matching", rows, images(8))
    assert answer(choices, random(8, 0), random(10, 1)).groups.tolist() == [0, 1, 0, 0, 4]
    choices = chosen_from("one_caption", 6, shared=2)
    assert answer(choices, random(3, 0), random(12, 1)).groups.tolist() == [0, 0, 2, 2, 4, 4]


def test_a_bootstrap_draws_choices_of_an_image_together() -> None:
    """Ten choices an image that all agree are one observation: the interval is wide."""
    choices = chosen_from("one_caption", 400, shared=10)
    right = torch.arange(40) % 2 == 0
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(400, 1)
    image = torch.stack([right.float(), (~right).float()], dim=1)
    answers = answer(choices, image, text)
    hits = answers.hits["accuracy"]
    together = bootstrap_interval(hits, images=answers.groups)
    alone = bootstrap_interval(hits)
    assert together.mean == alone.mean == 0.5 and (together.num, alone.num) == (40, 400)
    assert together.high - together.low > 2.5 * (alone.high - alone.low)


def test_a_choice_whose_image_has_no_features_is_left_out_and_listed() -> None:
    choices = chosen_from("matching", 5)
    image, text = random(10, 0), random(10, 1)
    whole = answer(choices, image, text)
    order = torch.tensor([9, 8, 0, 2, 1, 4, 5])  # image 3 has none, and 6 and 7
    answers = answer(choices, image[order], text, index=order)
    assert [choice.split("/")[1] for choice in answers.ids] == ["0", "2", "4"]
    assert [(problem.id, problem.reason, problem.detail) for problem in answers.problems] == [
        ("c1/1", UNREADABLE, "3.png"), ("c0/3", UNREADABLE, "6.png"),
    ]  # fmt: skip
    for name, hits in answers.hits.items():
        assert hits.tolist() == whole.hits[name][[0, 2, 4]].tolist()


@pytest.mark.parametrize(
    ("image", "text", "index", "message"),
    [
        (random(3, 0), random(12, 0), None, "6 images have 3 rows"),
        (random(6, 0), random(11, 0), None, "12 texts have 11 rows"),
        (random(6, 0), random(12, 0, 5), None, "image features are 64 wide and text features 5"),
        (random(6, 0), random(12, 0), [0, 1], "2 entries of `index` have 6 rows"),
        (random(2, 0), random(12, 0), [0, 6], "each from 0 to 5"),
        (random(2, 0), random(12, 0), [1, 1], "must name different images"),
        (
            torch.full((6, 64), torch.nan),
            random(12, 0),
            None,
            "set: image features: 6 of 6 rows are not finite",
        ),
        (random(6, 0), random(12, 0) / 0, None, "set: text features: 12 of 12 rows are not finite"),
    ],
)
def test_features_that_do_not_fit_are_data_errors(
    image: Tensor, text: Tensor, index: list[int] | None, message: str
) -> None:
    choices = chosen_from("one_caption", 6)
    with pytest.raises(DataError, match=message):
        answer(choices, image, text, None if index is None else torch.tensor(index))


def test_no_choice_that_is_left_is_a_data_error() -> None:
    choices = chosen_from("matching", 2)
    with pytest.raises(DataError, match="none of its 2 choices has all its images"):
        answer(choices, random(1, 0), random(4, 1), torch.tensor([0]))


@pytest.mark.parametrize("merge", [True, False])
def test_a_model_answers_choices_from_disk(merge: bool, tiny_config: Config, tmp_path: Path) -> None:
    """With the evaluators' own encoding; one image cannot be decoded, and two files are the same image."""
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number % 3))
    (tmp_path / "1.png").write_bytes(b"no image")
    rows = {
        f"{i}": {"filename": f"{i}.png", "caption": f"a {i}", "negative_caption": f"b {i}"} for i in range(4)
    }
    (tmp_path / "swap_att.json").write_text(json.dumps(rows))
    choices = open_choices(tmp_path / "swap_att.json")
    setup = assemble(tiny_config(), tmp_path / "run")
    device = torch.device("cpu")
    encoded = encode(setup.model, choices.images, setup.tokenizer, {}, device, merge=merge)
    text = encode_texts(setup.model, list(choices.texts), setup.tokenizer, device)
    answers: Answers = answer(choices, encoded.views["img"], text, encoded.index)
    assert answers.ids == ["swap_att/0", "swap_att/2", "swap_att/3"]
    assert [problem.id for problem in answers.problems] == ["swap_att/1"]
    assert answers.groups.tolist() == [0, 1, 0]
    image = encoded.views["img"][[encoded.index.tolist().index(i) for i in (0, 2)]]
    expected = [
        bool(image[row] @ text[2 * number] > image[row] @ text[2 * number + 1])
        for row, number in ((0, 0), (1, 2), (0, 3))
    ]
    assert answers.hits["accuracy"].tolist() == expected
    assert isinstance(answers.hits["accuracy"], np.ndarray)

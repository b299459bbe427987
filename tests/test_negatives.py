"""Wrong captions of the built-in world: false, in the grammar, and not to be told from right ones by their text."""

import itertools
import json
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from threetowers.data.decode import decode
from threetowers.errors import DataError, UsageError
from threetowers.world import negatives as module
from threetowers.world.captions import captions
from threetowers.world.negatives import CATEGORIES, Negative, hard_negatives, open_negatives
from threetowers.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    NEW_IN_TEST,
    NEW_IN_VAL,
    SHAPES,
    SIZES,
    SPLITS,
    SYNONYMS,
    TEXTURES,
    Split,
    scenes,
)
from threetowers.world.write import write_world

NUM = 3_000
PLAIN = {synonym: word for word, synonym in SYNONYMS.items()}
EXCHANGES = ("swap_colour", "swap_texture", "swap_size", "swap_relation")
every_category = pytest.mark.parametrize("category", CATEGORIES)


@cache
def found(split: Split = "test", num: int = NUM, seed: int = 0) -> list[Negative]:
    return hard_negatives(seed, np.arange(num), split=split)


def of(category: str, split: Split = "test") -> list[Negative]:
    return [each for each in found(split) if each.category == category]


# The grammar once more, as a parser: what a caption says, and nothing but what the world's captions can say.


def one_of(words: tuple[str, ...]) -> str:
    return "|".join(f"{word}|{SYNONYMS[word]}" if word in SYNONYMS else word for word in words)


NOUN = (
    r"(?:a|an)(?: (?P<size{n}>" + one_of(SIZES) + r"))?"
    r"(?: (?P<texture{n}>" + one_of(TEXTURES) + r"))?(?: (?P<colour{n}>" + one_of(COLOURS) + r"))?"
    r"(?: (?P<late{n}>" + one_of(TEXTURES) + r"))? (?P<shape{n}>" + one_of(SHAPES) + r")"
)
A, B = NOUN.replace("{n}", "0"), NOUN.replace("{n}", "1")
BG = f"(?P<bg>{'|'.join(BACKGROUNDS)})"
REL = "(?P<rel>(?:to the )?left of|(?:to the )?right of|above|over|below|under)"
AT = "(?P<at>to its right|to its left|below it|above it)"
GRAMMAR = [
    re.compile(form)
    for form in (
        f"{A} on {BG}", f"on {BG} there is {A}", f"a picture of {A} on {BG}",
        f"(?P<single>a single shape) on {BG} and it is {A}",
        f"a picture with {BG} and {A}", f"there is {A}",
        f"{A} {REL} {B} on {BG}", f"on {BG} {A} {REL} {B}", f"{A} on {BG} with {B} {AT}",
        f"a picture of {A} {REL} {B} on {BG}", f"there is {A} {REL} {B} on {BG}", f"{A} with {B} {AT}",
        f"a pair of shapes (?:side by side|stacked) on {BG} with {A} {REL} {B}",
    )
]  # fmt: skip
FIRST = {
    "left of": (1, 0),
    "right of": (1, 1),
    "above": (2, 0),
    "over": (2, 0),
    "below": (2, 1),
    "under": (2, 1),
}
SECOND = {"to its right": (1, 0), "to its left": (1, 1), "below it": (2, 0), "above it": (2, 1)}
"""The layout, and whether the object that is named first is the second one of the scene."""


def claims(caption: str) -> dict[str, object]:
    """What a caption says: layout, background and, by place, the words of its objects. Fails outside the grammar."""
    matches = [match for form in GRAMMAR if (match := form.fullmatch(caption))]
    assert len(matches) == 1, caption
    groups = {name: value for name, value in matches[0].groupdict().items() if value is not None}
    said: dict[str, object] = {"background": groups["bg"]} if "bg" in groups else {}
    swapped = 0
    if "rel" in groups:
        said["layout"], swapped = FIRST[groups["rel"].removeprefix("to the ")]
    elif "at" in groups:
        said["layout"], swapped = SECOND[groups["at"]]
    elif "single" in groups:
        said["layout"] = 0
    for name, value in groups.items():
        if name[-1] in "01":
            place = int(name[-1]) ^ swapped
            assert name[:-1] != "late" or f"texture{name[-1]}" not in groups, caption
            said[f"{'texture' if name[:-1] == 'late' else name[:-1]} {place}"] = PLAIN.get(value, value)
    return said


def shown(split: Split, scene: int) -> dict[str, object]:
    """What a scene shows, in the same words."""
    content = scenes(0, np.array([scene]), split=split)
    layout = int(content.layout[0])
    there: dict[str, object] = {"layout": layout, "background": BACKGROUNDS[content.background[0]]}
    lists = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES}
    for name, words in lists.items():
        for place in range(1 if layout == 0 else 2):
            there[f"{name} {place}"] = words[getattr(content, name)[0, place]]
    return there


def true(caption: str, split: Split, scene: int) -> bool:
    there = shown(split, scene)
    return all(there.get(about) == what for about, what in claims(caption).items())


@pytest.mark.parametrize("split", SPLITS)
def test_right_captions_are_those_of_the_world_and_true_and_wrong_ones_are_false(split: Split) -> None:
    written = captions(0, np.arange(NUM), split=split)
    for each in found(split)[::7]:
        assert each.caption in written[each.scene]
        assert each.category == "change_count" or each.caption == written[each.scene][0]
        assert true(each.caption, split, each.scene), each
        assert not true(each.negative, split, each.scene), each


@pytest.mark.parametrize("split", SPLITS)
def test_wrong_captions_are_of_scenes_that_the_split_can_have(split: Split) -> None:
    """Their grammar is the world's, and no pair of colour and shape is new to the split."""
    never = {"train": {*NEW_IN_VAL, *NEW_IN_TEST}, "val": {*NEW_IN_TEST}, "test": set()}[split]
    seen = set()
    for each in found(split):
        said = claims(each.negative)
        pairs = [(said.get(f"colour {place}"), said.get(f"shape {place}")) for place in range(2)]
        assert not set(pairs) & never
        assert None in pairs[1] or pairs[0] != pairs[1], "a scene never shows a pair twice"
        seen |= set(pairs)
    assert never or set(NEW_IN_TEST) <= seen, "nothing is left out that a split can have"


@pytest.mark.parametrize("field", ["colour", "texture", "size"])
def test_an_exchange_of_equal_attributes_is_left_out_and_no_other(field: str) -> None:
    content = scenes(0, np.arange(NUM), split="test")
    values = getattr(content, field)
    differ = (content.layout > 0) & (values[:, 0] != values[:, 1])
    assert [each.scene for each in of(f"swap_{field}")] == np.flatnonzero(differ).tolist()


def test_every_scene_has_the_changes_that_it_can_have() -> None:
    layout = scenes(0, np.arange(NUM), split="test").layout
    assert [each.scene for each in of("change_colour")] == list(range(NUM))
    assert [each.scene for each in of("swap_relation")] == np.flatnonzero(layout).tolist()
    assert sum(layout[each.scene] == 0 for each in of("change_count")) == (layout == 0).sum()


@every_category
def test_what_is_said_to_change_changes_and_nothing_else(category: str) -> None:
    for each in of(category)[::5]:
        right, wrong = claims(each.caption), claims(each.negative)
        differing = {about for about in right.keys() | wrong.keys() if right.get(about) != wrong.get(about)}
        if category == "change_count":
            assert {right["layout"] == 0, wrong["layout"] == 0} == {True, False}
            assert "background" not in differing
            alone, both = (right, wrong) if right["layout"] == 0 else (wrong, right)
            thing = {about[:-2]: what for about, what in alone.items() if about[-1] == "0"}
            kept = [{a[:-2]: what for a, what in both.items() if a[-1] == place} for place in "01"]
            assert any(thing.items() <= other.items() or other.items() <= thing.items() for other in kept), (
                each
            )
            continue
        words = [text.split() for text in (each.caption, each.negative)]
        changed = [pair for pair in zip(*words, strict=True) if pair[0] != pair[1]]
        if category == "swap_relation":
            opposite = {"left": "right", "above": "below", "over": "under"}
            opposite |= {wrong: right for right, wrong in opposite.items()}
            assert [opposite[first] for first, _ in changed] == [second for _, second in changed]
            assert len(changed) == 1
        elif category == "change_colour":
            assert len(changed) == 1 and set(changed[0]) <= set(COLOURS)
        else:
            field = category.removeprefix("swap_")
            assert differing == {f"{field} 0", f"{field} 1"} and len(changed) == 2
            assert (right[f"{field} 0"], right[f"{field} 1"]) == (wrong[f"{field} 1"], wrong[f"{field} 0"])


@pytest.mark.parametrize("category", EXCHANGES)
def test_the_same_change_leads_back(category: str) -> None:
    """An exchange is its own inverse: a scene and the one that is described wrongly take each other's part."""
    change, u = module._CHANGES[category], [0.0] * 5
    for scene in module._scenes(0, np.arange(300), "test"):
        other = change(scene, "test", u)
        if other is not None:
            again = change(other, "test", u)
            assert again is not None and again.captions() == scene.captions()


# What a model of texts alone could use: words, lengths, and what it has learnt from the world's captions.


def within_chance(right: float, num: int) -> bool:
    return abs(right - num / 2) < 4 * math.sqrt(num) / 2


@every_category
def test_right_and_wrong_captions_have_the_same_words_and_lengths(category: str) -> None:
    pairs = [(each.caption.split(), each.negative.split()) for each in of(category)]
    assert {word for right, _ in pairs for word in right} == {word for _, wrong in pairs for word in wrong}
    if category != "change_count":
        assert all(len(right) == len(wrong) for right, wrong in pairs)
    if category == "swap_colour":
        assert all(Counter(right) == Counter(wrong) for right, wrong in pairs)
    assert within_chance(
        sum((len(right) > len(wrong)) + 0.5 * (len(right) == len(wrong)) for right, wrong in pairs),
        len(pairs),
    )


@every_category
def test_a_model_of_the_worlds_captions_is_right_by_chance(category: str) -> None:
    """A bigram model that has read the training captions, which lack six of the pairs that test scenes have."""
    follow: Counter[tuple[str, str]] = Counter()
    begin: Counter[str] = Counter()
    for five in captions(0, np.arange(4_000)):
        for text in five:
            words = ["<", *text.split(), ">"]
            follow.update(itertools.pairwise(words))
            begin.update(words[:-1])

    def surprise(text: str) -> float:
        words = ["<", *text.split(), ">"]
        pairs = itertools.pairwise(words)
        return sum(math.log((follow[pair] + 0.1) / (begin[pair[0]] + 10)) for pair in pairs)

    difference = np.array([surprise(each.caption) - surprise(each.negative) for each in of(category)])
    assert within_chance((difference > 0).sum() + 0.5 * (difference == 0).sum(), len(difference))


@every_category
def test_a_model_that_has_learnt_from_such_choices_is_right_by_chance(category: str) -> None:
    """The words and neighbouring words that are more frequent in right captions of one half, tried on the other."""

    def features(text: str) -> list[str]:
        words = ["<", *text.split(), ">"]
        return [*words, *map(" ".join, itertools.pairwise(words))]

    items = of(category)
    learnt, tried = items[::2], items[1::2]
    right = Counter(feature for each in learnt for feature in features(each.caption))
    wrong = Counter(feature for each in learnt for feature in features(each.negative))

    def score(text: str) -> float:
        return sum(math.log((right[feature] + 1) / (wrong[feature] + 1)) for feature in features(text))

    difference = np.array([score(each.caption) - score(each.negative) for each in tried])
    assert within_chance((difference > 1e-9).sum() + 0.5 * (abs(difference) <= 1e-9).sum(), len(tried))


def test_the_same_scenes_have_the_same_wrong_captions() -> None:
    some = hard_negatives(0, np.arange(50, 90), split="test")
    alone = {(each.scene, each.category): each for each in found("test")}
    same = [each for each in some if each.category != "change_count"]
    assert len(same) > 100 and all(alone[each.scene, each.category] == each for each in same)
    assert found("test", 50, 1) != found("test", 50, 0)
    assert hard_negatives(0, np.arange(0)) == []


def test_a_world_on_disk_has_its_choices(tmp_path: Path) -> None:
    write_world(tmp_path / "shapes", seed=5, size=16, num_train=1, num_val=1, num_test=40, kinds=("pairs",))
    choices = open_negatives(tmp_path / "shapes")
    expected = hard_negatives(5, np.arange(40), split="test")
    assert choices.task == "one_caption" and not choices.problems
    assert [choice.category for choice in choices.choices] == [each.category for each in expected]
    for choice, each in zip(choices.choices, expected, strict=True):
        assert [choices.texts[text] for text in choice.texts] == [each.caption, each.negative]
        (image,) = choice.images
        record = choices.images.record(image)
        assert each.caption in record.captions
        assert decode(choices.images.image(image), record.id).size == (16, 16)
    assert len({choice.id for choice in choices.choices}) == len(choices)
    assert choices.fingerprint == open_negatives(tmp_path / "shapes").fingerprint


def test_a_folder_that_is_no_such_world_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no shapes world"):
        open_negatives(tmp_path)
    write_world(tmp_path / "shapes", seed=5, size=16, num_train=1, num_val=1, num_test=9, kinds=("pairs",))
    about = json.loads((tmp_path / "shapes" / "world.json").read_bytes())
    for change, message in (
        ({"seed": 6}, "has other captions than the world of seed 6"),
        ({"version": 1}, "not of"),
    ):
        (tmp_path / "shapes" / "world.json").write_text(json.dumps(about | change))
        with pytest.raises(DataError, match=message):
            open_negatives(tmp_path / "shapes")
    with pytest.raises(UsageError, match="no kind"):
        hard_negatives(0, np.arange(3), split="dev")  # type: ignore[arg-type]

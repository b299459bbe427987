"""Choice tasks from disk: the published layouts, and every row that cannot be used."""

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.pictures import picture
from threetowers.data.choices import CHOICE_REASONS, ChoiceSet, open_choices
from threetowers.data.decode import decode
from threetowers.errors import DataError

Row = dict[str, Any]
NUM = 4
"""Rows that each example has."""


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number))


def coco(folder: Path) -> None:
    put(folder / "val2017", *(f"{i:012d}.jpg" for i in range(NUM)))


def row_of(number: int, **more: str) -> Row:
    """A row of SugarCrepe; rows 0 and 3 have the same image."""
    return {
        "filename": f"{number % 3:012d}.jpg",
        "caption": f"a cat {number} on a mat",
        "negative_caption": f"a mat {number} on a cat",
    } | more


def write(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


# Each example writes a set below the folder, some of whose rows `change` alters, and returns what to open.

Change = Callable[[list[Row]], None]


def unchanged(rows: list[Row]) -> None:
    """The rows as published."""


def sugarcrepe(folder: Path, change: Change = unchanged) -> Path:
    coco(folder)
    rows = [row_of(i) for i in range(NUM)]
    change(rows)
    write(folder / "data" / "swap_att.json", {str(i): row for i, row in enumerate(rows)})
    return write(folder / "data" / "add_obj.json", {"0": row_of(0)}).parent


def sugarcrepe_pp(folder: Path, change: Change = unchanged) -> Path:
    coco(folder)
    rows = [{"id": i} | row_of(i, caption2=f"a mat below cat {i}") for i in range(NUM)]
    change(rows)
    return write(folder / "data" / "swap_obj.json", rows)


def winoground(folder: Path, change: Change = unchanged) -> Path:
    put(folder / "wino" / "images", *(f"ex_{i}_img_{k}.png" for i in range(NUM) for k in range(2)))
    rows: list[Row] = [
        {
            "id": i, "image_0": f"ex_{i}_img_0", "image_1": f"ex_{i}_img_1",
            "caption_0": f"a cat {i} on a mat", "caption_1": f"a mat {i} on a cat",
            "tag": "Noun", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": ("Object", "Relation")[i % 2],
        }
        for i in range(NUM)
    ]  # fmt: skip
    change(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "wino" / "examples.jsonl").write_text(lines, encoding="utf-8")
    return folder / "wino"


EXAMPLES = (sugarcrepe, sugarcrepe_pp, winoground)
Example = Callable[..., Path]
every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)


def reasons(choices: ChoiceSet) -> Counter[str]:
    return Counter(problem.reason for problem in choices.problems)


def texts(choices: ChoiceSet, number: int) -> list[str]:
    return [choices.texts[text] for text in choices.choices[number].texts]


def files(choices: ChoiceSet, number: int) -> list[str]:
    return [choices.images.record(image).id for image in choices.choices[number].images]


def test_sugarcrepe_has_a_file_for_each_category(tmp_path: Path) -> None:
    choices = open_choices(sugarcrepe(tmp_path))
    assert choices.task == "one_caption" and choices.name == "data"
    assert [choice.id for choice in choices.choices] == [
        "add_obj/0", "swap_att/0", "swap_att/1", "swap_att/2", "swap_att/3",
    ]  # fmt: skip
    assert texts(choices, 2) == ["a cat 1 on a mat", "a mat 1 on a cat"]
    assert files(choices, 1) == files(choices, 4) == ["000000000000.jpg"]
    assert len(choices.images) == 3 and len(choices.texts) == 2 * NUM, "equal ones are there once"
    assert choices.layout == "SugarCrepe, 5 choices in 2 categories"


def test_sugarcrepe_pp_has_two_right_captions(tmp_path: Path) -> None:
    choices = open_choices(sugarcrepe_pp(tmp_path), images=tmp_path / "val2017")
    assert choices.task == "two_captions" and {choice.category for choice in choices.choices} == {"swap_obj"}
    assert texts(choices, 1) == ["a cat 1 on a mat", "a mat below cat 1", "a mat 1 on a cat"]
    assert choices.layout == "SugarCrepe++, 4 choices in 1 category"


def test_winoground_has_two_images_and_two_captions(tmp_path: Path) -> None:
    folder = winoground(tmp_path)
    choices = open_choices(folder)
    assert choices.task == "matching" and choices.name == "wino"
    assert files(choices, 3) == ["ex_3_img_0.png", "ex_3_img_1.png"]
    assert texts(choices, 3) == ["a cat 3 on a mat", "a mat 3 on a cat"]
    assert [choice.category for choice in choices.choices] == ["Object", "Relation"] * 2
    assert open_choices(folder / "examples.jsonl").fingerprint == choices.fingerprint


@pytest.mark.parametrize("ending", ["jpg", "PNG"])
def test_winoground_images_can_have_another_ending_or_place(ending: str, tmp_path: Path) -> None:
    folder = winoground(tmp_path)
    for image in (folder / "images").iterdir():
        image.rename(image.with_suffix(f".{ending}"))
    (folder / "images").rename(tmp_path / "pictures")
    choices = open_choices(folder, images=tmp_path / "pictures")
    assert len(choices) == NUM and files(choices, 0)[0] == f"ex_0_img_0.{ending}"


def test_of_two_images_of_a_name_the_published_png_is_taken(tmp_path: Path) -> None:
    folder = winoground(tmp_path)
    put(folder / "images", "ex_0_img_0.jpg")
    assert files(open_choices(folder), 0) == ["ex_0_img_0.png", "ex_0_img_1.png"]


@every_example
def test_a_set_keeps_its_contract(example: Example, tmp_path: Path) -> None:
    choices = open_choices(example(tmp_path))
    assert not choices.problems and len(choices) == len(choices.choices)
    assert len({choice.id for choice in choices.choices}) == len(choices)
    assert len(set(choices.texts)) == len(choices.texts)
    num_images, num_texts = {"one_caption": (1, 2), "two_captions": (1, 3), "matching": (2, 2)}[choices.task]
    for choice in choices.choices:
        assert (len(choice.images), len(choice.texts)) == (num_images, num_texts)
    assert {image for choice in choices.choices for image in choice.images} == set(range(len(choices.images)))
    assert {text for choice in choices.choices for text in choice.texts} == set(range(len(choices.texts)))
    for image in range(len(choices.images)):
        record = choices.images.record(image)
        assert decode(choices.images.image(image), record.id).mode == "RGB" and not record.captions
    copy = pickle.loads(pickle.dumps(choices))
    assert (copy.choices, copy.texts, copy.fingerprint) == (
        choices.choices,
        choices.texts,
        choices.fingerprint,
    )


@every_example
def test_the_fingerprint_changes_with_the_content(example: Example, tmp_path: Path) -> None:
    def other_text(rows: list[Row]) -> None:
        rows[1]["caption" if "caption" in rows[1] else "caption_0"] += "!"

    def other_order(rows: list[Row]) -> None:
        rows.reverse()

    def other_choice(rows: list[Row]) -> None:
        """The same images and captions, chosen from otherwise."""
        rows[3].update(
            {"filename": rows[1]["filename"]} if "filename" in rows[3] else {"collapsed_tag": "Both"}
        )

    changes = [unchanged, unchanged, other_text, other_order, other_choice]
    prints = [
        open_choices(example(tmp_path / str(place), change)).fingerprint
        for place, change in enumerate(changes)
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 4


def lacking(key: str) -> Change:
    return lambda rows: rows[1].pop(key)


def having(key: str, value: object) -> Change:
    return lambda rows: rows[1].update({key: value})


def keys_of(example: Example) -> tuple[list[str], list[str]]:
    """The keys of images and of captions."""
    if example is winoground:
        return ["image_0", "image_1"], ["caption_0", "caption_1"]
    return ["filename"], ["caption", "negative_caption", *(["caption2"] if example is sugarcrepe_pp else [])]


OF_IMAGES: list[tuple[Callable[[str], Change], str]] = [
    (lacking, "no path"),
    (lambda key: having(key, 7), "no path"),
    (lambda key: having(key, "gone.jpg"), "missing file"),
]
OF_CAPTIONS: list[tuple[Callable[[str], Change], str]] = [
    (lacking, "no caption"),
    (lambda key: having(key, None), "no caption"),
    (lambda key: having(key, " "), "empty caption"),
]
DEFECTS = [
    (example, key, change(key), reason)
    for example in EXAMPLES
    for keys, defects in zip(keys_of(example), (OF_IMAGES, OF_CAPTIONS), strict=True)
    for key in keys
    for change, reason in defects
]


@pytest.mark.parametrize(("example", "key", "change", "reason"), DEFECTS)
def test_a_row_that_cannot_be_used_is_listed(
    example: Example, key: str, change: Change, reason: str, tmp_path: Path
) -> None:
    """With the file, the row and the key; the others are used."""
    whole = open_choices(example(tmp_path / "good"))
    choices = open_choices(example(tmp_path / "bad", change))
    assert len(choices) == len(whole) - 1
    (problem,) = choices.problems
    assert problem.reason == reason and problem.reason in CHOICE_REASONS
    assert problem.id in ("swap_att.json:1", "swap_obj.json:1", "examples.jsonl:2")
    assert f"`{key}`" in problem.detail
    assert [choice for choice in whole.choices if choice.id not in {each.id for each in choices.choices}]


@every_example
def test_a_wrong_caption_that_equals_the_right_one_is_used_and_listed(
    example: Example, tmp_path: Path
) -> None:
    """As some of SugarCrepe++ do. Published figures count them, and no model can be right."""

    def change(rows: list[Row]) -> None:
        right, wrong = keys_of(example)[1][:2]
        rows[1][wrong] = f"  {rows[1][right]} "

    choices = open_choices(example(tmp_path, change))
    assert len(choices) == len(open_choices(example(tmp_path / "good")))
    assert reasons(choices) == {"equal captions": 1}
    if example is sugarcrepe_pp:  # two right captions may be equal
        alike = open_choices(example(tmp_path / "alike", having("caption2", row_of(1)["caption"])))
        assert not alike.problems


def test_captions_that_are_not_utf8_are_used_and_listed(tmp_path: Path) -> None:
    file = sugarcrepe_pp(tmp_path)
    file.write_bytes(file.read_bytes().replace(b"a cat 2 on", b"a c\xe4t 2 on"))
    choices = open_choices(file)
    assert len(choices) == NUM and reasons(choices) == {"caption is not UTF-8": 1}


def test_an_id_that_is_given_twice_is_listed(tmp_path: Path) -> None:
    def change(rows: list[Row]) -> None:
        rows[1]["id"] = 0

    choices = open_choices(winoground(tmp_path, change))
    assert len(choices) == NUM - 1 and reasons(choices) == {"id given twice": 1}
    file = sugarcrepe(tmp_path / "crepe") / "swap_att.json"
    file.write_text(file.read_text().replace('"1": {', '"0": {'))
    choices = open_choices(file)
    assert len(choices) == NUM - 1 and reasons(choices) == {"id given twice": 1}
    assert choices.problems[0].id == "swap_att.json:0"
    assert texts(choices, 0)[0] == "a cat 1 on a mat"


def test_rows_that_are_no_objects_are_listed(tmp_path: Path) -> None:
    file = sugarcrepe_pp(tmp_path)
    file.write_text(file.read_text().replace("[", '[7, null, "x", ', 1))
    choices = open_choices(file)
    assert len(choices) == NUM and reasons(choices) == {"damaged json": 3}
    folder = winoground(tmp_path)
    with (folder / "examples.jsonl").open("a") as lines:
        lines.write('{"id": 9, "ima\n[]\n')
    assert reasons(open_choices(folder)) == {"damaged json": 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "there are no choices"),
        (lambda folder: folder, "there are no choices"),
        (lambda folder: write(folder / "x.json", {"annotations": [], "images": []}), "has a `negative_caption`"),
        (lambda folder: write(folder / "x.json", 3), "has a `negative_caption`"),
        (lambda folder: write(folder / "x.json", {"0": row_of(0)}), "none of its images was found, for example 0000"),
        (lambda folder: write(folder / "x.json", {"0": {"negative_caption": "x"}}), "none of its images was found"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_choices_is_a_data_error(
    make: Callable[[Path], Path], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # images are looked for there too
    with pytest.raises(DataError, match=message):
        open_choices(make(tmp_path))


def test_damaged_mixed_and_empty_sets_are_data_errors(tmp_path: Path) -> None:
    folder = sugarcrepe(tmp_path)
    with pytest.raises(DataError, match="no such folder of images"):
        open_choices(folder, images=tmp_path / "none")
    write(tmp_path / "b.json", {"0": row_of(0, caption=""), "1": row_of(1, caption="nan")})
    with pytest.raises(
        DataError, match=r"no choice can be used. empty caption: 2(.|\n)* b.json:1.*`caption`"
    ):
        open_choices(tmp_path / "b.json")
    write(folder / "swap_obj.json", [row_of(0, caption2="on a mat a cat")])
    with pytest.raises(DataError, match=r"swap_obj\.json has `caption2`, as in SugarCrepe"):
        open_choices(folder)
    (folder / "swap_obj.json").write_text('{"0": ')
    with pytest.raises(DataError, match="no JSON, or a damaged one"):
        open_choices(folder)
    with pytest.raises(DataError, match="cannot be read"):
        open_choices(tmp_path / "examples.jsonl")


def test_equal_images_under_two_names_have_one_image_id(tmp_path: Path) -> None:
    folder = winoground(tmp_path)
    (folder / "images" / "ex_2_img_1.png").write_bytes((folder / "images" / "ex_0_img_0.png").read_bytes())
    images = open_choices(folder).images
    ids = [record.image_id or record.id for record in map(images.record, range(len(images)))]
    assert len(ids) == 2 * NUM and len(set(ids)) == 2 * NUM - 1


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["0", "1", "filename", "caption", "caption2", "negative_caption", "images"])
            | st.text(max_size=2),
            inner | st.sampled_from(["a.png", "b.png", "a cat", "a mat"]),
            max_size=5,
        )
    ),
    max_leaves=20,
)


CELLS = st.sampled_from(["a.png", "b", "c.png", "a cat", "a mat", "", "nan"]) | st.integers() | st.none()
ROWS = st.dictionaries(
    st.sampled_from(["filename", "caption", "caption2", "negative_caption"]), CELLS, min_size=3
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=JSON | st.lists(ROWS | JSON) | st.dictionaries(st.text(max_size=3), ROWS | JSON))
def test_any_document_is_read_in_full_or_refused(document: Any, tmp_path: Path) -> None:
    """Every row becomes a choice or a problem, and no document raises anything but a DataError."""
    put(tmp_path / "images", "a.png", "b.png")
    file = write(tmp_path / "x.json", document)
    try:
        choices = open_choices(file, images=tmp_path / "images")
    except DataError as error:
        assert "x.json" in str(error)
        return
    lost = [problem for problem in choices.problems if problem.reason != "equal captions"]
    assert len(choices) + len(lost) == len(document)

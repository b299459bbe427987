"""A suite: which data sets are evaluated, on which tasks.

A suite is a TOML file with one table for each data set; paths are relative to the file.

    [[data]]
    name = "digits"
    path = "sets/digits"                 # whatever `--data` takes
    tasks = ["zero_shot", "few_shot"]    # all that fit, when left out
    templates = ["a photo of the number {}."]

DataComp's `tasklist.yml`, beside its `wds_*` folders, and a folder of CLIP_benchmark's webdataset folders are suites
too, as they are. `shapes` is the built-in one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from threetowers.data.choices import ChoiceSet, open_choices
from threetowers.data.open import given_parts, open_source, split
from threetowers.data.parts import part_of
from threetowers.data.source import Source
from threetowers.errors import DataError, UsageError
from threetowers.evaluate.suite.features import Part
from threetowers.evaluate.zero_shot import DEFAULT_TEMPLATES, check_prompts
from threetowers.run.setup import world
from threetowers.settings import read_toml, replace_nested
from threetowers.world.negatives import open_negatives

VAL_SHARE = 0.1
"""Of the training images, where a data set has no validation part to choose a probe's settings on."""
BUILT_IN = "shapes"
"""The built-in suite, and what the paths of its data begin with."""
_NAME = re.compile(r"[\w.+-][\w.+ -]*(/[\w.+-][\w.+ -]*)*")


@dataclass(frozen=True)
class DataSet:
    """A data set of a suite.

    path: of the test data; where it comes in parts, of all of them. train, val: of the other parts, where they are
    somewhere else. outside: images that belong to none of the classes. tasks: those to measure; empty means all that
    fit. metric: the main one, where it is not the task's own. templates, classes: prompts and class names in the order
    of the labels, where those of the data are not meant. chance: the main metric's level, where it is not the task's
    own. group: what it is averaged with. choices: whether the path is that of choices, as `data/choices.py` reads
    them. images: of choices, the folder of their images, where it is not beside them.
    """

    name: str
    path: str
    train: str | None = None
    val: str | None = None
    outside: str | None = None
    tasks: tuple[str, ...] = ()
    metric: str | None = None
    templates: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    chance: float | None = None
    group: str = ""
    choices: bool = False
    images: str | None = None


@dataclass(frozen=True, eq=False)
class OpenSet:
    """A data set with its sources opened. classes, templates: for prompts; no classes where it has no labels.

    choices: of a set of choices, whose test part is their images.
    """

    described: DataSet
    test: Part
    train: Part | None
    val: Part | None
    outside: Part | None
    classes: Sequence[str]
    templates: Sequence[str]
    choices: ChoiceSet | None = None

    def held_out(self) -> Part:
        """Labelled images beside the test part: those of validation, else of training."""
        part = self.val or self.train
        assert part is not None
        return part

    def fitted_on(self) -> tuple[Part, Part]:
        """The parts that a probe is fitted on and chosen on; without a validation part a tenth of the training part."""
        assert self.train is not None
        if self.val is not None:
            return self.train, self.val
        train, val, _ = split(self.train.source, val_fraction=VAL_SHARE, test_fraction=0.0)
        return self.train._replace(source=train), Part(self.test.data, "val", val)


def read_suite(path: str) -> list[DataSet]:
    """The data sets of a suite: a TOML file, a DataComp task list, a folder of CLIP_benchmark's, or `shapes`.

    Raises UsageError for a key, a name or a value that means nothing, DataError for a folder without data sets.
    """
    if path == BUILT_IN:
        return list(_SHAPES)
    place = Path(path)
    if place.is_dir():
        found = _folders(place)
    elif place.suffix in (".yml", ".yaml"):
        found = _data_comp(place)
    else:
        found = _tables(place)
    if not found:
        raise DataError(
            f"{path}: no data set in it. Write [[data]] tables, or give a folder of wds_* folders"
        )
    names = [each.name for each in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{path}: two data sets are called {name!r}; results are kept by name")
        if not _NAME.fullmatch(name) or ".." in name:
            raise UsageError(f"{path}: {name!r} cannot name a data set; write letters, digits, . - + _ and /")
    return found


def _tables(path: Path) -> list[DataSet]:
    values = read_toml(path)
    unknown = [key for key in values if key != "data"]
    if unknown:
        raise UsageError(f"{path}: unknown key {unknown[0]!r}; each data set is a [[data]] table")
    tables = values.get("data", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path}: data must be tables; write [[data]] with two brackets")
    found = []
    for number, table in enumerate(tables, 1):
        try:
            described = replace_nested(DataSet("", ""), table, f"data[{number}].")
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        for key in ("name", "path"):
            if not getattr(described, key):
                raise UsageError(f"{path}: data[{number}].{key} is missing")
        moved = {key: _beside(path, getattr(described, key)) for key in _PATHS}
        found.append(replace(described, **moved))
    return found


_PATHS = ("path", "train", "val", "outside", "images")


def _beside(file: Path, text: str | None) -> Any:
    """A path of a suite as seen from the working directory."""
    if text is None or text == BUILT_IN or text.startswith((f"{BUILT_IN}/", "hfds:")) or "://" in text:
        return text
    return str(file.parent / text)


def _data_comp(path: Path) -> list[DataSet]:
    """DataComp's list: names to what is known of each; the data is in `wds_NAME_test` or `wds_NAME` beside it."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(each, dict) for each in values.values()):
        raise UsageError(
            f"{path}: a table of data sets is needed, each a table, as in DataComp's tasklist.yml"
        )
    found = []
    for key, value in values.items():
        stem = f"wds_{str(key).replace('/', '-')}"
        folder = next(
            (path.parent / name for name in (f"{stem}_test", stem) if (path.parent / name).is_dir()), None
        )
        if folder is None:
            continue
        metric = value.get("main_metric", "acc1")
        tags = [str(tag) for tag in value.get("tags") or []]
        chance = value.get("random_score")
        found.append(
            DataSet(
                str(key), str(folder), metric=_METRICS.get(metric, metric), group=", ".join(tags),
                tasks=("retrieval",) if str(key).startswith("retrieval/") else ("zero_shot",),
                chance=None if chance is None else float(chance),
            )
        )  # fmt: skip
    missing = len(values) - len(found)
    if missing and not found:
        raise DataError(f"{path}: none of its {len(values)} data sets has a wds_* folder beside the file")
    return found


_METRICS = {"acc1": "top1", "mean_per_class_recall": "mean_per_class", "mean_recall@1": "mean_r@1"}
"""Our names of the metrics that DataComp names; any other is refused when the task is measured."""


def _folders(folder: Path) -> list[DataSet]:
    """The `wds_*` folders in a folder, named as CLIP_benchmark names them: `wds_vtab-dtd_test` is `vtab/dtd`."""
    found = []
    for each in sorted(folder.glob("wds_*")):
        if each.is_dir():
            name = each.name.removeprefix("wds_").removesuffix("_test")
            head, dash, rest = name.partition("-")
            known = dash and head in ("vtab", "fairness", "retrieval", "wilds", "misc")
            found.append(DataSet(f"{head}/{rest}" if known else name, str(each), group=head if known else ""))
    return found


def open_set(described: DataSet) -> OpenSet:
    """Opens a data set's sources; no image is read. Raises DataError and UsageError that name it."""
    if described.choices:
        return _open_choices(described)
    try:
        path = _only_test(_path(described.path))
        parts = given_parts(path)
        test = parts.get("test") or parts.get("val") or open_source(path)
        train, val = parts.get("train"), parts.get("val") if "test" in parts else None
        train, val, outside = (
            other if given is None else open_source(_path(given))
            for given, other in ((described.train, train), (described.val, val), (described.outside, None))
        )
    except (DataError, UsageError) as error:
        raise type(error)(f"{described.name}: {error}") from None
    classes = described.classes or tuple(test.class_names)
    templates = described.templates or tuple(test.templates) or DEFAULT_TEMPLATES
    if test.class_names and len(classes) != len(test.class_names):
        raise UsageError(
            f"{described.name}: {len(classes)} classes are named, and the data has {len(test.class_names)}; name every "
            "class, in the order of the labels"
        )
    for part in (train, val):
        if part is not None and list(part.class_names) != list(test.class_names):
            raise DataError(f"{described.name}: {part.name} has other classes than {test.name}")
    if classes:
        check_prompts(classes, templates)
    name = described.name

    def labelled(label: str, source: Source | None) -> Part | None:
        return None if source is None else Part(name, label, source)

    return OpenSet(
        described, Part(name, "test", test), labelled("train", train), labelled("val", val),
        labelled("outside", outside), classes, templates,
    )  # fmt: skip


def _only_test(path: str) -> str:
    """The part `test` of a folder that has no training part, as some of CLIP_benchmark's folders have none."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    parts = {part_of(each.name): str(each) for each in sorted(folder.iterdir()) if each.is_dir()}
    return parts["test"] if "test" in parts and "train" not in parts else path


def _open_choices(described: DataSet) -> OpenSet:
    try:
        if described.path == BUILT_IN:
            choices = open_negatives(world())
        else:
            choices = open_choices(described.path, described.images)
    except (DataError, UsageError) as error:
        raise type(error)(f"{described.name}: {error}") from None
    test = Part(described.name, "test", choices.images)
    return OpenSet(described, test, None, None, None, (), (), choices)


def _path(text: str) -> str:
    if text == BUILT_IN or text.startswith(f"{BUILT_IN}/"):
        return str(world() / text.removeprefix(BUILT_IN).lstrip("/"))
    return text


_SHAPES: tuple[DataSet, ...] = (
    DataSet("shapes", "shapes/test", group="pairs"),
    DataSet("shapes/words", "shapes", choices=True, group="pairs"),
    DataSet(
        "shapes/objects", "shapes/objects/test", train="shapes/objects/val", outside="shapes/scenes/test",
        group="classes",
    ),
    DataSet("shapes/scenes", "shapes/scenes/test", train="shapes/scenes/val", group="classes"),
)  # fmt: skip

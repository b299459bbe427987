"""Opens the source that a path means, and splits it into training, validation and test data."""

import difflib
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from threetowers.data.formats.annotations import ANNOTATIONS
from threetowers.data.formats.folders import FOLDERS
from threetowers.data.formats.hf_datasets import HF_DATASETS
from threetowers.data.formats.mix import MIXES
from threetowers.data.formats.split_folders import SPLIT_FOLDERS
from threetowers.data.formats.tables import TABLES
from threetowers.data.order import hash64
from threetowers.data.shards.source import SHARDS
from threetowers.data.source import (
    SPLIT_COLUMN,
    ColumnNames,
    Drawn,
    Format,
    Source,
    Subset,
    count_reasons,
    list_examples,
)
from threetowers.errors import BadSample, DataError, UsageError

FORMATS: tuple[Format, ...] = (SHARDS, HF_DATASETS, MIXES, ANNOTATIONS, SPLIT_FOLDERS, TABLES, FOLDERS)
"""All formats of sources. The first that accepts a path opens it; the last two accept any file and any folder."""


def open_source(
    path: str, *, image_column: str | None = None, caption_columns: tuple[str, ...] = ()
) -> Source:
    """The source that a path means.

        open_source("cc3m/{00000..00331}.tar")     # shards; also a folder of them, one, or several joined by ::
        open_source("flickr/captions.csv")         # csv, tsv, jsonl or parquet
        open_source("photos")                      # images with .txt beside them, or one subfolder per class
        open_source("captions_train2017.json")     # COCO or Karpathy JSON; also Flickr's token file
        open_source("hfds:saved")                  # what Hugging Face `datasets` wrote with save_to_disk
        open_source("mix.toml")                    # several of these, see `mix`

    image_column, caption_columns: for tables; None and empty: they are found.
    Raises DataError when nothing is there or nothing in it can be used, UsageError for a column that is not there.
    """
    return _open(path, ColumnNames(image_column, caption_columns))


def check_columns(path: str, columns: ColumnNames) -> None:
    """Raises DataError where nothing is at a path, and UsageError for columns that its table does not have.

    Reads some rows of a table, and nothing of other data.
    """
    _format_of(path, columns).check(path, columns)


def _open(path: str, columns: ColumnNames) -> Source:
    source = _format_of(path, columns).open(path, columns, _Opener())
    if not len(source):
        raise DataError(
            f"{path}: no sample in it can be used ({source.layout}). "
            f"{count_reasons(source.problems)}{list_examples(source.problems)}"
        )
    return source


def splits(
    path: str, *, val_fraction: float = 0.05, test_fraction: float = 0.05, seed: int = 0,
    image_column: str | None = None, caption_columns: tuple[str, ...] = (),
    split_column: str | None = SPLIT_COLUMN,
) -> tuple[Source, Source, Source]:  # fmt: skip
    """Training, validation and test part of the data at a path.

    Parts that come with the data are taken as they are: those of split folders, of a Karpathy file, of a saved
    `DatasetDict`, and those that the `split_column` of a table says. A validation or test part that is missing there
    is split off the training part by `split`. Other data are split as a whole, and the sources of a mix one by one.
    Raises DataError and UsageError.
    """
    columns = ColumnNames(image_column, caption_columns, split_column)
    given = _format_of(path, columns).parts(path, columns, _Opener(val_fraction, test_fraction, seed))
    if not given:
        return split(_open(path, columns), val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    if "train" not in given:
        raise DataError(
            f"{path}: it has the parts {', '.join(given)}, but none to train on. Where a column says so, "
            "--inputs.split-column none leaves it out of account"
        )
    if len(given) == 3:
        train, val, test = given["train"], given["val"], given["test"]
    else:
        train, val, test = split(
            given["train"],
            val_fraction=0.0 if "val" in given else val_fraction,
            test_fraction=0.0 if "test" in given else test_fraction,
            seed=seed,
        )
    parts = train, given.get("val", val), given.get("test", test)
    for part in parts:
        if list(part.class_names) != list(train.class_names):
            raise DataError(
                f"{path}: {part.name} has other classes than {train.name} "
                f"({len(part.class_names)} and {len(train.class_names)}); give every part the same class folders"
            )
    return parts


def given_parts(path: str) -> dict[str, Source]:
    """The parts that the data at a path comes with, by `train`, `val` and `test`; empty where it is one whole.

    Raises DataError and UsageError.
    """
    columns = ColumnNames()
    return dict(_format_of(path, columns).parts(path, columns, _Opener()))


@dataclass(frozen=True)
class _Opener:
    """What formats that consist of other sources open these with; implements Opener."""

    val_fraction: float = 0.0
    test_fraction: float = 0.0
    seed: int = 0

    def open(self, path: str, columns: ColumnNames) -> Source:
        return _open(path, columns)

    def split(self, path: str, columns: ColumnNames) -> tuple[Source, Source, Source]:
        return splits(
            path, val_fraction=self.val_fraction, test_fraction=self.test_fraction, seed=self.seed,
            image_column=columns.image, caption_columns=columns.captions, split_column=columns.split,
        )  # fmt: skip


def _format_of(path: str, columns: ColumnNames) -> Format:
    """The format of a path; raises DataError when there is none, UsageError for columns that it does not take."""
    format = next((format for format in FORMATS if format.accepts(path)), None)
    if format is None:
        raise DataError(f"{path}: there is no such file or folder{_siblings(Path(path))}")
    named = columns.image or columns.captions or columns.split not in (None, SPLIT_COLUMN)
    if named and not format.takes_columns:
        raise UsageError(
            f"{path} is no table, so image_column, caption_columns and split_column mean nothing; leave them out"
        )
    return format


def split(
    source: Source, *, val_fraction: float, test_fraction: float, seed: int = 0
) -> tuple[Source, Source, Source]:
    """Training, validation and test part; a sample's part is drawn by a hash of (seed, id of its image).

    A sample stays in its part when other rows are added, removed or reordered. The sizes are therefore near the
    fractions, not exact. Raises UsageError for fractions that leave nothing to train on.
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise UsageError(
            f"inputs.val_fraction = {val_fraction:g} and inputs.test_fraction = {test_fraction:g} must be 0 or more "
            "and sum to less than 1, so that something is left to train on"
        )

    def part(draw: float) -> int:
        return 2 if draw < test_fraction else 1 if draw < test_fraction + val_fraction else 0

    draws = source.split_draws(seed) if isinstance(source, Drawn) else None
    indices = tuple(array("q") for _ in range(3))
    if draws is None:
        for index in range(len(source)):
            record = source.record(index)
            indices[part(hash64("split", seed, record.image_id or record.id) / 2**64)].append(index)
    else:
        for start in range(0, len(draws), 1 << 18):
            shares = draws[start : start + (1 << 18)] / 2.0**64  # rounded as Python rounds
            parts = np.where(shares < test_fraction, 2, np.where(shares < test_fraction + val_fraction, 1, 0))
            for number, chosen in enumerate(indices):
                chosen.frombytes((np.flatnonzero(parts == number) + start).astype(np.int64).tobytes())
    problems: tuple[list[BadSample], ...] = ([], [], [])
    for problem in source.problems:
        problems[part(hash64("split", seed, problem.id) / 2**64)].append(problem)
    train, val, test = (
        Subset(source, indices[i], f"{source.name.removesuffix('/train')}/{label}", problems[i])
        for i, label in enumerate(("train", "val", "test"))
    )
    return train, val, test


def _siblings(place: Path) -> str:
    """What a mistyped path may have meant: the nearest name in its folder, or that the folder is missing too."""
    folder = place.parent
    if "*" in place.name or "?" in place.name:
        return "; wildcards mean nothing here: give the folder, or a range such as '{00000..00011}.tar'"
    if not folder.is_dir():
        return f"; the folder {folder} does not exist either"
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(place.name, names, n=1)
    if near:
        return f"; did you mean {folder / near[0]}?"
    return f"; {folder} holds {', '.join(names[:8]) or 'nothing'}{', …' if len(names) > 8 else ''}"

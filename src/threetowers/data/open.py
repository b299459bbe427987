"""Which source a path means, and how it is split into training, validation and test data."""

import difflib
from array import array
from pathlib import Path

import numpy as np

from threetowers.data.order import hash64
from threetowers.data.source import Drawn, Source, Subset, _counts, _examples
from threetowers.errors import BadSample, DataError, UsageError


def split(
    source: Source, *, val_fraction: float, test_fraction: float, seed: int = 0
) -> tuple[Source, Source, Source]:
    """Training, validation and test part, each sample's part drawn by a hash of (seed, id of its image).

    A sample stays in its part when rows are added, removed or reordered; part sizes are therefore near the
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


def splits(
    path: str, *, val_fraction: float = 0.05, test_fraction: float = 0.05, seed: int = 0,
    image_column: str | None = None, caption_columns: tuple[str, ...] = (),
) -> tuple[Source, Source, Source]:  # fmt: skip
    """Training, validation and test part of what a path holds.

    Parts that come with the data are taken as they are: the folders `train/`, `val/` (or `valid/`, `validation/`)
    and `test/`, a Karpathy file's, a saved `DatasetDict`'s; one that is not there, like everything of any other path,
    is split off by `split`. The parts of a mix are split one by one. Raises DataError and UsageError.
    """
    from threetowers.data.formats.mix import mixed_splits, names_mix

    columns = (image_column, caption_columns)
    if names_mix(path):
        _refuse_columns(path, columns)
        return mixed_splits(path, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    given = _given_parts(path, columns)
    if not given:
        whole = open_source(path, image_column=image_column, caption_columns=caption_columns)
        return split(whole, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    for label, part in given.items():
        if not len(part):
            raise DataError(f"{path}: no sample of its part {label} can be used. {_counts(part.problems)}")
    if "train" not in given:
        raise DataError(f"{path}: it has the parts {', '.join(given)}, but none to train on")
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


def _given_parts(path: str, columns: tuple[str | None, tuple[str, ...]]) -> dict[str, Source]:
    """The parts (train, val, test) that come with the data, by name; empty when it is one whole."""
    from threetowers.data.formats.annotations import names_annotations, open_parts
    from threetowers.data.formats.hf_datasets import names_dataset, open_dataset_parts

    place = Path(path)
    if names_dataset(path):
        return dict(open_dataset_parts(path, *columns))
    if names_annotations(place):
        _refuse_columns(path, columns)
        return dict(open_parts(place))
    if not _has_split_folders(place):
        return {}
    val = next((name for name in _VAL_FOLDERS if (place / name).is_dir()), "val")
    folders = {"train": place / "train", "val": place / val, "test": place / "test"}
    return {
        label: open_source(str(folder), image_column=columns[0], caption_columns=columns[1])
        for label, folder in folders.items()
        if folder.is_dir()
    }


_VAL_FOLDERS = ("val", "valid", "validation")


def _has_split_folders(folder: Path) -> bool:
    if not (folder / "train").is_dir() or any(folder.glob("*.tar")):
        return False
    others = {entry.name for entry in folder.iterdir() if entry.is_dir()} - {"train"}
    return not others or not others.isdisjoint((*_VAL_FOLDERS, "test"))


def open_source(
    path: str, *, image_column: str | None = None, caption_columns: tuple[str, ...] = ()
) -> Source:
    """The source that a path means: tar shards, a table or annotation file, a folder of images, or a mix of these.

        open_source("cc3m/{00000..00331}.tar")     # shards; also a folder of them, one, or several joined by ::
        open_source("flickr/captions.csv")         # csv, tsv, jsonl or parquet
        open_source("photos")                      # images with .txt beside them, or one subfolder per class
        open_source("captions_train2017.json")     # COCO or Karpathy JSON; also Flickr's token file
        open_source("hfds:saved")                  # what Hugging Face `datasets` wrote with save_to_disk
        open_source("mix.toml")                    # several of these, see `mix`

    image_column, caption_columns: for tables; detected when `none` and empty.
    Raises DataError when nothing is there or nothing in it can be used, UsageError for a column that is not there.
    """
    from threetowers.data.formats.annotations import names_annotations, open_annotations
    from threetowers.data.formats.folders import open_folder
    from threetowers.data.formats.hf_datasets import names_dataset, open_dataset
    from threetowers.data.formats.mix import names_mix, open_mix
    from threetowers.data.formats.rows import TABLE_ENDINGS
    from threetowers.data.formats.tables import open_table
    from threetowers.data.shards.source import names_shards, open_shards

    place = Path(path)
    columns = (image_column, caption_columns)
    source: Source
    if names_shards(path):
        source = _without_columns(path, columns, open_shards(path))
    elif names_dataset(path):
        source = open_dataset(path, *columns)
    elif names_mix(path):
        source = _without_columns(path, columns, open_mix(path))
    elif names_annotations(place):
        source = _without_columns(path, columns, open_annotations(place))
    elif place.is_dir():
        if _has_split_folders(place):
            raise DataError(f"{path} holds separate parts; name one of them, for example {place / 'train'}")
        tables = [place / f"metadata{ending}" for ending in TABLE_ENDINGS]
        table = next((table for table in tables if table.is_file()), None)
        source = open_table(table, *columns) if table else _without_columns(path, columns, open_folder(place))
    elif place.is_file():
        source = open_table(place, *columns)
    else:
        raise DataError(f"{path}: there is no such file or folder{_siblings(place)}")
    if not len(source):
        raise DataError(
            f"{path}: no sample in it can be used ({source.layout}). "
            f"{_counts(source.problems)}{_examples(source.problems)}"
        )
    return source


def _without_columns(path: str, columns: tuple[str | None, tuple[str, ...]], source: Source) -> Source:
    _refuse_columns(path, columns)
    return source


def _refuse_columns(path: str, columns: tuple[str | None, tuple[str, ...]]) -> None:
    if columns != (None, ()):
        raise UsageError(
            f"{path} is no table, so image_column and caption_columns mean nothing; leave them out"
        )


def _siblings(place: Path) -> str:
    """What a mistyped path may have meant: the nearest name in its folder, or the folder that is missing."""
    folder = place.parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist either"
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(place.name, names, n=1)
    if near:
        return f"; did you mean {folder / near[0]}?"
    return f"; {folder} holds {', '.join(names[:8]) or 'nothing'}{', …' if len(names) > 8 else ''}"

"""Writes the built-in world `shapes` to disk: rendered scenes with true captions, for trials without a download.

`scenes.py` decides what is in a scene, `pictures.py` draws it, and `captions.py` describes it.
"""

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from threetowers.data.shards.write import ShardSample, write_shards
from threetowers.errors import DataError, UsageError
from threetowers.world.captions import captions
from threetowers.world.pictures import render
from threetowers.world.scenes import (
    CHUNK,
    KINDS,
    SPLITS,
    VERSION,
    Kind,
    Split,
    class_names,
    labels,
    templates,
)


def write_world(
    directory: Path,
    *,
    seed: int = 0,
    size: int = 32,
    num_train: int = 10_000,
    num_val: int = 1_000,
    num_test: int = 1_000,
    num_labelled: int = 30_000,
    kinds: Sequence[Kind] = KINDS,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the world as tar shards: `{train,val,test}` with captions, `{objects,scenes,attributes}/{train,val,test}`
    with labels.

    size: side of the images in pixels. num_labelled: training samples of each labelled set, whose validation and test
    sizes are those of the captioned set; 0 leaves out the training sets. kinds: which sets are written. Labelled
    folders hold `classnames.txt` and `zeroshot_classification_templates.txt`. progress: called with the numbers of
    images done and in total.

    The world is written to a hidden folder `.NAME.*.partial`, which is then renamed; a killed call leaves it behind,
    and it may be deleted. A second call with equal arguments does nothing.
    Raises DataError when the folder holds anything else or cannot be written, UsageError for sizes that are too small.
    """
    if size < 16 or min(num_train, num_val, num_test) < 1 or num_labelled < 0 or not kinds:
        raise UsageError(f"Size {size} px with {num_train}, {num_val}, {num_test} and {num_labelled} samples of "
                         f"{len(kinds)} kinds cannot be written. Give a size of 16 or more, one kind and at least one "
                         "sample for every set; only num_labelled may be 0.")  # fmt: skip
    about: dict[str, Any] = {"world": "shapes", "version": VERSION, "seed": seed, "size": size}
    about |= {"num_train": num_train, "num_val": num_val, "num_test": num_test, "num_labelled": num_labelled}
    about["kinds"] = [kind for kind in KINDS if kind in kinds]
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        if _is_written(directory, about):
            return
        _write_sets(partial, about, progress)
        (partial / "world.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        try:
            partial.rename(directory)
        except OSError:
            if not _is_written(directory, about):  # unless another process was first with the same world
                raise
    except OSError as error:
        raise DataError(
            f"The shapes world cannot be written to {directory}: {error.strerror or error}. "
            "Free some space there, or give another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_written(directory: Path, about: dict[str, Any]) -> bool:
    """Whether the folder holds the world described by `about`; raises DataError when it holds anything else."""
    try:
        present = json.loads((directory / "world.json").read_bytes())
    except FileNotFoundError:
        if not directory.exists() or not any(directory.iterdir()):
            return False
        present = None
    except ValueError:
        present = None
    if present == about:
        return True
    if not isinstance(present, dict) or present.get("world") != "shapes":
        raise DataError(f"{directory} holds other files and no shapes world. Give another folder.")
    other = {key: present.get(key) for key in about if present.get(key) != about[key]}
    said = "; ".join(f"{key} is {value!r}, asked is {about[key]!r}" for key, value in other.items())
    raise DataError(
        f"{directory} holds another shapes world ({said or 'with unknown keys'}). "
        "Give another folder, or delete this one."
    )


def _write_sets(root: Path, about: dict[str, Any], progress: Callable[[int, int], None] | None) -> None:
    sets: list[tuple[Path, Kind, Split, int]] = []
    for kind in about["kinds"]:
        for split in SPLITS:
            count = about["num_labelled" if kind != "pairs" and split == "train" else f"num_{split}"]
            if count:
                sets.append((root / split if kind == "pairs" else root / kind / split, kind, split, count))
    total, done = sum(count for *_, count in sets), 0

    def counted(samples: Iterator[ShardSample]) -> Iterator[ShardSample]:
        nonlocal done
        for sample in samples:
            yield sample
            done += 1
            if progress is not None and (done % 1_000 == 0 or done == total):
                progress(done, total)

    for folder, kind, split, count in sets:
        folder.mkdir(parents=True)
        write_shards(folder, counted(_samples(about["seed"], count, kind, split, about["size"])))
        if kind != "pairs":
            _write_lines(folder / "classnames.txt", class_names(kind))
            _write_lines(
                folder / "zeroshot_classification_templates.txt",
                [text.replace("{}", "{c}") for text in templates()],
            )


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _samples(seed: int, count: int, kind: Kind, split: Split, size: int) -> Iterator[ShardSample]:
    for start in range(0, count, CHUNK):
        indices = np.arange(start, min(start + CHUNK, count))
        images = render(seed, indices, kind=kind, size=size, split=split)
        texts = captions(seed, indices, split=split) if kind == "pairs" else [()] * len(indices)
        classes: list[int | None] = [None] * len(indices)
        if kind != "pairs":
            classes = labels(seed, indices, kind=kind, split=split).tolist()
        for index, image, caption, label in zip(indices, images, texts, classes, strict=True):
            with BytesIO() as file:
                # Not compressed: noise would shrink by a fifth only and take 1.7 times as long to read.
                Image.fromarray(image).save(file, "PNG", compress_level=0)
                yield ShardSample(f"{index:08d}", file.getvalue(), "png", caption, label)

"""Unit vectors of a source's images or texts by a run's main towers, in files that search indexes read.

vectors.npy        float32 [N, D], unit vectors; their products are cosines
ids.jsonl          a line for each row: the sample's id, and of a text the text
bad_samples.jsonl  the images that could not be read and have no row, where there are any
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from threetowers.commands.arguments import VectorsArguments
from threetowers.data.open import open_source
from threetowers.data.source import Source
from threetowers.errors import DataError, UsageError
from threetowers.evaluate.suite.target import main_towers
from threetowers.objective.losses import unit
from threetowers.run.finished import load_run
from threetowers.run.setup import pick_device
from threetowers.store.embed import find_or_make_store
from threetowers.store.read import Store
from threetowers.store.write import BAD_FILE

BLOCK = 4096
"""Rows that are read and written at a time."""


def vectors(arguments: VectorsArguments) -> str:
    """Writes the vectors that the arguments name; returns a line that says what is there now.

    Features are stored in a hidden folder beside `out` while they are computed, so that a call that was stopped is
    continued by the same call. `out` appears when all of it is there. Raises UsageError for an `out` that holds
    something, CheckpointError for an unfinished run, and DataError for data that cannot be used.
    """
    out = arguments.out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"--out {arguments.out}: something is there already; give another folder")
    device = pick_device(arguments.device)
    image, text = main_towers(load_run(arguments.run), arguments.run)
    source = open_source(
        arguments.data, image_column=arguments.image_column, caption_columns=arguments.caption_columns
    )
    rows = list(_texts(source) if arguments.of == "texts" else ())
    if arguments.of == "texts" and not rows:
        raise DataError(f"{source.name}: there are no captions in this data; give --of images")
    tower = text if arguments.of == "texts" else image
    partial = out.parent / f".{out.name}.partial"
    store = find_or_make_store(
        tower.to(device), source, partial, device, dtype="fp32", workers=arguments.workers
    )
    if arguments.of == "images":
        rows = [(index, 0) for index in np.flatnonzero(store.usable).tolist()]
    made = partial / "vectors"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    _write(made, store, source, rows, arguments.of)
    num_bad = len(source) - len(rows) if arguments.of == "images" else 0
    if num_bad:
        shutil.copyfile(store.folder / BAD_FILE, made / BAD_FILE)
    made.rename(out)
    shutil.rmtree(partial)
    left_out = f"; {num_bad:,} images could not be read and have no row ({BAD_FILE})" if num_bad else ""
    return f"{arguments.out}: {len(rows):,} unit vectors of {arguments.of}, {tower.width} wide{left_out}"


def _texts(source: Source) -> Iterator[tuple[int, int]]:
    """The sample and the place of every caption, in the order of the data."""
    for index in range(len(source)):
        for place in range(len(source.record(index).captions)):
            yield index, place


def _write(folder: Path, store: Store, source: Source, rows: list[tuple[int, int]], of: str) -> None:
    """Writes vectors.npy and ids.jsonl; rows: the sample of each vector and the number of its caption."""
    shape = len(rows), store.contents.width
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", mode="w+", dtype=np.float32, shape=shape)
    with (folder / "ids.jsonl").open("w", encoding="utf-8") as ids:
        for start in range(0, len(rows), BLOCK):
            block = np.array(rows[start : start + BLOCK])
            vectors[start : start + BLOCK] = unit(store.rows(block[:, 0], block[:, 1])).numpy()
            for sample, place in block.tolist():
                record = source.record(sample)
                line: dict[str, Any] = {"id": record.id}
                if of == "texts":
                    line["text"] = record.captions[place]
                ids.write(json.dumps(line) + "\n")  # ids may be names of files that are not UTF-8
    vectors.flush()

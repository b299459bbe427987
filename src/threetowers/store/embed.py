"""Stored embeddings: a frozen tower's features of every sample of a source, computed once.

    find_or_make_store(tower, source, Path("embeddings"), device)
    write_store(tower, source, Path("out"), device, part=(0, 4))   # one of four processes

Legend: B images of a batch, V stored views of each (1 when one fixed view is stored), P the tower's width.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from threetowers.data.order import hash64
from threetowers.data.source import Source
from threetowers.data.workers import read_ahead
from threetowers.errors import BadSample, CheckpointError, DataError, UsageError
from threetowers.processes import ALONE, Processes
from threetowers.progress import Progress, warn
from threetowers.store.pictures import Pictures, Read, Task
from threetowers.store.read import (
    DESCRIPTION_FILE,
    FIXED,
    Contents,
    Kind,
    Side,
    Store,
    Views,
    as_stored,
    find_store,
    is_store,
)
from threetowers.store.write import BAD_FILE, Work, even_chunk, finish, unless_made
from threetowers.system import OtherLoad
from threetowers.towers.frozen.base import FrozenTower, digest_of

FP16_LIMIT = 60_000.0  # just below the largest fp16 number
CHUNK_SAMPLES = 4_096
CPU_PIECE = 16
"""Images at a time on a CPU, where the activations of more do not fit into the cache (`benchmarks/pieces.py`). A size
that is found by timing would change the last bits of features from one run to the next."""


class _TooWide(Exception):  # noqa: N818 - the work starts again in fp32; nothing has failed
    """A feature that fp16 cannot hold."""


def find_or_make_store(
    tower: FrozenTower,
    source: Source,
    folder: Path,
    device: torch.device,
    *,
    views: Views = FIXED,
    dtype: Kind = "fp16",
    fingerprints: Mapping[str, str] | None = None,
    batch_size: int = 256,
    workers: int = 0,
    processes: Processes = ALONE,
) -> Store:
    """The store of a tower's views of a source: one in the folder that fits, else computed into it.

    dtype: of a store that is made. fingerprints: the tower's, when they are at hand. processes: those that call this
    together, of which each computes its share. Raises DataError when no sample of the source can be embedded, and
    CheckpointError for a damaged store or where processes mean different ones.
    """
    fingerprints = fingerprints or tower.fingerprints()
    key = digest_of(
        {**fingerprints, "data": source.fingerprint, "length": len(source), "views": views.as_dict()}
    )
    first, *others = processes.exchange(key)
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise CheckpointError(
                f"rank {rank} has other weights or settings of {tower.spec!r}, or other data of {source.name}, than "
                "rank 0. All processes need the same command, data and package versions"
            )
    own = folder / key
    found: Store | None = None
    if processes.first:  # one look, so that all do the same
        for place in [own, *sorted(path.parent for path in folder.glob(f"*/{DESCRIPTION_FILE}"))]:
            if is_store(place):
                found, _ = find_store(place, fingerprints, source, views)
                if found is not None:
                    break
    there = processes.told(lambda: None if found is None else str(found.folder))
    if found is not None:
        return found
    if there is not None:
        return store_for_training(Path(there), tower, fingerprints, source, views)
    store = write_store(
        tower, source, own, device,
        views=views, dtype=dtype, fingerprints=fingerprints, batch_size=batch_size, workers=workers,
        processes=processes,
    )  # fmt: skip
    assert store is not None  # all chunks were this call's
    return store


def store_for_training(
    folder: Path, tower: FrozenTower, fingerprints: Mapping[str, str], source: Source, views: Views
) -> Store:
    """The store that a user named for a tower; raises UsageError that says which part does not fit."""
    store, differing = find_store(folder, fingerprints, source, views)
    if store is None:
        raise UsageError(
            f"embeddings: {folder} does not fit {tower.spec!r} on {source.name}: its "
            + "; its ".join(f"{part} differ ({how})" for part, how in differing.items())
            + ". Name what it was made with, or embed again into another folder with `threetowers embed`"
        )
    return store


def write_store(
    tower: FrozenTower,
    source: Source,
    out: Path,
    device: torch.device,
    *,
    views: Views = FIXED,
    dtype: Kind = "fp16",
    part: tuple[int, int] = (0, 1),
    fingerprints: Mapping[str, str] | None = None,
    batch_size: int = 256,
    workers: int = 0,
    chunk: int = CHUNK_SAMPLES,
    processes: Processes = ALONE,
) -> Store | None:
    """Embeds a source into a folder, or goes on with what is there; None when the chunks of other parts are missing.

    part: (i, n), this process does every n-th chunk from the i-th. dtype: fp16 gives way to fp32 when a feature does
    not fit. chunk: samples of one, at most. processes: those that call this together, instead of parts; each does its
    share, and all have the store. Raises UsageError for a folder with other contents, DataError when nothing can be
    embedded.
    """
    if processes.size > 1:
        part = processes.rank, processes.size
        chunk = even_chunk(len(source), processes.size, chunk, CPU_PIECE)
    fingerprints = fingerprints or tower.fingerprints()
    out = out.absolute()
    first = _first_rows(source) if tower.reads == "texts" else None
    side: Side = "image" if first is None else "text"
    num_rows = len(source) * max(views.num, 1) if first is None else int(first[-1])
    contents = Contents(
        tower.spec, side, tower.width, dtype, FIXED if first is not None else views, len(source), num_rows,
        {**fingerprints, "data": source.fingerprint},
    )  # fmt: skip
    for kind in dict.fromkeys((dtype, "fp32")):
        if processes.told(partial(_is_made, out)):
            break
        work = Work(out.parent / f".{out.name}.{kind}.partial", replace(contents, dtype=kind), chunk)
        work = replace(work, chunk=processes.told(partial(_begin, work, first, out)))
        too_wide = False
        with processes.failing_together(), unless_made(out):
            try:
                _fill(work, tower, source, device, first, part, batch_size, workers)
            except _TooWide:
                work.mark_too_wide()
                too_wide = True
        if any(processes.exchange(too_wide)):
            continue
        with processes.one_before_all(), unless_made(out):
            # together, the processes have said that they are done; a list of markers might be an old one
            if processes.size == 1 and work.missing():
                if not is_store(out):  # else another process has made the store, and the markers went with it
                    return None
            elif processes.first:
                store = finish(work, out)
                if unusable := store.num_unusable:
                    warn(
                        f"{source.name}: {unusable:,} of {len(source):,} samples could not be embedded; "
                        f"{out / BAD_FILE} names them and says why"
                    )
                if processes.size == 1:
                    return store
        break
    return store_for_training(out, tower, fingerprints, source, contents.views)


def _is_made(out: Path) -> bool:
    """Whether a store is there already; raises UsageError where something else is."""
    if is_store(out):
        return True
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out}: the folder holds something else; give another --out")
    return False


def _begin(work: Work, first: np.ndarray | None, out: Path) -> int:
    """Begins or continues the work; returns the number of samples in its chunks."""
    with unless_made(out):
        work = work.begin(first)
    return work.chunk


def _first_rows(source: Source) -> np.ndarray:
    """The first row of each sample's captions and the end of the last, int64 [n + 1]."""
    counts = [len(source.record(index).captions) for index in range(len(source))]
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _fill(
    work: Work,
    tower: FrozenTower,
    source: Source,
    device: torch.device,
    first: np.ndarray | None,
    part: tuple[int, int],
    batch_size: int,
    workers: int,
) -> None:
    """Computes and writes the missing chunks of a part; first: of texts, the first row of each sample."""
    index, count = part
    mine = [number for number in work.missing() if number % count == index]
    title = f"embedding {source.name} with {tower.spec}" + (f", part {index} of {count}" if count > 1 else "")
    bar = Progress(title, sum(len(work.samples(number)) for number in mine), "samples")
    load = OtherLoad()
    done = 0

    def show(more: int) -> None:
        nonlocal done
        if work.too_wide():
            raise _TooWide
        done += more
        bar.update(done)
        if device.type == "cpu" and (slow := load.remark(torch.get_num_threads())):
            warn(slow)

    if first is not None:
        for number in mine:
            _fill_texts(work, number, tower, source, device, first, batch_size)
            show(len(work.samples(number)))
        return
    parts: list[tuple[Task, Read, Tensor]] = []
    if work.too_wide():
        raise _TooWide
    if device.type == "cpu":  # worker processes would take the cores from the network
        workers, threads = 0, torch.get_num_threads()
    else:
        threads = 1
    for task, read in _read(work, mine, tower, source, batch_size, workers, threads):
        parts.append((task, read, _features(tower, read.pixels, device)))
        if task.last:
            _write_images(work, task.chunk, parts, source)
            parts = []
        show(len(task.samples))


def _read(
    work: Work,
    numbers: list[int],
    tower: FrozenTower,
    source: Source,
    batch_size: int,
    workers: int,
    threads: int,
) -> Iterator[tuple[Task, Read]]:
    """Reads the views of the chunks' images, batch by batch; a batch of the tower holds all views of its images."""
    images = max(1, batch_size // work.contents.rows_per_sample)
    tasks = [
        Task(number, samples[start : start + images], start + images >= len(samples))
        for number in numbers
        for samples in [work.samples(number)]
        for start in range(0, len(samples), images)
    ]
    with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
        pictures = Pictures(source, tower.image, work.contents.views, pool)
        yield from read_ahead(pictures, tasks, workers, name=source.name)


def _features(tower: FrozenTower, pixels: Tensor, device: torch.device) -> Tensor:
    """Features float32 [B, V, P] of pixels [B, V, 3, H, W]."""
    if not len(pixels):
        return torch.empty(0)
    images = pixels.flatten(0, 1)
    pieces = images.split(CPU_PIECE) if device.type == "cpu" else (images,)
    values = torch.cat([tower(piece.to(device)).cpu() for piece in pieces])
    return values.view(*pixels.shape[:2], -1)


def _write_images(work: Work, number: int, parts: list[tuple[Task, Read, Tensor]], source: Source) -> None:
    samples, views = work.samples(number), work.contents.views.num
    features = torch.zeros(len(samples), work.contents.rows_per_sample, work.contents.width)
    usable = np.zeros(len(samples), dtype=bool)
    crops = np.zeros((len(samples), views, 5), dtype=np.float32)
    for _, read, values in parts:
        at = np.array(read.kept, dtype=np.int64) - samples.start
        if len(at):
            features[torch.from_numpy(at)] = values
            usable[at] = True
        if len(at) and views:
            crops[at] = read.crops
    arrays = {
        "features": _checked(features, work.contents, source),
        "usable": usable,
        "ids": _ids(source, samples),
    }
    if views:
        arrays["crops"] = crops
    work.write(
        number,
        arrays,
        dict.fromkeys(arrays, samples.start),
        [bad for _, read, _ in parts for bad in read.bad],
    )


def _fill_texts(
    work: Work,
    number: int,
    tower: FrozenTower,
    source: Source,
    device: torch.device,
    first: np.ndarray,
    batch_size: int,
) -> None:
    samples = work.samples(number)
    records = [source.record(index) for index in samples]
    captions = [caption for record in records for caption in record.captions]
    parts = [torch.empty(0, tower.width)]
    for start in range(0, len(captions), batch_size):
        tokens = tower.tokens(captions[start : start + batch_size])
        parts.append(tower(tokens.to(device)).cpu())
    arrays = {
        "features": _checked(torch.cat(parts), work.contents, source),
        "usable": np.array([bool(record.captions) for record in records]),
        "ids": _ids(source, samples),
    }
    starts = {"features": int(first[samples.start]), "usable": samples.start, "ids": samples.start}
    bad = [BadSample(record.id, "no caption") for record in records if not record.captions]
    work.write(number, arrays, starts, bad)


def _ids(source: Source, samples: range) -> np.ndarray:
    return np.array([hash64(source.record(index).id) for index in samples], dtype=np.uint64)


def _checked(features: Tensor, contents: Contents, source: Source) -> np.ndarray:
    """Features as they are stored; raises DataError when one is not finite and _TooWide when fp16 cannot hold one."""
    if not torch.isfinite(features).all():
        raise DataError(
            f"{contents.spec}: some features of {source.name} are not finite; the tower cannot be used"
        )
    if contents.dtype == "fp16" and features.numel() and float(features.abs().max()) >= FP16_LIMIT:
        raise _TooWide
    return as_stored(features, contents.dtype)

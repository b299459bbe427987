"""Stored embeddings on disk: a folder with `features.safetensors`, read by memory map, and `store.json`.

Legend: n samples, K views of each image, R rows (one per caption of all samples), P a frozen tower's width.

    ids       uint64 [n]         hash64 of each sample's id
    first     int64 [n + 1]      texts only: the first row of each sample's captions
    crops     float32 [n, K, 5]  random views only: left, top, right, bottom as shares of the image, and mirrored
    features  [n, K, P] of images, [R, P] of texts; fp16, bf16 or fp32
    usable    bool [n]           False where no image could be read
"""

import json
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from threetowers.data.order import hash64
from threetowers.data.source import Source, Subset
from threetowers.data.transforms import Crop
from threetowers.errors import CheckpointError
from threetowers.files import digest_file, pack_header, tensor_entries

SCHEMA = 1
FEATURES_FILE, DESCRIPTION_FILE = "features.safetensors", "store.json"
FULL_CHECK_BYTES = 2 << 30  # files up to this size are hashed whenever they are opened, in about a second
NORM_SAMPLES = 1 << 18  # a mean over this many samples has no error worth reading more for
CHECKED_IDS = 1_024
REMEDY = "delete this folder and embed again"

Kind = Literal["fp16", "bf16", "fp32"]
Side = Literal["image", "text"]
_STORED: dict[Kind, tuple[str, Any, torch.dtype]] = {
    "fp16": ("F16", np.float16, torch.float16),
    "bf16": ("BF16", np.uint16, torch.bfloat16),  # numpy has no bf16; its bits travel as integers
    "fp32": ("F32", np.float32, torch.float32),
}


@dataclass(frozen=True)
class Views:
    """What a store holds of each image: one fixed view (num 0), or `num` random ones drawn from `seed`."""

    num: int = 0
    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333333)
    flip: bool = False
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values; of a fixed view nothing but that it is fixed."""
        plain: dict[str, Any] = {"num": self.num}
        if self.num:
            plain |= asdict(self) | {"crop_scale": list(self.crop_scale), "crop_ratio": list(self.crop_ratio)}
        return plain

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Views":
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return Views(**known)


FIXED = Views()


@dataclass(frozen=True)
class Contents:
    """What a store holds, or will hold. fingerprints: `weights`, `preprocessing`, `features` and `data`."""

    spec: str
    side: Side
    width: int
    dtype: Kind
    views: Views
    num_samples: int
    num_rows: int
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **vars(self), "views": self.views.as_dict()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Contents":
        """The contents in a store.json; raises KeyError, TypeError or ValueError when it is not one."""
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema {values['schema']!r}, this version reads {SCHEMA}")
        if values["dtype"] not in _STORED or values["side"] not in ("image", "text"):
            raise ValueError(f"dtype {values['dtype']!r}, side {values['side']!r}")
        known = {key: values[key] for key in Contents.__dataclass_fields__}
        return Contents(**{**known, "views": Views.from_dict(values["views"])})

    @property
    def rows_per_sample(self) -> int:
        return max(self.views.num, 1)


class Slot(NamedTuple):
    """Where a tensor lies in the file, and what it is."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The layout of a store's file; it follows from the contents, before the first feature is computed."""

    header: bytes
    slots: dict[str, Slot]
    size: int


def layout(contents: Contents) -> Layout:
    """The one file layout that belongs to the contents; wide types come first, so that every tensor is aligned."""
    n, views, width = contents.num_samples, contents.views.num, contents.width
    name, dtype, _ = _STORED[contents.dtype]
    tensors: dict[str, tuple[str, Any, tuple[int, ...]]] = {"ids": ("U64", np.uint64, (n,))}
    if contents.side == "text":
        tensors["first"] = ("I64", np.int64, (n + 1,))
    if views:
        tensors["crops"] = ("F32", np.float32, (n, views, 5))
    rows = (contents.num_rows,) if contents.side == "text" else (n, contents.rows_per_sample)
    tensors["features"] = (name, dtype, (*rows, width))
    tensors["usable"] = ("BOOL", np.bool_, (n,))
    slots = {key: Slot(0, np.dtype(kind), shape) for key, (_, kind, shape) in tensors.items()}
    entries, size = tensor_entries(
        {key: (label, shape, slots[key].size) for key, (label, _, shape) in tensors.items()}
    )
    header = pack_header(json.dumps(entries, separators=(",", ":")))
    slots = {
        key: slot._replace(offset=len(header) + entries[key]["data_offsets"][0])
        for key, slot in slots.items()
    }
    return Layout(header, slots, len(header) + size)


def as_stored(features: Tensor, dtype: Kind) -> np.ndarray:
    """Features as the array that is written to the file."""
    _, kind, torch_kind = _STORED[dtype]
    stored = features.to(torch_kind)
    return (stored.view(torch.int16) if dtype == "bf16" else stored).contiguous().numpy().view(kind)


@dataclass(eq=False)
class Store:
    """A frozen tower's features of a source, by sample; only the rows that are asked for are read.

    select: int64, the stored sample of each sample of a part of the source; None is the whole of it.
    """

    folder: Path
    contents: Contents
    select: np.ndarray | None = None

    def __post_init__(self) -> None:
        self._open()

    def __len__(self) -> int:
        return self.contents.num_samples if self.select is None else len(self.select)

    def __getstate__(self) -> dict[str, Any]:
        """What a loader's process needs to open the store again; a pickled memory map would be a full copy."""
        return {"folder": self.folder, "contents": self.contents, "select": self.select}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    def _open(self) -> None:
        path = self.folder / FEATURES_FILE
        self._maps = {
            key: np.asarray(np.memmap(path, slot.dtype, "r", slot.offset, slot.shape))
            if slot.size
            else np.empty(slot.shape, slot.dtype)  # an empty range cannot be mapped
            for key, slot in layout(self.contents).slots.items()
        }
        self._features = self._maps["features"].reshape(-1, self.contents.width)
        usable = self._maps["usable"]
        self.usable = np.array(usable if self.select is None else usable[self.select])

    @property
    def side(self) -> Side:
        """Whether the tower reads images or texts."""
        return self.contents.side

    @property
    def num_views(self) -> int:
        """K when random views are stored, 0 when one fixed view is."""
        return self.contents.views.num

    @property
    def num_unusable(self) -> int:
        return int((~self.usable).sum())

    def summary(self) -> str:
        """What is stored, in a line."""
        what, bad = self.contents, self.num_unusable
        rows = f"{what.num_rows:,} captions of {len(self):,} samples" if self.side == "text" else (
            f"{len(self):,} images" + (f" in {self.num_views} random views" if self.num_views else "")
        )  # fmt: skip
        size = layout(what).size / 1e6
        unusable = f", {bad:,} unusable (bad_samples.jsonl)" if bad else ""
        return f"{rows}{unusable}, {what.width} wide, {what.dtype}, {size:,.1f} MB"

    def part(self, select: np.ndarray) -> "Store":
        """The store of some of the samples, int64 [m]."""
        chosen = select if self.select is None else self.select[select]
        return Store(self.folder, self.contents, chosen)

    def rows(self, samples: np.ndarray, which: np.ndarray | int = 0) -> Tensor:
        """Features float32 [B, P] of samples int64 [B]; which: the view of an image or the caption of a text."""
        stored = self._stored(samples)
        first = self._maps["first"][stored] if self.side == "text" else stored * self.contents.rows_per_sample
        return self._read(first + which)

    def crop(self, sample: int, view: int) -> Crop:
        """The region that a stored view shows."""
        return as_crop(self._maps["crops"][int(self._stored(np.array(sample))), view])

    def mean_square_norm(self) -> float:
        """Mean of ‖p‖² over the usable rows, or over those of 262,144 samples at equal distances."""
        samples = self._stored(np.arange(len(self)))
        if len(samples) > NORM_SAMPLES:
            samples = samples[np.linspace(0, len(samples) - 1, NORM_SAMPLES).astype(np.int64)]
        rows, count = self._all_rows(samples)
        total = 0.0
        for start in range(0, len(rows), 65_536):
            block = self._read(rows[start : start + 65_536]).numpy()
            total += float((block**2).sum(dtype=np.float64))
        return total / max(count, 1)

    def check_ids(self, source: Source) -> None:
        """Raises CheckpointError when a row belongs to another sample than the source has there; looks at 1,024."""
        for index in np.linspace(0, len(self) - 1, min(len(self), CHECKED_IDS)).astype(np.int64).tolist():
            id = source.record(index).id
            if int(self._maps["ids"][int(self._stored(np.array(index)))]) != hash64(id):
                raise CheckpointError(
                    f"{self.folder}: its row for sample {index} of {source.name} is not that of {id!r}; "
                    f"{REMEDY}"
                )

    def _stored(self, samples: np.ndarray) -> np.ndarray:
        return samples if self.select is None else self.select[samples]

    def _all_rows(self, stored: np.ndarray) -> tuple[np.ndarray, int]:
        """The rows of stored samples in their order, and how many of them are usable."""
        if self.side == "image":
            each = self.contents.rows_per_sample
            rows = (stored[:, None] * each + np.arange(each)).ravel()
            return rows, each * int(self._maps["usable"][stored].sum())
        first, counts = self._maps["first"][stored], np.diff(self._maps["first"])[stored]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(first, counts) + within, int(counts.sum())

    def _read(self, rows: np.ndarray) -> Tensor:
        order = np.argsort(rows, kind="stable")  # so that the disk is read in one direction
        block = torch.from_numpy(self._features[rows[order]].view(_bits(self.contents.dtype)))
        values = block.view(_STORED[self.contents.dtype][2]).float()
        out = torch.empty_like(values)
        out[torch.from_numpy(order)] = values
        return out


def as_crop(row: np.ndarray) -> Crop:
    """The crop of a stored row, float32 [5]; the region that is cut out is the one rounded to float32."""
    left, top, right, bottom, flip = row.tolist()
    return Crop((left, top, right, bottom), bool(flip))


def _bits(dtype: Kind) -> type[np.generic]:
    return np.int32 if dtype == "fp32" else np.int16  # integer types that torch knows


def is_store(folder: Path) -> bool:
    """Whether a folder holds a store."""
    return (folder / DESCRIPTION_FILE).is_file()


def read_description(folder: Path) -> tuple[Contents, str]:
    """A store's contents and the SHA-256 of its file; raises CheckpointError for a damaged store.json."""
    try:
        described = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        contents, sha256 = Contents.from_dict(described), str(described["sha256"])
        layout(contents)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise CheckpointError(f"{folder / DESCRIPTION_FILE}: damaged ({reason}); {REMEDY}") from None
    return contents, sha256


def open_store(folder: Path, *, thorough: bool = False) -> Store:
    """The store in a folder, with its sizes checked, and its SHA-256 up to 2 GiB or when `thorough`.

    Raises CheckpointError in one line for a store that is damaged.
    """
    contents, sha256 = read_description(folder)
    path, expected = folder / FEATURES_FILE, layout(contents)
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {REMEDY}")
    size = path.stat().st_size
    if size != expected.size:
        raise CheckpointError(
            f"{path}: damaged, {size:,} bytes where {DESCRIPTION_FILE} says {expected.size:,}; {REMEDY}"
        )
    with path.open("rb") as file:
        if file.read(len(expected.header)) != expected.header:
            raise CheckpointError(
                f"{path}: damaged, its header is not what {DESCRIPTION_FILE} says; {REMEDY}"
            )
    if (thorough or size <= FULL_CHECK_BYTES) and digest_file(path) != sha256:
        raise CheckpointError(f"{path}: damaged, its SHA-256 is not what {DESCRIPTION_FILE} says; {REMEDY}")
    return Store(folder, contents)


def find_store(
    folder: Path, fingerprints: Mapping[str, str], source: Source, views: Views
) -> tuple[Store | None, dict[str, str]]:
    """The store in a folder as one of the source's samples, or None and what differs: by part, how.

    fingerprints: the tower's. A store of a source serves its subsets too. Raises as `open_store` does.
    """
    contents, _ = read_description(folder)
    differing = {
        part: f"{contents.fingerprints.get(part)} in the store, {value} in the tower"
        for part, value in fingerprints.items()
        if contents.fingerprints.get(part) != value
    }
    if contents.views.as_dict() != views.as_dict():
        differing["views"] = f"{_described(contents.views)} stored, {_described(views)} asked for"
    select: np.ndarray | None = None
    whole = source
    while not _is_of(contents, whole) and isinstance(whole, Subset):
        chosen = np.asarray(whole.indices, dtype=np.int64)
        select = chosen if select is None else chosen[select]
        whole = whole.source
    if not _is_of(contents, whole):
        differing["data"] = f"made of {contents.num_samples:,} samples of another source than {source.name}"
    if differing:
        return None, differing
    store = open_store(folder)
    if select is not None:
        store = store.part(select)
        source = Subset(
            whole, array("q", select.tobytes()), source.name
        )  # with the ids that the store was made of
    store.check_ids(source)
    return store, {}


def _is_of(contents: Contents, source: Source) -> bool:
    return contents.fingerprints.get("data") == source.fingerprint and len(source) == contents.num_samples


def _described(views: Views) -> str:
    if not views.num:
        return "one fixed view"
    mirrored = ", mirrored" if views.flip else ""
    return f"{views.num} random views (scale {views.crop_scale}, ratio {views.crop_ratio}{mirrored})"

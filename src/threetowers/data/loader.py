"""Positions to batches: reading, decoding, augmenting, tokenising, and replacing what cannot be used."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from threetowers.config import InputConfig
from threetowers.data.decode import decode
from threetowers.data.order import Order, hash64
from threetowers.data.sources import Source
from threetowers.data.tokenize import Tokenizer
from threetowers.data.transforms import ImageSpec, cropped_view, random_crop
from threetowers.errors import BadSample, DataError

MAX_ATTEMPTS = 100
T = TypeVar("T")


class Features(Protocol):
    """Precomputed features of a source's images, by index."""

    @property
    def features(self) -> np.ndarray: ...

    @property
    def usable(self) -> np.ndarray: ...


@dataclass
class Batch:
    """One step's samples. Legend: B samples, n tokens of the longest caption, P a frozen tower's width."""

    index: Tensor
    """int64 [B], index of each sample in the source."""
    tokens: Tensor
    """int64 [B, n]."""
    pixels: Tensor | None
    """uint8 [B, 3, H, W] for the main image tower; None when it is not needed."""
    thirds: dict[str, Tensor]
    """By view name: stored features float32 [B, P], or uint8 pixels [B, 3, H, W] for a live tower."""
    image_ids: Tensor
    """int64 [B], equal for equal images."""
    caption_ids: Tensor
    """int64 [B], equal for equal captions."""
    bad: list[BadSample] = field(default_factory=list)
    """Samples that could not be used and were replaced in this batch."""

    def to(self, device: torch.device) -> "Batch":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            index=self.index,
            tokens=move(self.tokens),
            pixels=None if self.pixels is None else move(self.pixels),
            thirds={view: move(value) for view, value in self.thirds.items()},
            image_ids=move(self.image_ids),
            caption_ids=move(self.caption_ids),
            bad=self.bad,
        )


class BatchReader:
    """Makes the batch of a range of positions; the same range gives the same batch in any process.

    image: what the main image tower takes, None when no row needs it. live: the specs of the frozen towers that see
    the main tower's augmented view. stores: the features of those that see one fixed view.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        tokenizer: Tokenizer,
        inputs: InputConfig,
        *,
        image: ImageSpec | None,
        live: Mapping[str, ImageSpec] | None = None,
        stores: Mapping[str, Features] | None = None,
    ) -> None:
        self.source, self.order, self.tokenizer, self.inputs = source, order, tokenizer, inputs
        self.image, self.live, self.stores = image, dict(live or {}), dict(stores or {})

    def __getitem__(self, positions: range) -> Batch:
        bad: list[BadSample] = []
        samples = [self._sample(position, bad) for position in positions]
        texts = [caption for _, caption, _, _ in samples]
        tokens = self.tokenizer(texts)
        index = torch.tensor([index for index, _, _, _ in samples])
        views = {name: torch.from_numpy(np.stack([v[name] for *_, v in samples])) for name in samples[0][3]}
        return Batch(
            index=index,
            tokens=tokens[:, : int(self.tokenizer.lengths(tokens).max())],
            pixels=views.pop("img", None),
            thirds=views | {view: _rows(store, index) for view, store in self.stores.items()},
            image_ids=_as_ids([id for _, _, id, _ in samples]),
            caption_ids=_as_ids(texts),
            bad=bad,
        )

    def _sample(self, position: int, bad: list[BadSample]) -> tuple[int, str, str, dict[str, np.ndarray]]:
        """Index, caption, id and pixels by view of the sample at a position, or of its replacement."""
        epoch = self.order.epoch(position)
        return usable_sample(self.order, position, self.source, bad, lambda index: self._read(index, epoch))

    def _read(self, index: int, epoch: int) -> tuple[int, str, str, dict[str, np.ndarray]]:
        record = self.source.record(index)
        if not record.captions:
            raise BadSample(record.id, "no caption")
        for store in self.stores.values():
            if not store.usable[index]:
                raise BadSample(record.id, "damaged image", "it could not be embedded")
        seed = hash64(self.order.seed, epoch, record.id)
        caption = record.captions[hash64(seed, "caption") % len(record.captions)]
        specs = ({"img": self.image} if self.image else {}) | self.live
        return (
            index,
            caption,
            record.id,
            augmented_views(self.source, index, record.id, seed, self.inputs, specs),
        )


def usable_sample(
    order: Order, position: int, source: Source, bad: list[BadSample], read: Callable[[int], T]
) -> T:
    """What `read` makes of the sample at a position, or of the first of its replacements that can be used.

    Samples that cannot are appended to `bad`. Raises DataError after 100 of them in a row.
    """
    index = order.index(position)
    for attempt in range(MAX_ATTEMPTS):
        try:
            return read(index)
        except BadSample as problem:
            bad.append(problem)
            index = order.replacement(position, attempt)
    raise DataError(f"{source.name}: {MAX_ATTEMPTS} samples in a row cannot be used, the last one {bad[-1]}")


def augmented_views(
    source: Source, index: int, id: str, seed: int, inputs: InputConfig, specs: Mapping[str, ImageSpec]
) -> dict[str, np.ndarray]:
    """The same random region of an image for every tower, each in its own size: uint8 [3, H, W] by view.

    Raises BadSample when the image cannot be read.
    """
    if not specs:
        return {}
    image = decode(source.image(index), id)
    crop = random_crop(hash64(seed, "crop"), image.size, inputs.crop_scale, inputs.crop_ratio, inputs.flip)
    return {view: cropped_view(image, crop, spec) for view, spec in specs.items()}


def _rows(store: Features, index: Tensor) -> Tensor:
    return torch.from_numpy(store.features[index.numpy()].astype(np.float32))


def _as_ids(texts: list[str]) -> Tensor:
    return torch.tensor([hash64(text) >> 1 for text in texts])


def batches(
    reader: BatchReader, first_step: int, last_step: int, *, pin_memory: bool = False
) -> Iterator[Batch]:
    """The batches of the steps, read ahead by the configured number of worker processes."""
    workers = reader.inputs.workers
    settings: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
    loader: DataLoader[Batch] = DataLoader(
        reader,  # type: ignore[arg-type]
        sampler=list(reader.order.batches(first_step, last_step)),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # the loader must not draw from the generator that dropout uses
        pin_memory=pin_memory,
        **settings,
    )
    yield from loader

"""Turns positions into batches: reads, decodes, augments and tokenises samples, and replaces unusable ones."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from threetowers.config import InputConfig
from threetowers.data.decode import check_decoder, decode_array
from threetowers.data.kept import KeptImages
from threetowers.data.order import Order, hash64
from threetowers.data.source import Source
from threetowers.data.tokenize import Tokenizer
from threetowers.data.transforms import Crop, ImageSpec, cropped_view, random_crop
from threetowers.data.workers import read_ahead
from threetowers.errors import BadSample, DataError
from threetowers.progress import warn

MAX_ATTEMPTS = 100
T = TypeVar("T")


class Features(Protocol):
    """The stored features of a source's images or of its captions.

    num_views: the number of random views of each image; 0: one fixed view. usable: bool [n], by sample.
    """

    usable: np.ndarray

    @property
    def side(self) -> Literal["image", "text"]: ...

    @property
    def num_views(self) -> int: ...

    def rows(self, samples: np.ndarray, which: np.ndarray) -> Tensor:
        """float32 [B, P]. which: the number of the view of each image, or of its caption."""
        ...

    def crop(self, sample: int, view: int) -> Crop:
        """The region of a stored view."""
        ...


@dataclass(slots=True)
class _Sample:
    """One sample of a batch. caption, view: the numbers of the drawn caption and stored view; pixels: by tower name."""

    index: int
    image_id: str
    text: str
    caption: int
    view: int
    pixels: dict[str, np.ndarray]


@dataclass
class Batch:
    """The samples of one step. Legend: B samples, n tokens of the longest caption, P a frozen tower's width."""

    index: Tensor
    """int64 [B], index of each sample in the source."""
    tokens: Tensor
    """int64 [B, n]."""
    pixels: Tensor | None
    """uint8 [B, 3, H, W] for the main image tower; None when it is not needed."""
    third_features: dict[str, Tensor]
    """By tower name: float32 [B, P], the stored features of a frozen tower."""
    third_pixels: dict[str, Tensor]
    """By tower name: uint8 [B, 3, H, W], the input of a frozen tower that runs while the model trains."""
    image_ids: Tensor
    """int64 [B], equal for equal images."""
    caption_ids: Tensor
    """int64 [B], equal for captions that are equal to the main text tower, as their token ids are."""
    bad: list[BadSample] = field(default_factory=list)
    """Samples that could not be used and were replaced in this batch."""

    def part(self, start: int, stop: int) -> "Batch":
        """Some consecutive samples of the batch."""
        return Batch(
            index=self.index[start:stop],
            tokens=self.tokens[start:stop],
            pixels=None if self.pixels is None else self.pixels[start:stop],
            third_features={name: value[start:stop] for name, value in self.third_features.items()},
            third_pixels={name: value[start:stop] for name, value in self.third_pixels.items()},
            image_ids=self.image_ids[start:stop],
            caption_ids=self.caption_ids[start:stop],
        )

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which copies to a GPU need not wait; called by DataLoader."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, do: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            tokens=do(self.tokens),
            pixels=None if self.pixels is None else do(self.pixels),
            third_features={name: do(value) for name, value in self.third_features.items()},
            third_pixels={name: do(value) for name, value in self.third_pixels.items()},
            image_ids=do(self.image_ids),
            caption_ids=do(self.caption_ids),
        )


class BatchReader:
    """Makes the batch of a range of positions; the same range gives the same batch in any process.

    image: the input of the main image tower; None when no row of the objective needs it. live: the inputs of the
    frozen towers that see the main tower's augmented view. stores: the features of the other frozen towers. Where
    random views are stored, one is drawn at each visit, and the main tower sees the same region. kept: where decoded
    images stay for the next visit; None decodes at every visit.
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
        kept: KeptImages | None = None,
    ) -> None:
        self.source, self.order, self.tokenizer, self.inputs = source, order, tokenizer, inputs
        check_decoder(inputs.decoder)
        self.kept = kept
        self.image, self.live, self.stores = image, dict(live or {}), dict(stores or {})
        self._viewed = next((store for store in self.stores.values() if store.num_views), None)

    def __getitem__(self, positions: range) -> Batch:
        bad: list[BadSample] = []
        samples = [self._sample(position, bad) for position in positions]
        texts = [sample.text for sample in samples]
        tokens = self.tokenizer(texts)
        index = np.array([sample.index for sample in samples])
        drawn = {"text": np.array([s.caption for s in samples]), "image": np.array([s.view for s in samples])}
        pixels = {
            name: torch.from_numpy(np.stack([sample.pixels[name] for sample in samples]))
            for name in samples[0].pixels
        }
        return Batch(
            index=torch.from_numpy(index),
            tokens=tokens[:, : int(self.tokenizer.lengths(tokens).max())],
            pixels=pixels.pop("img", None),
            third_features={
                name: store.rows(index, drawn[store.side]) for name, store in self.stores.items()
            },
            third_pixels=pixels,
            image_ids=_as_ids([sample.image_id for sample in samples]),
            caption_ids=_as_ids([row.tobytes().decode("latin-1") for row in tokens.numpy()]),
            bad=bad,
        )

    def _sample(self, position: int, bad: list[BadSample]) -> _Sample:
        """The sample at a position, or its replacement."""
        epoch = self.order.epoch(position)
        return usable_sample(self.order, position, self.source, bad, lambda index: self._read(index, epoch))

    def _read(self, index: int, epoch: int) -> _Sample:
        record = self.source.record(index)
        if not record.captions:
            raise BadSample(record.id, "no caption")
        for store in self.stores.values():
            if not store.usable[index]:
                raise BadSample(record.id, "damaged image", "it could not be embedded")
        seed = hash64(self.order.seed, epoch, record.id)
        caption, view, crop = hash64(seed, "caption") % len(record.captions), 0, None
        if self._viewed is not None:
            view = hash64(seed, "view") % self._viewed.num_views
            crop = self._viewed.crop(index, view)
        images = ({"img": self.image} if self.image else {}) | self.live
        pixels = augmented_views(self.source, index, record.id, seed, self.inputs, images, crop, self.kept)
        return _Sample(index, record.image_id or record.id, record.captions[caption], caption, view, pixels)


def usable_sample(
    order: Order, position: int, source: Source, bad: list[BadSample], read: Callable[[int], T]
) -> T:
    """What `read` returns for the sample at a position, or for the first of its replacements that can be used.

    The problems of unusable samples are appended to `bad`. Raises DataError after MAX_ATTEMPTS of them in a row.
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
    source: Source,
    index: int,
    id: str,
    seed: int,
    inputs: InputConfig,
    images: Mapping[str, ImageSpec],
    crop: Crop | None = None,
    kept: KeptImages | None = None,
) -> dict[str, np.ndarray]:
    """The same random region of an image for several towers: uint8 [3, H, W] by tower name, in the tower's size.

    crop: the region; None: it is drawn. kept: where the decoded image stays; not with `inputs.draft`, since its scale
    then depends on the region. Raises BadSample when the image cannot be read.
    """
    if not images:
        return {}

    def region(size: tuple[int, int]) -> Crop:
        return crop or random_crop(
            hash64(seed, "crop"), size, inputs.crop_scale, inputs.crop_ratio, inputs.flip
        )

    def shrink(size: tuple[int, int]) -> float:
        return region(size).shrink(size, max(image.size for image in images.values()))

    def decoded() -> np.ndarray:
        return decode_array(
            source.image(index), id, decoder=inputs.decoder, shrink=shrink if inputs.draft else None
        )

    pixels = decoded() if kept is None or inputs.draft else kept.get_or_put(index, decoded)
    seen = region((pixels.shape[1], pixels.shape[0]))
    return {name: cropped_view(pixels, seen, image) for name, image in images.items()}


def _as_ids(texts: list[str]) -> Tensor:
    return torch.tensor([hash64(text) >> 1 for text in texts])


def batches(
    reader: BatchReader,
    first_step: int,
    last_step: int,
    *,
    own: slice = slice(None),
    pin_memory: bool = False,
    say: Callable[[str], None] = warn,
) -> Iterator[Batch]:
    """The batches of the steps, read ahead by the configured number of worker processes; see `read_ahead`.

    own: the places within each batch that this process reads.
    """
    steps = [positions[own] for positions in reader.order.batches(first_step, last_step)]
    return read_ahead(
        reader, steps, reader.inputs.workers,
        name=reader.source.name, first=first_step, pin_memory=pin_memory, say=say,
    )  # fmt: skip

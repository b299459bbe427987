"""A source's images and captions as unit vectors, in every view that the model has: what evaluators work on."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from threetowers.data.decode import decode
from threetowers.data.kept import KeptImages
from threetowers.data.repeats import repeated_share, text_groups
from threetowers.data.source import Source
from threetowers.data.tokenize import Tokenizer
from threetowers.data.transforms import ImageSpec, fixed_view
from threetowers.data.workers import read_ahead
from threetowers.errors import BadSample, DataError
from threetowers.model import ThreeTowers
from threetowers.objective.losses import unit
from threetowers.objective.pairs import tower_of
from threetowers.processes import ALONE, Processes
from threetowers.store.read import Store


@dataclass
class Encoded:
    """N images and M captions of a source, encoded. Images that cannot be used have no row.

    views: unit vectors fp32 by view name; image-side views have N rows, text-side views M.
    text_image: int64 [M], row of the image that each caption belongs to.
    index: int64 [N], index of each image in the source. bad: the images that cannot be used.
    text_thirds: the third towers that read captions.
    """

    views: dict[str, Tensor]
    text_image: Tensor
    index: Tensor
    captions: list[str]
    bad: list[BadSample] = field(default_factory=list)
    text_thirds: frozenset[str] = frozenset()

    @cached_property
    def text_group(self) -> Tensor:
        """int64 [M], the same number for captions that are equal as `repeats.caption_key` says."""
        return torch.from_numpy(text_groups(self.captions))

    def repeated(self) -> float:
        """Share of the captions that are equal to a caption of another image."""
        return repeated_share(self.text_image.numpy(), self.text_group.numpy())

    def system(self, name: str) -> tuple[Tensor, Tensor]:
        """Image vectors [N, D] and text vectors [M, D] of `main`, or of a third tower read through the heads."""
        if name == "main":
            return self.views["img"], self.views["txt"]
        if name in self.text_thirds:
            return self.views[f"img@{name}"], self.views[f"{name}@img"]
        return self.views[f"{name}@txt"], self.views[f"txt@{name}"]

    def systems(self) -> list[str]:
        """`main`, and every third tower that shares a pair of heads with the main tower of the other modality."""
        thirds = dict.fromkeys(tower_of(view) for view in self.views if "@" in view)
        found = ["main"]
        for name in thirds:
            other = "img" if name in self.text_thirds else "txt"
            if {f"{name}@{other}", f"{other}@{name}"} <= self.views.keys():
                found.append(name)
        return found


@dataclass
class Labelled:
    """N labelled images and C classes, encoded by the main pair.

    image [N, D] and classes [C, D] are unit vectors fp32; labels int64 [N], −1 for an image without a label.
    """

    image: Tensor
    classes: Tensor
    labels: Tensor
    class_names: list[str]


@dataclass
class EvaluationData:
    """Everything that was encoded of a run; a part without usable data is None.

    val, test: images with captions. labelled: images with class labels.
    """

    val: Encoded | None = None
    test: Encoded | None = None
    labelled: Labelled | None = None


class _FixedViews:
    """A dataset of images in their fixed view, which workers can decode. kept: where views stay, or None."""

    def __init__(self, source: Source, spec: ImageSpec, kept: KeptImages | None) -> None:
        self.source, self.spec, self.kept = source, spec, kept

    def __getitem__(self, indices: list[int]) -> tuple[list[int], Tensor, list[BadSample]]:
        kept, views, bad = [], [], []
        for index in indices:
            make = partial(self._view, index)
            try:
                views.append(make() if self.kept is None else self.kept.get_or_put(index, make))
                kept.append(index)
            except BadSample as problem:
                bad.append(problem)
        pixels = torch.from_numpy(np.stack(views)) if views else torch.empty(0, dtype=torch.uint8)
        return kept, pixels, bad

    def _view(self, index: int) -> np.ndarray:
        image = decode(self.source.image(index), self.source.record(index).id)
        return fixed_view(image, self.spec)


@torch.no_grad()
def encode(
    model: ThreeTowers,
    source: Source,
    tokenizer: Tokenizer,
    stores: Mapping[str, Store],
    device: torch.device,
    *,
    batch_size: int = 256,
    workers: int = 0,
    autocast: AbstractContextManager[Any] | None = None,
    merge: bool = True,
    kept: KeptImages | None = None,
    processes: Processes = ALONE,
) -> Encoded:
    """Encodes a source's images and captions in every view, in eval mode; the model's mode is restored afterwards.

    stores: the frozen towers' features of this source by view name. merge: samples with equal images are one image with
    the captions of all, since each of these is a right answer. kept: where the images' fixed views stay for the next
    call, or None. processes: those that call this together, of which each encodes its share; all have the whole result.
    Raises DataError when no image can be used.
    """
    training = model.training
    model.eval()
    samples = samples_of_images(source, merge)
    index, image_feats, bad = _encode_images(
        model, source, list(samples), stores, device,
        batch_size=batch_size, workers=workers, autocast=autocast, kept=kept, processes=processes,
    )  # fmt: skip
    texts = texts_of(source, index.tolist(), samples)
    captions = texts.captions
    text_feats = _encode_texts(
        model, captions, tokenizer, device, batch_size=batch_size, autocast=autocast, processes=processes
    )
    text_stores = {name: store for name, store in stores.items() if store.side == "text"}
    if captions:
        which = np.array(texts.samples), np.array(texts.places)
        rows = {name: store.rows(*which) for name, store in text_stores.items()}
        text_feats |= model.features(thirds={name: value.to(device) for name, value in rows.items()})
    # a head encodes images or captions, whichever its tower has features of
    image_views = {"img", *(view for view in model.heads if tower_of(view) in image_feats)}
    text_views = {"txt", *(view for view in model.heads if tower_of(view) in text_feats)}
    views = {view: model.view(view, image_feats).cpu() for view in sorted(image_views)}
    if captions:
        views |= {view: model.view(view, text_feats).cpu() for view in sorted(text_views)}
    model.train(training)
    text_image = torch.tensor(texts.rows, dtype=torch.long)
    return Encoded(views, text_image, index, captions, bad, frozenset(text_stores))


class Texts(NamedTuple):
    """Captions, the row of each one's image, and where each is from: the sample and the number of its caption."""

    captions: list[str]
    rows: list[int]
    samples: list[int]
    places: list[int]


def texts_of(source: Source, index: Sequence[int], samples: Mapping[int, Sequence[int]]) -> Texts:
    """The captions of the images `index`, in this order; samples: as `samples_of_images` returns them."""
    texts = Texts([], [], [], [])
    for row, i in enumerate(index):
        for sample in samples[i]:
            own = source.record(sample).captions
            texts.captions.extend(own)
            texts.rows.extend([row] * len(own))
            texts.samples.extend([sample] * len(own))
            texts.places.extend(range(len(own)))
    return texts


def captions_of(source: Source, index: Sequence[int]) -> list[str]:
    """The captions that `encode` encodes with these images of a source, in its order."""
    return texts_of(source, index, samples_of_images(source, merge=True)).captions


def samples_of_images(source: Source, merge: bool) -> dict[int, list[int]]:
    """The samples that show each image, by the first of them, in the source's order."""
    samples: dict[int, list[int]] = {}
    firsts: dict[str, int] = {}
    for index in range(len(source)):
        first = index
        if merge:
            record = source.record(index)
            first = firsts.setdefault(record.image_id or record.id, index)
        samples.setdefault(first, []).append(index)
    return samples


def _encode_images(
    model: ThreeTowers,
    source: Source,
    chosen: list[int],
    stores: Mapping[str, Store],
    device: torch.device,
    *,
    batch_size: int,
    workers: int,
    autocast: AbstractContextManager[Any] | None,
    kept: KeptImages | None,
    processes: Processes,
) -> tuple[Tensor, dict[str, Tensor], list[BadSample]]:
    """Of the chosen samples: those that can be used, their images' features by tower, and those that cannot be used."""
    usable = np.ones(len(source), dtype=bool)
    stores = {name: store for name, store in stores.items() if store.side == "image"}
    for store in stores.values():
        usable &= store.usable
    bad = [BadSample(source.record(i).id, "damaged image") for i in chosen if not usable[i]]
    wanted = [i for i in chosen if usable[i]]
    used, parts = wanted, []
    if model.needs_pixels():
        own, found = wanted[processes.own(len(wanted))], list[int]()
        unreadable: list[BadSample] = []
        tasks = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
        views = _FixedViews(source, model.image, kept)
        if kept is not None and kept.holds(own):
            workers = 0  # there is nothing to decode, and starting processes takes longer
        for indices, pixels, problems in read_ahead(views, tasks, workers, name=source.name):
            unreadable += problems
            if indices:
                found += indices
                parts.append(model.features(pixels=pixels.to(device), autocast=autocast)["img"])
        told = processes.exchange([found, [[each.id, each.reason, each.detail] for each in unreadable]])
        used = [index for indices, _ in told for index in indices]
        bad += [BadSample(*words) for _, problems in told for words in problems]
    if not used:
        raise DataError(f"{source.name}: not one of its {len(source)} images can be read")
    thirds = {view: store.rows(np.array(used)).to(device) for view, store in stores.items()}
    feats = model.features(thirds=thirds)
    if model.needs_pixels():
        feats["img"] = _of_all(parts, model, device, processes)
    return torch.tensor(used), feats, bad


def _of_all(parts: list[Tensor], model: ThreeTowers, device: torch.device, processes: Processes) -> Tensor:
    """The features of the batches of all processes, of which one may have none."""
    return processes.gather_rows(
        torch.cat(parts) if parts else torch.empty(0, model.embed_dim, device=device)
    )


def _encode_texts(
    model: ThreeTowers,
    texts: list[str],
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    batch_size: int,
    autocast: AbstractContextManager[Any] | None,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    own, parts = texts[processes.own(len(texts))], []
    for start in range(0, len(own), batch_size):
        tokens = tokenizer(own[start : start + batch_size])
        tokens = tokens[:, : int(tokenizer.lengths(tokens).max())].to(device)
        parts.append(model.features(tokens=tokens, autocast=autocast)["txt"])
    return {"txt": _of_all(parts, model, device, processes)} if texts else {}


@torch.no_grad()
def encode_texts(
    model: ThreeTowers,
    texts: list[str],
    tokenizer: Tokenizer,
    device: torch.device,
    view: str = "txt",
    *,
    autocast: AbstractContextManager[Any] | None = None,
    processes: Processes = ALONE,
) -> Tensor:
    """Encodes texts in a text-side view, in eval mode: unit vectors fp32 [len(texts), D].

    autocast: that of the images which the texts are compared with. processes: as in `encode`.
    """
    training = model.training
    model.eval()
    feats = _encode_texts(
        model, texts, tokenizer, device, batch_size=256, autocast=autocast, processes=processes
    )
    model.train(training)
    return unit(model.raw_view(view, feats)).cpu()

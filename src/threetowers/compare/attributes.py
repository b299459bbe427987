"""What a tower of the built-in world knows of each attribute: by zero-shot classification, and by a linear probe.

A comparison of methods by retrieval alone does not show what each keeps and what it gives up.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from threetowers.data.decode import decode
from threetowers.data.open import open_source
from threetowers.data.transforms import fixed_view
from threetowers.evaluate.ridge import ridge
from threetowers.evaluate.zero_shot import class_embeddings, label_ranks
from threetowers.run.finished import FinishedRun
from threetowers.run.setup import world
from threetowers.towers.frozen.base import FrozenTower
from threetowers.world.attributes import ATTRIBUTES

Encode = Callable[[Sequence[Image.Image]], Tensor]
"""Images → features [N, F]."""


class Known(NamedTuple):
    """By attribute, top-1 accuracy on test images: zero-shot, and of a ridge regression fitted on validation images.

    probe: empty where it was not asked for.
    """

    zero_shot: dict[str, float]
    probe: dict[str, float]


def known_attributes(finished: FinishedRun, folder: Path | None = None, *, probe: bool = True) -> Known:
    """What the main pair of a finished run knows. folder: of a built-in world; None is the one of seed 0."""
    features = _features(finished.encode_image, folder or world(), ("val", "test") if probe else ("test",))
    zero_shot = {}
    for name, attribute in ATTRIBUTES.items():
        images, labels = features[attribute.kind, "test"]
        classes = class_embeddings(finished.encode_text, attribute.class_names, attribute.templates)
        ranks = label_ranks(images, classes, torch.from_numpy(attribute.of(labels.numpy())))
        zero_shot[name] = (ranks < 1).double().mean().item()
    return Known(zero_shot, _probes(features) if probe else {})


def probe_tower(tower: FrozenTower, folder: Path | None = None) -> dict[str, float]:
    """Accuracy of the probe of each attribute on a frozen tower's own features."""

    @torch.inference_mode()
    def encode(images: Sequence[Image.Image]) -> Tensor:
        parts = []
        for start in range(0, len(images), 256):
            views = [
                torch.from_numpy(fixed_view(each, tower.image).copy()) for each in images[start : start + 256]
            ]
            parts.append(tower(torch.stack(views)).float())
        return torch.cat(parts)

    return _probes(_features(encode, folder or world()))


Features = dict[tuple[str, str], tuple[Tensor, Tensor]]
"""Features [N, F] and labels int64 [N] by kind of labelled images and part."""


def _features(encode: Encode, folder: Path, parts: Sequence[str] = ("val", "test")) -> Features:
    found: Features = {}
    for kind in dict.fromkeys(attribute.kind for attribute in ATTRIBUTES.values()):
        for part in parts:
            source = open_source(str(folder / kind / part))
            images = [decode(source.image(i), source.record(i).id) for i in range(len(source))]
            labels = torch.tensor([source.record(i).label for i in range(len(source))])
            found[kind, part] = encode(images), labels
    return found


def _probes(features: Features) -> dict[str, float]:
    probes = {}
    for name, attribute in ATTRIBUTES.items():
        (train, train_labels), (test, test_labels) = (
            features[attribute.kind, part] for part in ("val", "test")
        )
        own, others = (
            torch.from_numpy(attribute.of(labels.numpy())) for labels in (train_labels, test_labels)
        )
        probes[name] = ridge(train, own, len(attribute.class_names)).accuracy(test, others)
    return probes

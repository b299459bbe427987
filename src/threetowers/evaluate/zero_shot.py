"""Zero-shot classification: a class is represented by the mean of its prompts' embeddings.

Legend: N images, C classes, D width.
"""

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from threetowers.errors import DataError, UsageError
from threetowers.evaluate.encode import EvaluationData
from threetowers.evaluate.result import Result, percentages
from threetowers.evaluate.retrieval import check_features, weighted_ranks
from threetowers.objective.losses import unit

DEFAULT_TEMPLATES = ("a photo of a {}.",)
"""The prompts of data that brings none."""
_PLACE = re.compile(r"\{c?\}")
_TEXTS_PER_CALL = 1024


def zero_shot(data: EvaluationData) -> Result | None:
    """Accuracy of the main pair on labelled images, overall and by class; None without labelled images.

    Classes without an image are left out of `per_class`.
    """
    labelled = data.labelled
    if labelled is None:
        return None
    ranks = label_ranks(labelled.image, labelled.classes, labelled.labels)
    metrics = accuracy(ranks, labelled.labels, len(labelled.classes))
    by_class = per_class_accuracy(ranks, labelled.labels, len(labelled.classes)).tolist()
    per_class = {
        name: value
        for name, value in zip(labelled.class_names, by_class, strict=True)
        if not math.isnan(value)
    }
    return Result(
        {"zero_shot": metrics, "per_class": per_class},
        {"classes/rank": ranks},
        (f"zero-shot: {percentages(metrics)}",),
        saved=("classes/rank",),
    )


def class_embeddings(
    encode_text: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Unit vectors float32 [C, D]: the mean of a class's normalised prompt embeddings, renormalised.

    encode_text: texts → [number of texts, D]. A template marks the place of the class name by `{}` or `{c}`, as in
    CLIP_benchmark's `zeroshot_classification_templates.txt`. Convention: CLIP (arXiv 2103.00020, section 3.1.4).
    Raises UsageError for a template without a place, DataError for missing names and embeddings that cannot be used.

        class_embeddings(model.encode_text, ["cat", "dog"], ["a photo of a {}.", "a drawing of a {}."])
    """
    check_prompts(class_names, templates)
    per_call = max(1, _TEXTS_PER_CALL // len(templates))
    means = []
    for start in range(0, len(class_names), per_call):
        names = class_names[start : start + per_call]
        texts = [prompt(template, name) for name in names for template in templates]
        features = encode_text(texts)
        if len(features) != len(texts):
            raise DataError(f"class embeddings: {len(texts)} prompts gave {len(features)} embeddings")
        check_features(features, f"embeddings of the prompts of classes {start} to {start + len(names) - 1}")
        means.append(unit(features).view(len(names), len(templates), -1).mean(dim=1))
    return unit(torch.cat(means))


def check_prompts(class_names: Sequence[str], templates: Sequence[str]) -> None:
    """Raises UsageError for a template without a place for the name, DataError for missing names."""
    if not class_names or not templates:
        raise DataError(
            f"zero-shot classes: {len(class_names)} class names and {len(templates)} templates, both are needed; "
            "they are read from classnames.txt and zeroshot_classification_templates.txt"
        )
    for row, template in enumerate(templates):
        if not _PLACE.search(template):
            raise UsageError(
                f"template {row} {template!r} has no place for the class name: write {{}} or {{c}}"
            )


def prompt(template: str, name: str) -> str:
    """The template with the class name in every `{}` or `{c}`; braces in the name itself are kept."""
    return _PLACE.sub(lambda _: name, template)


def accuracy(ranks: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Shares in [0, 1]: `top1`, `top5` (with more than five classes) and `mean_per_class`.

    ranks: what `label_ranks` returned for the labels, int64 [N] both. Classes without an image do not enter
    `mean_per_class`.
    """
    result = {"top1": (ranks < 1).double().mean().item()}
    if num_classes > 5:
        result["top5"] = (ranks < 5).double().mean().item()
    result["mean_per_class"] = per_class_accuracy(ranks, labels, num_classes).nanmean().item()
    return result


def per_class_accuracy(ranks: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Top-1 accuracy of every class, float64 [C], NaN for a class without an image; see `accuracy`."""
    labels = labels.cpu()
    right = torch.bincount(labels[ranks < 1], minlength=num_classes)
    return right.double() / torch.bincount(labels, minlength=num_classes)


def label_ranks(image: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """How many wrong classes score at least as high as the right one, int64 [N]: a tie counts against the model.

    image [N, D] and classes [C, D] are unit vectors, labels int64 [N]. Raises DataError for shapes, labels or values
    that do not fit.
    """
    check_features(image, "image features")
    check_features(classes, "class embeddings")
    if image.shape[1] != classes.shape[1]:
        raise DataError(f"image features are {image.shape[1]} wide, class embeddings {classes.shape[1]}")
    if labels.is_floating_point() or labels.shape != (len(image),):
        raise DataError(
            f"labels: one class index per image is needed, int64 [{len(image)}], "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    wrong = ((labels < 0) | (labels >= len(classes))).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"labels: row {row} names class {int(labels[row])}, there are {len(classes)} class names"
        )
    return weighted_ranks([(image, classes)], [(1.0,)], labels, torch.arange(len(classes)))[0]

"""Tasks of images and texts: retrieval, zero-shot classification and what follows from its logits, choices."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from threetowers.data.corruptions import CORRUPTIONS, SEVERITIES, CorruptedSource
from threetowers.errors import DataError
from threetowers.evaluate.calibration import calibration
from threetowers.evaluate.composition import CHANCE, answer
from threetowers.evaluate.detection import detection
from threetowers.evaluate.encode import Encoded
from threetowers.evaluate.retrieval import ranks_from_features, ranks_of, recalls
from threetowers.evaluate.statistics import Hits
from threetowers.evaluate.suite.features import Features, captioned
from threetowers.evaluate.suite.measured import Measured, classified, labelled
from threetowers.evaluate.suite.sets import OpenSet
from threetowers.evaluate.zero_shot import accuracy, label_ranks


def retrieval(features: Features, opened: OpenSet) -> Measured:
    """Recall of the captions by images and of the images by captions, on the test part."""
    encoded = captioned(features, opened.test)
    ranks = ranks_of(encoded)
    # there an image's own captions alone are right
    own = ranks_from_features(*encoded.system("main"), encoded.text_image) if encoded.repeated() else ranks
    return Measured(
        recalls(ranks),
        len(encoded.index),
        chance_of_retrieval(encoded),
        {"mean_r@1": ranks.hits(1)} if ranks.num_independent() > 1 else {},
        ranks.images(),
        {
            "repeated_captions": encoded.repeated(),
            "bad_images": len(encoded.bad),
            "captions": len(encoded.captions),
            "clip_benchmark": recalls(own),
        },
    )


def chance_of_retrieval(encoded: Encoded) -> float:
    """`mean_r@1` of a model that ranks by chance: the mean share of right answers among the candidates."""
    image, group = encoded.text_image.numpy(), encoded.text_group.numpy()
    num_images, num_texts = len(encoded.index), len(image)
    pairs = np.unique(
        np.stack([image, group]), axis=1
    )  # each image with each of its different captions, once
    texts_of_group, images_of_group = np.bincount(group), np.bincount(pairs[1], minlength=group.max() + 1)
    right_texts = np.bincount(pairs[0], weights=texts_of_group[pairs[1]], minlength=num_images)
    i2t = right_texts[right_texts > 0].mean() / num_texts
    t2i = images_of_group[group].mean() / num_images
    return float(0.5 * (i2t + t2i))


def zero_shot(features: Features, opened: OpenSet) -> Measured:
    """Classification by the cosine with the mean of each class's prompts."""
    test = labelled(features, opened.test)
    ranks = label_ranks(test.features, _classes(features, opened), test.labels)
    known = accuracy(ranks, test.labels, len(opened.classes))
    return classified(ranks < 1, test.labels, known)


def calibrated(features: Features, opened: OpenSet) -> Measured:
    """Calibration of zero-shot probabilities on test images, before and after one temperature fitted on others."""
    classes, scale = _classes(features, opened), _scale(features)
    val, test = (labelled(features, part) for part in (opened.held_out(), opened.test))
    found = calibration(
        scale * val.features @ classes.T, val.labels, scale * test.features @ classes.T, test.labels
    )
    metrics = {
        "ece": found.before.ece, "nll": found.before.nll, "brier": found.before.brier,
        "ece_scaled": found.after.ece, "nll_scaled": found.after.nll, "brier_scaled": found.after.brier,
        "temperature": found.temperature,
    }  # fmt: skip
    return Measured(metrics, len(test.labels), details=found.figures())


def detected(features: Features, opened: OpenSet) -> Measured:
    """How well zero-shot probabilities tell test images from images of no class: AUROC, and FPR at 95 % TPR."""
    assert opened.outside is not None
    classes, scale = _classes(features, opened), _scale(features)
    inside = scale * labelled(features, opened.test).features @ classes.T
    outside = scale * features.images(opened.outside).features @ classes.T
    found = detection(inside, outside)
    metrics = {
        name if score == "max_softmax" else f"{score}/{name}": value
        for score, values in found.items()
        for name, value in values.items()
    }
    return Measured(metrics, len(inside) + len(outside), 0.5, details={"outside": len(outside)})


def robustness(features: Features, opened: OpenSet) -> Measured:
    """The figure of zero-shot classification, or of retrieval, under each corruption at each severity.

    mean: over all of them. clean: without. retained: their ratio, where clean is above 0.
    """
    task, metric = (zero_shot, "top1") if opened.classes else (retrieval, "mean_r@1")
    clean = task(features, opened)
    curves: dict[str, list[float]] = {}
    sums: list[np.ndarray] = []
    images: Hits | None = clean.images
    for corruption in CORRUPTIONS:
        curves[corruption.name] = []
        for severity in SEVERITIES:
            worse = CorruptedSource(opened.test.source, corruption.name, severity)
            part = opened.test._replace(label=f"test-{corruption.name}-{severity}", source=worse)
            found = task(features, replace(opened, test=part))
            curves[corruption.name].append(found.metrics[metric])
            ways = _ways(found.hits[metric])
            sums = [a + b for a, b in zip(sums, ways, strict=True)] if sums else ways
    count = len(CORRUPTIONS) * len(SEVERITIES)
    before, mean = clean.metrics[metric], float(np.mean(list(curves.values())))
    means = tuple(way / count for way in sums)
    hits: Hits = (means[0], means[1]) if len(means) == 2 else means[0]
    metrics = {
        "mean": mean, "clean": before, **({"retained": mean / before} if before else {}),
        **{name: float(np.mean(values)) for name, values in curves.items()},
    }  # fmt: skip
    details = {"metric": metric, "severities": list(SEVERITIES), "curves": curves}
    return Measured(metrics, clean.num, clean.chance, {"mean": hits}, images, details)


def _ways(hits: Hits) -> list[np.ndarray]:
    return [np.asarray(way, dtype=float) for way in (hits if isinstance(hits, tuple) else (hits,))]


def composition(features: Features, opened: OpenSet) -> Measured:
    """How often what is right is preferred to what differs from it in a word or in the order of words.

    accuracy: the metric of the set's kind of choice that its authors report first.
    """
    choices = opened.choices
    assert choices is not None
    rows = features.images(opened.test)
    found = answer(choices, rows.features, features.texts(list(choices.texts)), rows.samples)
    chance = CHANCE[choices.task]
    first = next(iter(chance)) if choices.task != "matching" else "group"
    metrics = found.metrics()
    hits = {name: values.astype(float) for name, values in found.hits.items()}
    return Measured(
        {"accuracy": metrics[first], **metrics},
        len(found.ids),
        chance[first],
        {"accuracy": hits[first], **hits},
        found.groups if len(set(found.groups.tolist())) > 1 else None,
        {
            "first": first,
            "by_category": found.by_category(),
            "category_mean": found.category_mean(),
            "left_out": dict(Counter(problem.reason for problem in found.problems)),
        },
    )


def needs_held_out(opened: OpenSet, views: Sequence[str]) -> str:
    if not opened.classes:
        return "its images have no classes"
    some = opened.val is not None or opened.train is not None
    return "" if some else "it has no other part to fit the temperature on; name one with val = PATH"


def needs_outside(opened: OpenSet, views: Sequence[str]) -> str:
    if not opened.classes:
        return "its images have no classes"
    return (
        ""
        if opened.outside is not None
        else "it has no images of other classes; name some with outside = PATH"
    )


def needs_choices(opened: OpenSet, views: Sequence[str]) -> str:
    return "" if opened.choices is not None else "it is no set of choices"


def needs_captions_or_classes(opened: OpenSet, views: Sequence[str]) -> str:
    return "its images have neither captions nor classes" if opened.choices is not None else ""


def _classes(features: Features, opened: OpenSet) -> Tensor:
    return features.classes(opened.test, opened.classes, opened.templates)


def _scale(features: Features) -> float:
    if features.scale is None:
        raise DataError(
            f"{features.name}: probabilities need the model's scale; store a tensor `scale` of one number"
        )
    return features.scale

"""Tasks of image features and labels alone: few-shot, linear probe and nearest neighbours.

Each is measured on the main tower. Where the model learned from a frozen tower, it is measured on that one too, and on
both together: their features are standardised, weighted by √(1−α) and √α and put side by side (arXiv 2305.16999); α is
chosen on validation images. The names of these metrics begin with `third/` and `img+third/`.
"""

from collections.abc import Mapping

import torch

from threetowers.evaluate.few_shot import SHOTS, FewShot, TwoTowers, few_shot, joined, joined_few_shot
from threetowers.evaluate.linear_probe import linear_probe
from threetowers.evaluate.neighbours import neighbours
from threetowers.evaluate.ridge import Samples, standardiser
from threetowers.evaluate.suite.features import Features
from threetowers.evaluate.suite.measured import Measured, classified, labelled
from threetowers.evaluate.suite.sets import OpenSet

MAIN_SHOTS = 5
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The weights of a frozen tower's features that a task tries."""


def few(features: Features, opened: OpenSet) -> Measured:
    """Ridge regression on 1, 5, 10 and 25 images of each class; the metric `5_shot` is a mean over three draws."""
    parts = _by_view(features, opened)
    count = len(opened.classes)
    train, _, test = parts["img"]
    found = few_shot(train, test, count)
    metrics, details = _shots("", found), {"img": found.figures()}
    for view in list(parts)[1:]:
        alone = few_shot(parts[view][0], parts[view][2], count)
        both = joined_few_shot(*_two(parts, view), count, ALPHAS)
        metrics |= _shots(f"{view}/", alone) | _shots(f"img+{view}/", both.chosen)
        details |= {view: alone.figures(), f"img+{view}": both.figures()}
    hits = found.hits[SHOTS.index(MAIN_SHOTS)].double().mean(0).numpy()
    return Measured(
        metrics, len(test.labels), 1 / _present(test), {f"{MAIN_SHOTS}_shot": hits}, details=details
    )


def probe(features: Features, opened: OpenSet) -> Measured:
    """Logistic regression on all training images, its regularisation chosen on validation images."""
    parts = _by_view(features, opened)
    count = len(opened.classes)
    found = linear_probe(*parts["img"], count)
    metrics, details = {}, {"img": found.figures()}
    for view in list(parts)[1:]:
        alone = linear_probe(*parts[view], count)
        metrics[f"{view}/top1"], details[view] = alone.accuracy, alone.figures()
        tried = {0.0: found, 1.0: alone}
        train, val, test = _two(parts, view)
        first, second = standardiser(train.first), standardiser(train.second)
        for alpha in ALPHAS[1:-1]:
            sides = [
                Samples(joined(first(each.first), second(each.second), alpha), each.labels)
                for each in (train, val, test)
            ]
            tried[alpha] = linear_probe(sides[0], sides[1], sides[2], count, standardise=False)
        # the smallest weight wins a tie
        best = max(sorted(tried), key=lambda alpha: max(tried[alpha].path.values()))
        metrics[f"img+{view}/top1"] = tried[best].accuracy
        details[f"img+{view}"] = {"alpha": best, **tried[best].figures()}
    return classified(found.hits, parts["img"][2].labels, metrics, **details)


def nearest(features: Features, opened: OpenSet) -> Measured:
    """The class of the nearest training images by cosine; `top1` weights their votes by similarity."""
    parts = _by_view(features, opened)
    found = neighbours(*parts["img"], len(opened.classes))
    metrics, details = {"majority/top1": found.majority.accuracy}, {"img": found.weighted.figures()}
    for view in list(parts)[1:]:
        alone = neighbours(*parts[view], len(opened.classes)).weighted
        metrics[f"{view}/top1"], details[view] = alone.accuracy, alone.figures()
    return classified(found.weighted.hits, parts["img"][2].labels, metrics, **details)


Parts = tuple[Samples, Samples, Samples]


def _by_view(features: Features, opened: OpenSet) -> dict[str, Parts]:
    """Training, validation and test samples by view; a frozen tower's are of the same images as the main tower's."""
    train, val = opened.fitted_on()
    found = {}
    for view in features.views:
        sides = [labelled(features, part, view) for part in (train, val, opened.test)]
        found[view] = (sides[0], sides[1], sides[2])
    return found


def _two(parts: Mapping[str, Parts], view: str) -> tuple[TwoTowers, TwoTowers, TwoTowers]:
    sides = [
        TwoTowers(main.features, other.features, main.labels)
        for main, other in zip(parts["img"], parts[view], strict=True)
    ]
    return sides[0], sides[1], sides[2]


def _shots(prefix: str, found: FewShot) -> dict[str, float]:
    return {
        f"{prefix}{shots}_shot": value
        for shots, value in zip(found.shots, found.accuracy.mean(1).tolist(), strict=True)
    }


def _present(test: Samples) -> int:
    return len(torch.unique(test.labels))

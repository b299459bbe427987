"""A comparison in a few sentences: who is best at what, what combining adds, and what another third tower does."""

from collections.abc import Sequence

from threetowers.report.claims import short_budget
from threetowers.report.tables import (
    Compare,
    Key,
    cells,
    finite,
    label,
    metric_name,
    num_seeds,
    percent,
    primary,
    ranking,
    row_key,
)

CLASSES = "zero_shot/top1"
MIN_SEEDS = 3
WARM = ("lit-unlocked", "3t-main-warm")
FEW_PAIRS = 100_000
"""Training images below which a start from pretrained weights is proposed."""
COMBINED = "combination/mean_r@1"


def story(compare: Compare) -> list[str]:
    """Sentences beside the headline, which says who is best by the primary metric; sentences without figures are left
    out."""
    texts = (_classes(compare), _combined(compare), *_thirds(compare), _edges(compare))
    return [text for text in texts if text]


def _edges(compare: Compare) -> str:
    """Which methods may gain from learning rates that were not tried."""
    lower, higher = [], []
    for method in compare["methods"]:
        tried = {float(lr): finite(value) for lr, value in (method.get("lr_trials") or {}).items()}
        if len(tried) > 1:
            lower += [label(compare, row_key(method))] * (method["lr"] == min(tried))
            higher += [label(compare, row_key(method))] * (method["lr"] == max(tried))
    said = [
        f"the {which} was best for {', '.join(names)}"
        for which, names in (("lowest", lower), ("highest", higher))
        if names
    ]
    return f"Of the learning rates tried, {' and '.join(said)}: --lrs can try more." if said else ""


def next_step(compare: Compare) -> str:
    """What to try next on this data, by what the comparison lacks; empty when nothing stands out.

    It names at most two things, the one that most limits what can be said first.
    """
    steps = []
    num, methods = num_seeds(compare), {method["method"] for method in compare["methods"]}
    claims = compare.get("claims", [])
    if short_budget(compare):
        steps.append("longer runs, as said above")
    if num < MIN_SEEDS:
        steps.append(
            f"more seeds (--seeds {' '.join(map(str, range(MIN_SEEDS)))}), so that differences can be told from chance"
        )
    elif any(claim["verdict"] == "not shown" and claim["p"] is not None for claim in claims):
        steps.append("more seeds: some differences are still undecided")
    pairs = (compare.get("settings") or {}).get("num_train") or 0
    reads_images = any(third.get("image") for third in compare.get("thirds", []))
    missing = [method for method in WARM if method not in methods]
    if reads_images and missing and 0 < pairs < FEW_PAIRS:
        steps.append(
            f"methods whose image tower starts at the pretrained weights (--methods {' '.join(missing)}): an image "
            f"tower from scratch has {pairs:,} images to learn from here"
        )
    return f"To try next: {'; '.join(steps[:2])}." if steps else ""


def _best(compare: Compare, path: str) -> Key | None:
    table = cells(compare)
    known = [key for key in table if path in table[key]]
    return max(known, key=lambda key: table[key][path].mean) if len(known) > 1 else None


def _figure(compare: Compare, key: Key, path: str) -> str:
    return f"{percent(cells(compare)[key][path].mean)} %"


def _classes(compare: Compare) -> str:
    best = _best(compare, CLASSES)
    if best is None:
        return ""
    return (
        f"{label(compare, best)} is best at {metric_name(CLASSES)}, with {_figure(compare, best, CLASSES)}."
    )


def _combined(compare: Compare) -> str:
    """The combination of the method for which it is best, beside its two ends and the control."""
    table = cells(compare)
    known = [key for key in table if COMBINED in table[key]]
    if not known:
        return ""
    best = max(known, key=lambda key: table[key][COMBINED].mean)
    curves = [
        curve
        for curve in compare.get("combination", [])
        if (curve.get("method", "3t"), curve["third"]) == best
    ]
    third = [finite(curve.get("ends", {}).get("third")) for curve in curves]
    alone = [value for value in third if value is not None]
    beside = f", and its third tower alone {percent(sum(alone) / len(alone))} %" if alone else ""
    text = (
        f"With the third tower at inference as well, {label(compare, best)} reaches "
        f"{_figure(compare, best, COMBINED)}; without it {_figure(compare, best, primary(compare))}{beside}."
    )
    controls = [finite((curve.get("control") or {}).get("chosen")) for curve in curves]
    scores = [value for value in controls if value is not None]
    if scores and len(scores) == len(curves):
        text += f" The score average of an independent baseline and LiT reaches {percent(sum(scores) / len(scores))} %."
    return text


def _thirds(compare: Compare) -> list[str]:
    """A sentence for each third tower but that of the best method, and the baseline."""
    table, path = cells(compare), primary(compare)
    ranked: Sequence[Key] = [key for key in ranking(compare) if path in table[key]]
    leading = next((third for _, third in ranked if third), "")
    sentences = []
    for third in dict.fromkeys(third for _, third in ranked if third and third != leading):
        figures = [
            f"{label(compare, key).partition(' (')[0]} {_figure(compare, key, path)}"
            for key in ranked
            if key[1] == third
        ]
        base = ("baseline", "")
        beside = (
            f" The baseline, without one, reaches {_figure(compare, base, path)}." if base in ranked else ""
        )
        sentences.append(f"With the third tower {third}: {', '.join(figures)} {metric_name(path)}.{beside}")
    return sentences

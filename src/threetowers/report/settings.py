"""What a comparison ran with: its settings, its third towers, its machine, and the terms of its page."""

from collections.abc import Iterable
from typing import Any

from threetowers.report.claims import TERMS
from threetowers.report.examples import more
from threetowers.report.tables import (
    Compare,
    Html,
    definitions,
    finite,
    html_table,
    join,
    label,
    num_seeds,
    percent,
    row_key,
    tag,
)

_SETTINGS = {
    "lrs": "learning rates tried",
    "lr_seed": "seed of the learning-rate trials",
    "jobs": "runs at a time",
    "threads": "threads of each run",
    "num_train": "training images",
    "num_val": "validation images",
    "num_test": "test images",
    "shared_captions": "test captions that are training captions too",
    "repeated_captions": "captions that are equal to one of another image",
    "weights": "weights of the rows",
    "primary": "primary metric",
    "margin": "margin within which a method counts as not worse",
}


def thirds(compare: Compare) -> Html | None:
    """What each third tower is: size, preprocessing, and what it was trained on where `pretrain` wrote that."""
    rows = [(third["name"], _third(third)) for third in compare.get("thirds", [])]
    return definitions(rows) if rows else None


def _third(third: dict[str, Any]) -> str:
    image = third.get("image")
    reads = f"images of {image['size']} × {image['size']} pixels" if image else "captions"
    size, width = f"{third['num_parameters'] / 1e6:.2f} M parameters", f"{third['width']:,}"
    text = f"{third['spec']}: {size}, features {width} wide, reads {reads}"
    if image:
        mean, std = (", ".join(f"{value:g}" for value in image[name]) for name in ("mean", "std"))
        text += f" ({image['interpolation']}, mean {mean}, standard deviation {std})"
    trained = third.get("pretrained")
    if not trained:
        return text + "."
    accuracy = finite(trained.get("val/top1"))
    summary = f" {trained['summary']}" if trained.get("summary") else ""
    return (
        f"{text}. Pretrained here for {trained['steps']:,} steps on {trained['classes']:,} classes; "
        f"{percent(accuracy)} % of held-out images are classified correctly.{summary}"
    )


def settings(compare: Compare) -> Html:
    """What was the same for all runs, how learning rates were chosen, and the machine."""
    given_settings, machine = compare.get("settings", {}), compare.get("machine", {})
    rates = []
    for m in compare["methods"]:
        trials = [f"{lr}: {percent(finite(value))}" for lr, value in (m.get("lr_trials") or {}).items()]
        rates += [[label(compare, row_key(m)), _plain(m.get("lr")), ", ".join(trials)]] if trials else []
    created = str(compare.get("created", "–")).replace("T", " ")
    given = [("data", compare.get("data")), *given_settings.items(), ("created", created)]
    table = html_table(["method", "learning rate", "validation metric of each rate tried, percent"], rates)
    return join(
        tag("div", definitions(_pairs(given)), definitions(_pairs(machine.items())), class_="panels"),
        more("How each learning rate was chosen", table) if rates else None,
    )


def _pairs(items: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    known = ((name, value) for name, value in items if value is not None)
    return [(_SETTINGS.get(name, name.replace("_", " ")), _plain(value)) for name, value in known]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def reading(compare: Compare) -> Html:
    """The terms of the page, explained."""
    interval = (
        "A 95 % t-interval over seeds: how far the mean could move with other seeds."
        if num_seeds(compare) > 1
        else "A 95 % bootstrap interval over the test queries of one seed. It does not include the variation between "
        "training runs."
    )
    thirds = ", ".join(dict.fromkeys(m["third"] for m in compare["methods"] if m.get("third"))) or "none"
    words = {
        "R@k": "Share of queries with a right answer among the k highest-scoring candidates. In image → text the query "
        "is an image, in text → image it is a caption; mean is the average of both directions. Captions that differ in "
        "case and white space alone are equal, and each is right for the images of all.",
        "zero-shot top-1": "Share of images that score highest with the name of their own class. The methods are "
        "trained with captions, not with class labels.",
        "interval": interval,
        **TERMS,
        "third tower": f"A frozen pretrained model; here: {thirds}. A mismatched one was trained for another task.",
        "α": "Weight of the third tower: score = (1 − α) · main pair + α · third tower.",
        "cost at inference": "3T with α = 0 runs only the image and text towers, as the baseline does. With α > 0 the "
        "third tower also runs on every image. LiT always runs the pretrained tower, which is its image tower.",
    }
    return tag("div", definitions(words.items()), class_="prose")

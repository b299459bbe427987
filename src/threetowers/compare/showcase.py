"""The examples of a comparison (retrieval and sample images), and what is measured on a finished run."""

import time
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from threetowers.data.decode import decode
from threetowers.data.order import hash64
from threetowers.data.source import Source, Subset
from threetowers.data.transforms import normalise
from threetowers.errors import BadSample
from threetowers.evaluate.encode import captions_of, encode
from threetowers.files import replacing
from threetowers.run.finished import FinishedRun, load_run, restore_trained
from threetowers.run.setup import prepare
from threetowers.settings import read_config

NUM_QUERIES = 6
NUM_ANSWERS = 5
NUM_WORLD = 12
THUMBNAIL = 96


class ThirdChecks(NamedTuple):
    """Two checks of a finished run.

    identical: the main pair gives the same bits with and without the third tower. untouched: no gradient reached the
    third tower, and training left its weights as they were.
    """

    identical: bool
    untouched: bool


def showcase(
    systems: list[tuple[str, str, str, dict[str, Tensor]]], train: Source, test: Source, out: Path
) -> dict[str, Any]:
    """The entries `examples` and `world` of compare.json; their images are written to out/images.

    systems: method, third tower, label and features of each compared run, all on the same test data.
    """
    (out / "images").mkdir(exist_ok=True)
    return {"examples": _examples(systems, test, out), "world": _world(train, out)}


def _world(train: Source, out: Path) -> list[dict[str, Any]]:
    rows = []
    for index in (hash64("world", place) % len(train) for place in range(NUM_WORLD)):
        image = thumbnail(train, index, f"train-{index}", out)
        if image:
            rows.append({"image": image, "captions": list(train.record(index).captions)})
    return rows


def _examples(
    systems: list[tuple[str, str, str, dict[str, Tensor]]], test: Source, out: Path
) -> list[dict[str, Any]]:
    """A few queries in both directions, chosen by a hash and not by their answers."""
    first = systems[0][3]
    if "test/txt" not in first:
        return []
    text_image, text_group, index = (first[f"test/{name}"] for name in ("text_image", "text_group", "index"))
    captions = captions_of(test, index.tolist())
    queries = sorted(range(len(captions)), key=lambda i: hash64("example", i))[: 2 * NUM_QUERIES]

    def picture(row: int) -> str | None:
        return thumbnail(test, int(index[row]), f"test-{int(index[row])}", out)

    rows: list[dict[str, Any]] = []
    for place, query in enumerate(queries):
        truth = int(text_image[query])
        to_image = place % 2 == 0
        answers = []
        for method, third, label, tensors in systems:
            if to_image:
                scores = tensors["test/img"] @ tensors["test/txt"][query]
                right = torch.isin(torch.arange(len(scores)), text_image[text_group == text_group[query]])
            else:
                scores = tensors["test/txt"] @ tensors["test/img"][truth]
                right = torch.isin(text_group, text_group[text_image == truth])
            top = scores.topk(min(NUM_ANSWERS, len(scores)))
            items = [
                {
                    "image": picture(i) if to_image else None,
                    "text": None if to_image else captions[i],
                    "right": bool(right[i]),
                    "score": score,
                }
                for score, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            answers.append({"method": method, "third": third, "label": label, "items": items})
        rows.append({
            "direction": "t2i" if to_image else "i2t",
            "query": captions[query] if to_image else None,
            "query_image": None if to_image else picture(truth),
            "truth": picture(truth) if to_image else captions[query],
            "answers": answers,
        })  # fmt: skip
    return rows


def thumbnail(source: Source, index: int, name: str, out: Path) -> str | None:
    """Writes a small PNG of an image and returns its path relative to `out`; None for an image that cannot be read."""
    path = out / "images" / f"{name}.png"
    try:
        image = decode(source.image(index), source.record(index).id)
    except BadSample:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    with replacing(path) as file:
        image.save(file, "PNG")
    return str(path.relative_to(out))


@torch.inference_mode()
def inference_rate(finished: FinishedRun, num_images: int = 64, repeats: int = 3) -> float:
    """Images per second through the image tower at inference: the best of a few repeats after a warm-up."""
    spec = finished.architecture.image
    pixels = torch.randint(0, 256, (num_images, 3, spec.size, spec.size), dtype=torch.uint8)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        finished.img(normalise(pixels, spec))
        times.append(time.perf_counter() - start)
    return num_images / min(times[1:])


def third_checks(folder: Path, num_images: int = 64) -> ThirdChecks:
    """Checks the main pair and the third tower of a finished run, which has one."""
    setup = prepare(read_config(folder / "config.toml"), folder, saved_tokenizer=folder)
    restore_trained(setup.model, folder)
    source = setup.test if len(setup.test) else setup.train
    sample = Subset(source, array("q", range(min(len(source), num_images))), f"the first of {source.name}")
    beside = encode(setup.model, sample, setup.tokenizer, setup.thirds.stores(sample), setup.device)
    alone = load_run(folder, setup.device)
    images = [decode(sample.image(i), sample.record(i).id) for i in beside.index.tolist()]
    same_images = torch.equal(alone.encode_image(images), beside.views["img"])
    same_texts = torch.equal(alone.encode_text(beside.captions), beside.views["txt"])
    # the fingerprint was taken of the tower in memory after training; a freshly loaded tower is the one before it
    recorded = {third["view"]: third["fingerprint"] for third in alone.described["thirds"]}
    # runs of earlier versions have the fingerprint alone
    gradient = any(third.get("had_gradient", False) for third in alone.described["thirds"])
    return ThirdChecks(same_images and same_texts, not gradient and not setup.thirds.changed(recorded))

"""What the towers of one finished run know, measured on its test data; `analysis` compares what several runs know.

Representations are compared on images that each have one caption, the first one. A view of images has the image's
vector, and a view of texts that of the caption, so that row i of all views is the same pair.

Legend: n pairs that are compared, N images and M captions of the test data, D width.
"""

import json
from array import array
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from threetowers.compare.showcase import thumbnail
from threetowers.config import RunConfig
from threetowers.data.order import hash64
from threetowers.data.source import Source, Subset
from threetowers.errors import CheckpointError, DataError
from threetowers.evaluate.agreement import agreement, by_class, telling
from threetowers.evaluate.combine import combine, pair_of
from threetowers.evaluate.encode import Encoded, encode, encode_texts, samples_of_images, texts_of
from threetowers.evaluate.evaluation import SCHEMA as EVALUATION_SCHEMA
from threetowers.evaluate.evaluation import evaluate_run, open_labelled
from threetowers.evaluate.retrieval import Ranks, ranks_of, recalls
from threetowers.evaluate.similarity import (
    NEIGHBOURS,
    Representation,
    UndefinedError,
    alignment,
    modality_gap,
    principal_map,
    separability,
)
from threetowers.evaluate.statistics import bootstrap_difference
from threetowers.evaluate.zero_shot import DEFAULT_TEMPLATES, class_embeddings, label_ranks
from threetowers.objective.losses import unit
from threetowers.objective.pairs import method_label, tower_of
from threetowers.progress import Progress, warn
from threetowers.run.finished import changed_parts, read_description, restore_trained
from threetowers.run.setup import Setup, assemble, autocast
from threetowers.settings import read_config
from threetowers.towers.weights import read_safetensors
from threetowers.train.checkpoint import checkpoints, restore_model

PAIRS = 2_000
"""Pairs that representations are compared on: of more test images, a part is drawn."""
LEAST = 4
"""Pairs that are needed."""
POINTS = 200  # pairs of a map
CHECKPOINTS = 20  # of a run
EXAMPLES = 4  # of each kind


class Pairs(NamedTuple):
    """The n pairs that are compared: rows of the images and of the captions, int64 [n] both.

    sample: of each caption, the sample of the source whose first caption it is, int64 [n].
    """

    image: Tensor
    text: Tensor
    sample: np.ndarray


class Tower(NamedTuple):
    """A frozen tower of a run: its view, the name that people know it by, what it reads, and its fingerprint."""

    view: str
    name: str
    reads: str
    fingerprint: str


@dataclass(eq=False)
class Analysed:
    """A run with what was measured on it.

    views: its representations by name, the frozen towers' own included. ranks: of the main pair. index: int64 [N], the
    test images that could be read. figures: an entry of `runs` in analysis.json. points: for each frozen tower, by how
    much it disagrees with the main pair, and what combining gains.
    """

    name: str
    method: str
    label: str
    views: dict[str, Representation]
    towers: list[Tower]
    ranks: Ranks
    index: Tensor
    figures: dict[str, Any] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)


def analyse_run(folder: Path, name: str, out: Path) -> Analysed:
    """Measures what the towers of a finished run know; its pictures are written into `out`/images.

    Raises CheckpointError and DataError as `analysis.analyse` does.
    """
    described, evaluation = read_description(folder), _evaluation(folder)
    config = read_config(folder / "config.toml")
    setup = _open(folder, config, described)
    tensors = read_safetensors(folder / "features.safetensors")
    encoded, pairs = _encoded(tensors, described, setup.test, folder)
    views = _views(encoded, pairs, setup)
    towers = [Tower(t["view"], _tower_name(t), t["reads"], t["fingerprint"]) for t in described["thirds"]]
    label = method_label(config.method, ", ".join(tower.name for tower in towers))
    run = Analysed(name, config.method, label, views, towers, ranks_of(encoded), encoded.index)
    rows = [(a, b) for a, b, *_ in described["rows"]]
    run.figures = {
        "name": name,
        "method": config.method,
        "label": label,
        "seed": config.seed,
        "steps": config.steps,
        "towers": [tower._asdict() for tower in towers],
        "metrics": evaluation["test"],
        "repeated_captions": evaluation["repeated_captions"].get("test"),
        "views": [{"view": view, **each.space()} for view, each in views.items()],
        "similarity": [{"a": a, "b": b, **views[a].similarity(views[b])} for a, b in combinations(views, 2)],
        "rows": [{"a": a, "b": b, **_space_of_pair(views[a].features, views[b].features)} for a, b in rows],
        "maps": [found for a, b in rows if (found := _map(a, b, views))],
        "agreement": [],
        "classes": [],
        "examples": [],
    }
    for tower in towers:
        if tower.view in encoded.systems():
            alpha = evaluation["combination"].get(tower.view, {}).get("alpha")
            _compare_systems(run, encoded, tower, alpha, setup.test, out)
            run.figures["classes"] += _classes(setup, tower, tensors)
    run.figures["checkpoints"] = _over_steps(folder, run, setup, pairs)
    return run


def _tower_name(third: dict[str, Any]) -> str:
    """The name that the settings give a frozen tower, or the end of what they say it is."""
    own = str(third["view"]).removeprefix("third").removeprefix("_")
    return own or str(third["spec"]).rstrip("/").replace(":", "/").rpartition("/")[2]


def _evaluation(folder: Path) -> dict[str, Any]:
    """The contents of evaluation.json; the run is evaluated where that is missing or of an earlier version."""
    for _ in range(2):
        try:
            found: dict[str, Any] = json.loads((folder / "evaluation.json").read_bytes())
        except (OSError, ValueError):
            found = {}
        if found.get("schema") == EVALUATION_SCHEMA and (folder / "features.safetensors").is_file():
            return found
        evaluate_run(folder)
    raise CheckpointError(f"{folder}: evaluation.json cannot be read after the evaluation")


def _open(folder: Path, config: RunConfig, described: dict[str, Any]) -> Setup:
    """The configuration made real, with the trained weights; raises CheckpointError where something has changed."""
    setup = assemble(config, folder, saved_tokenizer=folder)
    restore_trained(setup.model, folder)
    changed = changed_parts(described["data"], setup.parts())
    towers = setup.thirds.changed({third["view"]: third["fingerprint"] for third in described["thirds"]})
    if changed or towers:
        raise CheckpointError(
            f"{folder}: {', '.join([*changed, *(f'third tower {tower}' for tower in towers)])}: not what this run was "
            "trained with. Put it back, so that the figures are about the trained model"
        )
    return setup


def _encoded(
    tensors: dict[str, Tensor], described: dict[str, Any], test: Source, folder: Path
) -> tuple[Encoded, Pairs]:
    """The test data as the evaluation encoded it, and the pairs that are compared."""
    if "test/text_image" not in tensors:
        raise DataError(
            f"{folder}: there are no test images with captions, on which towers could be compared"
        )
    views = {name.removeprefix("test/"): value for name, value in tensors.items() if name.startswith("test/")}
    text_image, index = views.pop("text_image"), views.pop("index")
    views.pop("text_group")
    texts = texts_of(test, index.tolist(), samples_of_images(test, merge=True))
    if not torch.equal(torch.tensor(texts.rows), text_image):
        raise CheckpointError(
            f"{folder / 'features.safetensors'}: is not of the run's test data; evaluate it again"
        )
    reads_texts = frozenset(third["view"] for third in described["thirds"] if third["reads"] == "texts")
    encoded = Encoded(views, text_image, index, texts.captions, [], reads_texts)
    captioned, first = np.unique(text_image.numpy(), return_index=True)
    chosen = np.sort(sorted(range(len(captioned)), key=lambda i: hash64("analysis", i))[:PAIRS])
    if len(chosen) < LEAST:
        raise DataError(
            f"{folder}: {len(chosen)} captioned test images; at least {LEAST} are needed to compare towers"
        )
    text = first[chosen]
    sample = np.array(texts.samples)[text]
    return encoded, Pairs(torch.from_numpy(captioned[chosen]), torch.from_numpy(text), sample)


def _k(num: int) -> int:
    return min(NEIGHBOURS, num - 1)


def _views(encoded: Encoded, pairs: Pairs, setup: Setup) -> dict[str, Representation]:
    """Every view of the pairs: those that the objective compares first, then the frozen towers' own features."""
    found: dict[str, Tensor] = {}
    for view in sorted(encoded.views, key=[*setup.model.objective.views(), *encoded.views].index):
        of_texts = tower_of(view) in ("txt", *encoded.text_thirds)
        found[view] = encoded.views[view][pairs.text if of_texts else pairs.image]
    for view, store in setup.thirds.stores(setup.test).items():
        samples = pairs.sample if store.side == "text" else encoded.index[pairs.image].numpy()
        found[view] = unit(store.rows(samples))
    return {view: Representation(features, _k(len(features))) for view, features in found.items()}


def _space_of_pair(a: Tensor, b: Tensor) -> dict[str, float]:
    return {"alignment": alignment(a, b), "gap": modality_gap(a, b), "separability": separability(a, b)}


def _map(a: str, b: str, views: dict[str, Representation]) -> dict[str, Any] | None:
    """Both views of some pairs along the two directions of largest variance; None where there are none."""
    first, second = (views[view].features[:POINTS] for view in (a, b))
    try:
        found = principal_map(torch.cat([first, second]))
    except UndefinedError:
        return None
    points = [[round(x, 4), round(y, 4)] for x, y in found.points.tolist()]
    return {
        "a": a,
        "b": b,
        "shares": found.shares,
        "of_a": points[: len(first)],
        "of_b": points[len(first) :],
    }


def _compare_systems(
    run: Analysed, encoded: Encoded, tower: Tower, alpha: float | None, test: Source, out: Path
) -> None:
    """Adds where the main pair and a frozen tower read through the heads are right, and what combining them gains."""
    pair = pair_of(encoded, tower.view)
    main, side, *combined = combine(pair, [0.0, 1.0, *([] if alpha is None else [alpha])])
    hits = [ranks.hits() for ranks in (main, side, *combined)]
    found = []
    for place, direction in enumerate(("i2t", "t2i")):
        first, second, *third = (each[place] for each in hits)
        images = main.images()[place]
        figures = agreement(first, second, combined=third[0] if third else None, images=images)
        found.append(figures)
        run.figures["agreement"].append(
            {"tower": tower.name, "direction": direction, "alpha": alpha, **figures}
        )
    run.figures["examples"] += _examples(encoded, tower, main, side, test, out)
    kappas, rescued = ([each[name] for each in found] for name in ("kappa", "rescued"))
    if combined and all(kappas) and all(rescued) and main.num_independent() > 1:
        gain = bootstrap_difference(hits[2], hits[0], images=main.images())
        own = "txt" if tower.reads == "texts" else "img"
        run.points.append({
            "run": run.name, "method": run.method, "label": run.label, "tower": tower.name,
            "kappa": _mean(kappas), "rescued": _mean(rescued),
            "cka": run.views[own].similarity(run.views[tower.view])["cka"],
            "gain": dict(gain._asdict()),
            "gain_over_better": gain.mean - max(0.0, _mean_recall(side) - _mean_recall(main)),
        })  # fmt: skip


def _mean(intervals: list[dict[str, Any]]) -> float:
    return float(np.mean([each["mean"] for each in intervals]))


def _mean_recall(ranks: Ranks) -> float:
    return recalls(ranks, ks=(1,))["mean_r@1"]


def _examples(
    encoded: Encoded, tower: Tower, main: Ranks, side: Ranks, test: Source, out: Path
) -> list[dict[str, Any]]:
    """The images that tell the main pair and a frozen tower apart most, with the caption that each of them finds."""
    captioned = torch.unique(encoded.text_image).tolist()
    systems = {"main": (main.i2t, encoded.system("main")), "tower": (side.i2t, encoded.system(tower.view))}
    rows = []
    for right, wrong in (("main", "tower"), ("tower", "main")):
        for query in telling(systems[right][0], systems[wrong][0], main.i2t_image, EXAMPLES):
            row = captioned[query]
            answers = {}
            for name, (ranks, (image, text)) in systems.items():
                best = int((text.double() @ image[row].double()).argmax())
                answers[name] = {"text": encoded.captions[best], "rank": int(ranks[query]) + 1}
            own = (encoded.text_image == row).nonzero().flatten().tolist()
            sample = int(encoded.index[row])
            picture = thumbnail(test, sample, f"test-{sample}", out)
            rows.append({
                "tower": tower.name, "right": right, "image": picture,
                "captions": [encoded.captions[i] for i in own], "answers": answers,
            })  # fmt: skip
    return rows


def _classes(setup: Setup, tower: Tower, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """By class, where zero-shot classification by the main pair and by a frozen tower is right; empty without classes.

    Only for a tower of images, whose features of the labelled images are stored.
    """
    labelled = open_labelled(setup.config)
    main = tensors.get("classes/rank")
    if labelled is None or main is None or tower.reads == "texts":
        return []
    stores = {view: each for view, each in setup.thirds.stores(labelled).items() if each.side == "image"}
    index = np.flatnonzero(np.logical_and.reduce([store.usable for store in stores.values()]))
    if len(index) != len(main):
        warn(
            f"{setup.config.classes}: other labelled images than when the run was evaluated; classes are left out"
        )
        return []
    with torch.no_grad():
        rows = stores[tower.view].rows(index).to(setup.device)
        image = setup.model.view(f"{tower.view}@txt", setup.model.features(thirds={tower.view: rows})).cpu()
    precision = autocast(setup.config, setup.device)

    def encode_prompts(texts: list[str]) -> Tensor:
        view = f"txt@{tower.view}"
        return encode_texts(setup.model, texts, setup.tokenizer, setup.device, view, autocast=precision)

    names = labelled.class_names
    classes = class_embeddings(encode_prompts, names, labelled.templates or DEFAULT_TEMPLATES)
    labels = torch.tensor([labelled.record(i).label for i in index.tolist()])
    side = label_ranks(image, classes, labels)
    found = by_class((main < 1).numpy(), (side < 1).numpy(), labels.numpy(), names)
    return [{"tower": tower.name, **row} for row in found]


def _over_steps(folder: Path, run: Analysed, setup: Setup, pairs: Pairs) -> list[dict[str, Any]]:
    """What the main pair was like at the checkpoints of training; empty where fewer than two are left.

    It replaces the weights of the model. Recall is among the compared images alone.
    """
    root = folder / "checkpoints"
    steps = sorted(int(path.name.removeprefix("step-")) for path in checkpoints(root))
    if len(steps) < 2:
        return []
    steps = [
        steps[i] for i in np.linspace(0, len(steps) - 1, min(len(steps), CHECKPOINTS)).round().astype(int)
    ]
    part = Subset(setup.test, array("q", pairs.sample.tolist()), f"the compared images of {setup.test.name}")
    stores = {view: store.part(pairs.sample) for view, store in setup.thirds.stores(setup.test).items()}
    bar = Progress(f"{run.name}: checkpoints", len(steps), "checkpoints", quiet_seconds=5)
    found = []
    for done, step in enumerate(steps, 1):
        try:
            restore_model(root, step, setup.model)
        except CheckpointError as error:
            warn(f"{folder}: {error}; this step is left out")
            continue
        encoded = encode(
            setup.model, part, setup.tokenizer, stores, setup.device, workers=setup.config.inputs.workers,
            autocast=autocast(setup.config, setup.device), merge=False, kept=setup.kept_views(part),
        )  # fmt: skip
        first = np.unique(encoded.text_image.numpy(), return_index=True)[1]
        img, txt = encoded.views["img"], encoded.views["txt"][first]
        main = {
            view: Representation(vectors, run.views["img"].k)
            for view, vectors in (("img", img), ("txt", txt))
        }
        beside = {tower.view: run.views[tower.view] for tower in run.towers}
        similar = [("img", "txt", main["txt"])]
        similar += [(view, name, other) for name, other in beside.items() for view in main]
        found.append({
            "step": step,
            "mean_r@1": _mean_recall(ranks_of(encoded)),
            "gap": modality_gap(img, txt),
            "similarity": [{"a": a, "b": b, **main[a].similarity(other)} for a, b, other in similar],
            "effective_rank": {view: each.space()["effective_rank"] for view, each in main.items()},
        })  # fmt: skip
        bar.update(done)
    return found

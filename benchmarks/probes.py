"""Our evaluators beside those of CLIP_benchmark and scikit-learn, on the same features.

    python benchmarks/probes.py [--train 4000] [--test 2000] [--width 256] [--classes 20] [--rounds 2] [--out FILE]

`zero-shot` and `retrieval` (two captions for each image) are CLIP_benchmark's own `evaluate` with a model that looks
its features up. `plain` features are noisy copies of the vector of their class or image. In `ties` classes come in
pairs with one vector, and captions in tens: CLIP_benchmark takes what its sort puts first, we count a tie against the
model. `correlated` features have a few strong directions and many faint ones, all of which tell as much of the class.
`digits` are the pixels of scikit-learn's 1,797 digits. CLIP_benchmark's linear probe trains with AdamW for ten epochs
on normalised features and asks for a GPU: its functions run here with `.cuda()` doing nothing, in the order of its
`evaluate` and with its defaults. `one fit` has the regularisation that we chose. Contenders take turns in this process.
CLIP_benchmark is left out where it is not installed (`pip install --no-deps clip_benchmark`) or numpy is not below 2.4,
with which its accuracy fails.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.utils.data import DataLoader

from measure import interleaved, write
from threetowers.compare.machine import machine
from threetowers.evaluate.detection import auroc
from threetowers.evaluate.linear_probe import fit_logistic, linear_probe
from threetowers.evaluate.neighbours import nearest, predict
from threetowers.evaluate.retrieval import ranks_from_features, recalls
from threetowers.evaluate.ridge import Samples, standardiser
from threetowers.evaluate.zero_shot import accuracy, label_ranks
from threetowers.objective.losses import unit

TABLES = {
    "metrics": (
        "Zero-shot classification and retrieval: the `value` of a figure, its `difference` to ours, and the `seconds` "
        "of the fastest round, which all figures of a contender share."
    ),
    "probes": "The same of what is fitted on features, and of scores of images.",
}
"""The sentence that docs/benchmarks.md puts before each table."""
K = 20
CAPTIONS = 2
RECALLS = (1, 5)
Figures = dict[str, float]


class Batches(list[tuple[Tensor, Any]]):
    """What CLIP_benchmark takes for a data loader: batches of images and labels, or of images and lists of captions."""

    def __init__(self, image: Tensor, targets: Any, classes: list[str] | None = None) -> None:
        super().__init__((image[i : i + 64], targets[i : i + 64]) for i in range(0, len(image), 64))
        self.dataset = SimpleNamespace(classes=classes)


def known_model(text: Tensor) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """A model whose images are their features and whose texts are numbers of rows, and its tokenizer."""
    model = SimpleNamespace(encode_image=lambda image: image, encode_text=lambda rows: text[rows])
    return model, lambda texts: torch.tensor([int(each) for each in texts])


def peer(name: str) -> ModuleType | None:
    """A module of CLIP_benchmark's metrics, or None where it cannot be used."""
    if importlib.util.find_spec("clip_benchmark") is None or np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return None
    return importlib.import_module(f"clip_benchmark.metrics.{name}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the peers' progress bars and lines."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """`.cuda()` leaves everything where it is."""
    before = torch.Tensor.cuda, torch.nn.Module.cuda
    try:
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
        yield
    finally:
        torch.Tensor.cuda, torch.nn.Module.cuda = before  # type: ignore[method-assign]


def measured(
    task: str, features: str, contenders: Mapping[str, Callable[[], Figures]], rounds: int
) -> list[dict[str, Any]]:
    """Rows of all contenders, the first of which is ours."""
    found: dict[str, Figures] = {}

    def kept(name: str) -> None:
        found[name] = contenders[name]()

    steps = {name: lambda name=name: kept(name) for name in contenders}
    times = interleaved(steps, rounds, torch.device("cpu"), warm_ups=0)
    own = next(iter(found.values()))
    rows = []
    for name, figures in found.items():
        for figure, value in figures.items():
            rows.append(
                {
                    "task": task, "features": features, "contender": name, "figure": figure, "value": value,
                    "difference": value - own[figure], "seconds": min(times[name]),
                }
            )  # fmt: skip
            print(
                "  ".join(
                    f"{each:.4g}" if isinstance(each, float) else f"{each}" for each in rows[-1].values()
                )
            )
    return rows


def zero_shot(options: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    classes = unit(torch.randn(options.classes, options.width, generator=generator))
    if kind == "ties":
        classes = classes[torch.arange(options.classes) // 2]
    labels = torch.randint(0, options.classes, (options.test,), generator=generator)
    noise = torch.randn(options.test, options.width, generator=generator) / options.width**0.5
    image = unit(classes[labels] + 4 * noise)

    def ours() -> Figures:
        return accuracy(label_ranks(image, classes, labels), labels, options.classes)

    contenders = {"ours": ours}
    theirs = peer("zeroshot_classification")
    if theirs is not None:
        names = [str(row) for row in range(options.classes)]

        def clip_benchmark() -> Figures:
            model, tokenizer = known_model(classes)
            batches = Batches(image, labels, names)
            with quiet():
                found = theirs.evaluate(model, batches, tokenizer, names, ["{c}"], "cpu", amp=False)
            renamed = {"top1": "acc1", "top5": "acc5", "mean_per_class": "mean_per_class_recall"}
            return {name: float(found[other]) for name, other in renamed.items() if np.isfinite(found[other])}

        contenders["CLIP_benchmark"] = clip_benchmark
    return measured("zero-shot", kind, contenders, options.rounds)


def retrieval(options: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    image = unit(torch.randn(options.test, options.width, generator=generator))
    owner = torch.arange(options.test).repeat_interleave(CAPTIONS)
    noise = torch.randn(len(owner), options.width, generator=generator) / options.width**0.5
    text = unit(image[owner] + 4 * noise)
    if kind == "ties":
        text = text[torch.arange(len(text)) % max(2, len(text) // 10)]

    def ours() -> Figures:
        found = recalls(ranks_from_features(image, text, owner), RECALLS)
        return {name: value for name, value in found.items() if name != "mean_r@1"}

    contenders = {"ours": ours}
    theirs = peer("zeroshot_retrieval")
    if theirs is not None:

        def clip_benchmark() -> Figures:
            model, tokenizer = known_model(text)
            captions = [[str(CAPTIONS * i + j) for j in range(CAPTIONS)] for i in range(len(image))]
            with quiet():
                found = theirs.evaluate(
                    model, Batches(image, captions), tokenizer, "cpu", amp=False, recall_k_list=list(RECALLS)
                )
            names = {"t2i": "image_retrieval_recall", "i2t": "text_retrieval_recall"}
            return {f"{side}_r@{k}": found[f"{name}@{k}"] for side, name in names.items() for k in RECALLS}

        contenders["CLIP_benchmark"] = clip_benchmark
    return measured("retrieval", kind, contenders, options.rounds)


def parts(options: argparse.Namespace, kind: str) -> tuple[Samples, Samples, Samples]:
    """Training, validation and test features of `plain`, `correlated` or `digits`."""
    generator = torch.Generator().manual_seed(2)
    sizes = [options.train, options.train // 4, options.test]
    if kind == "digits":
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=generator)[: sum(sizes)]
        everything = Samples(
            torch.from_numpy(digits.data).float()[order], torch.from_numpy(digits.target).long()[order]
        )
        sizes = [len(order) * size // sum(sizes) for size in sizes[:2]]
        sizes.append(len(order) - sum(sizes))
    else:
        labels = torch.randint(0, options.classes, (sum(sizes),), generator=generator)
        centres = torch.randn(options.classes, options.width, generator=generator)
        noise = torch.randn(sum(sizes), options.width, generator=generator)
        features = centres[labels] + (4 if kind == "plain" else 2) * noise
        if kind == "correlated":
            turn = torch.linalg.qr(torch.randn(options.width, options.width, generator=generator))[0]
            features = features / torch.arange(1, options.width + 1) @ turn
        everything = Samples(features, labels)
    sides = zip(everything.features.split(sizes), everything.labels.split(sizes), strict=True)
    train, val, test = (Samples(*side) for side in sides)
    return train, val, test


def their_probe(module: ModuleType, train: Samples, val: Samples, test: Samples, num_classes: int) -> Figures:
    """CLIP_benchmark's linear probe with its default settings, in the order of its `evaluate`."""
    torch.manual_seed(0)
    sides = [
        (torch.nn.functional.normalize(each.features, dim=1), each.labels) for each in (train, val, test)
    ]
    both = (torch.cat([sides[0][0], sides[1][0]]), torch.cat([sides[0][1], sides[1][1]]))
    of_train, of_val, of_test, of_both = (
        DataLoader(module.FeatureDataset(*side), batch_size=64, shuffle=True) for side in (*sides, both)
    )
    shape = train.features.shape[1], num_classes
    decays = np.logspace(-6, 2, num=97).tolist()
    first = np.logspace(-6, 2, num=7).tolist()
    settings = (*shape, 0.1, 10, False, "cpu", False, 0)

    def peak(places: list[int]) -> int:
        return int(module.find_peak(decays, places, of_train, of_val, *settings))

    with without_gpu(), quiet():
        best = peak([place for place, decay in enumerate(decays) if decay in first])
        for span in (8, 4, 2, 1):
            best = peak([max(best - span, 0), best, min(best + span, len(decays) - 1)])
        fitted = module.train(of_both, *shape, decays[best], 0.1, 10, False, "cpu", 0)
        logits, labels = module.infer(fitted, of_test, False, "cpu")
    return {"accuracy": float((logits.argmax(1) == labels).double().mean())}


def probe(options: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    train, val, test = parts(options, kind)
    count = int(train.labels.max()) + 1
    contenders = {"ours": lambda: {"accuracy": linear_probe(train, val, test, count).accuracy}}
    theirs = peer("linear_probe")
    if theirs is not None:
        contenders["CLIP_benchmark"] = lambda: their_probe(theirs, train, val, test, count)
    return measured("linear probe", kind, contenders, options.rounds)


def one_fit(options: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    train, val, test = parts(options, kind)
    ours = linear_probe(train, val, test, options.classes)
    value, scale = ours.inverse_penalty, standardiser(train.features)
    expected = ours.chosen.logits(test.features).softmax(1).numpy()

    def off(found: np.ndarray) -> Figures:
        return {"largest difference of a probability": float(np.abs(found - expected).max())}

    def fit_ours() -> Figures:
        fitted = fit_logistic(train, options.classes, value)
        return off(fitted.logits(test.features).softmax(1).numpy())

    def sklearn(**settings: Any) -> Callable[[], Figures]:
        def fit() -> Figures:
            model = LogisticRegression(C=value, max_iter=10_000, **settings)
            with quiet():
                model.fit(scale(train.features).numpy(), train.labels.numpy())
            return off(model.predict_proba(scale(test.features).numpy()))

        return fit

    fits = {
        "ours": fit_ours,
        "scikit-learn, L-BFGS, tol 1e-4": sklearn(),
        "scikit-learn, Newton, tol 1e-12": sklearn(tol=1e-12, solver="newton-cg"),
    }
    return measured("one fit", kind, fits, options.rounds)


def neighbours(options: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    train, _, test = parts(options, kind)
    k = min(K, options.train)
    expected = predict(nearest(test.features, train.features, k), train.labels, options.classes, k).numpy()

    def ours() -> Figures:
        found = predict(nearest(test.features, train.features, k), train.labels, options.classes, k)
        return {"accuracy": float((found == test.labels).double().mean()), "share of other predictions": 0.0}

    def sklearn() -> Figures:
        model = KNeighborsClassifier(k, metric="cosine")
        model.fit(train.features.double().numpy(), train.labels.numpy())
        found = model.predict(test.features.double().numpy())
        return {
            "accuracy": float((found == test.labels.numpy()).mean()),
            "share of other predictions": float((found != expected).mean()),
        }

    return measured("neighbours", kind, {"ours": ours, "scikit-learn": sklearn}, options.rounds)


def detection(options: argparse.Namespace) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    inside = torch.randn(10 * options.test, generator=generator).mul(50).round()
    outside = torch.randn(10 * options.test, generator=generator).sub(1).mul(50).round()
    truth = np.repeat([1, 0], len(inside))
    contenders = {
        "ours": lambda: {"AUROC": auroc(inside, outside)},
        "scikit-learn": lambda: {"AUROC": float(roc_auc_score(truth, torch.cat([inside, outside]).numpy()))},
    }
    return measured("AUROC", "ties", contenders, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/probes.json"))
    options = parser.parse_args()
    if peer("zeroshot_retrieval") is None:
        print("CLIP_benchmark is left out: it is not installed, or numpy is not below 2.4")
    metrics, probes = [], []
    for kind in ("plain", "ties"):
        metrics += zero_shot(options, kind) + retrieval(options, kind)
    for kind in ("plain", "correlated", "digits"):
        probes += probe(options, kind)
    probes += one_fit(options, "correlated") + neighbours(options, "plain") + detection(options)
    packages = [name for name in ("clip_benchmark", "scikit-learn") if _installed(name)]
    result = {
        "machine": machine("cpu"),
        **{name: getattr(options, name) for name in ("train", "test", "width", "classes", "rounds")},
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "metrics": metrics,
        "probes": probes,
    }
    write(options.out, result)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name.replace("scikit-learn", "sklearn")) is not None


if __name__ == "__main__":
    main()

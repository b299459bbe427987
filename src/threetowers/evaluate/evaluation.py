"""The evaluation of a finished run: retrieval, the convex combination, zero-shot classification; one JSON beside it."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from threetowers.config import read_config
from threetowers.data.open import open_source
from threetowers.data.source import Source
from threetowers.evaluate.combine import Pair, Sweep, sweep
from threetowers.evaluate.encode import Encoded, encode, encode_texts
from threetowers.evaluate.results import clip_benchmark_result
from threetowers.evaluate.retrieval import System, ranks_from_features, recalls
from threetowers.evaluate.zero_shot import accuracy, class_embeddings, label_ranks, per_class_accuracy
from threetowers.files import disk_errors
from threetowers.run.finished import read_description, restore_trained
from threetowers.run.setup import Prepared, open_classes, prepare

SCHEMA = 1
DEFAULT_TEMPLATES = ("a photo of a {}.",)


@dataclass
class Evaluation:
    """The figures of one run; every metric is a share in [0, 1].

    val, test: retrieval of the main pair. combination: by third tower, the sweep over α with `alphas`, `val`, `test`,
    the `alpha` that validation chose, `chosen` (test at that α) and `ends`. zero_shot: of the main pair.
    """

    data: str
    num_val: int
    num_test: int
    val: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    combination: dict[str, dict[str, Any]] = field(default_factory=dict)
    zero_shot: dict[str, float] = field(default_factory=dict)
    per_class: dict[str, float] = field(default_factory=dict)
    num_bad: int = 0

    def text(self) -> str:
        """The figures as a few lines for a terminal."""
        lines = []
        for part, num, values in (("validation", self.num_val, self.val), ("test", self.num_test, self.test)):
            if values:
                figures = ", ".join(f"{name} {value:.1%}" for name, value in values.items())
                lines.append(f"retrieval on {num} {part} images: {figures}")
            else:
                lines.append(f"no {part} images with captions, so no retrieval on them")
        for third, result in self.combination.items():
            lines.append(
                f"with {third} combined: α = {result['alpha']:g} chosen on validation, test mean_r@1 "
                f"{result['chosen']:.1%} (main pair alone {result['ends'][0]:.1%}, {third} alone "
                f"{result['ends'][1]:.1%}); α > 0 runs the frozen tower at inference"
            )
        if self.zero_shot:
            lines.append(
                "zero-shot: " + ", ".join(f"{name} {value:.1%}" for name, value in self.zero_shot.items())
            )
        if self.num_bad:
            lines.append(f"{self.num_bad} images could not be read and are left out")
        return "\n".join(lines)


def evaluate_run(folder: Path, *, data: str = "none", classes: str = "none") -> Evaluation:
    """Evaluates a finished run and writes evaluation.json and features.safetensors into its folder.

    data: other images and captions to test on (written to no file then); classes: other labelled images.
    Raises CheckpointError for an unfinished run and DataError for unusable data.
    """
    read_description(folder)
    config = read_config(folder / "config.toml")
    if classes != "none":
        config = replace(config, classes=classes)
    run = prepare(config, folder, saved_tokenizer=folder)
    restore_trained(run.model, folder)
    own = data == "none" and classes == "none"
    image_column = None if config.inputs.image_column == "none" else config.inputs.image_column
    test = run.test if data == "none" else open_source(
        data, image_column=image_column, caption_columns=config.inputs.caption_columns
    )  # fmt: skip
    result, encoded, class_ranks = evaluate(run, test)
    if own:
        save_features(folder / "features.safetensors", encoded, class_ranks)
        written = asdict(result) | {"schema": SCHEMA, "clip_benchmark": _clip_benchmark(result, folder)}
        partial = folder / ".evaluation.json.partial"
        partial.write_text(json.dumps(written, indent=2, ensure_ascii=False), encoding="utf-8")
        partial.replace(folder / "evaluation.json")
    return result


def evaluate(run: Prepared, test: Source) -> tuple[Evaluation, dict[str, Encoded], Tensor | None]:
    """The figures of a prepared run with trained weights, and what they were computed from.

    That is what was encoded of `val` and `test`, and the rank of the right class of every labelled image, int64 [N].
    """
    encoded = {
        part: _encode(run, source) for part, source in (("val", run.val), ("test", test)) if len(source)
    }
    encoded = {part: each for part, each in encoded.items() if each.captions}
    result = Evaluation(data=test.name, num_val=len(run.val), num_test=len(test))
    for part, each in encoded.items():
        setattr(result, part, recalls(ranks_from_features(*each.system("main"), each.text_image)))
        result.num_bad += len(each.bad)
    if encoded.keys() == {"val", "test"}:
        for third in encoded["test"].systems()[1:]:
            swept = sweep(pair_of(encoded["val"], third), pair_of(encoded["test"], third))
            result.combination[third] = sweep_figures(swept)
    labelled = open_classes(run.config)
    class_ranks = None
    if labelled is not None:
        result.zero_shot, result.per_class, class_ranks = _zero_shot(run, labelled)
    return result, encoded, class_ranks


def pair_of(encoded: Encoded, third: str) -> Pair:
    """The main pair and a third tower through the heads, as the two systems of a combination."""
    return Pair(System(*encoded.system("main")), System(*encoded.system(third)), encoded.text_image)


def sweep_figures(swept: Sweep) -> dict[str, Any]:
    """A sweep over α in plain values, as evaluation.json and compare.json hold it."""
    return {
        "alphas": list(swept.alphas),
        "val": list(swept.val),
        "test": list(swept.test),
        "alpha": swept.alpha,
        "chosen": swept.chosen,
        "ends": list(swept.ends),
    }


def save_features(path: Path, encoded: dict[str, Encoded], class_ranks: Tensor | None) -> None:
    """Writes every view of every part as `PART/VIEW`, with `PART/text_image`, `PART/index` and `classes/rank`."""
    tensors: dict[str, Tensor] = {} if class_ranks is None else {"classes/rank": class_ranks}
    for part, each in encoded.items():
        tensors |= {f"{part}/{view}": value.contiguous() for view, value in each.views.items()}
        tensors |= {f"{part}/text_image": each.text_image, f"{part}/index": each.index}
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(partial):
        save_file(tensors, partial)
    partial.replace(path)


def _encode(run: Prepared, source: Source) -> Encoded:
    return encode(
        run.model,
        source,
        run.tokenizer,
        run.stores(source),
        run.device,
        workers=run.config.inputs.workers,
        autocast=run.autocast(),
    )


def _zero_shot(run: Prepared, labelled: Source) -> tuple[dict[str, float], dict[str, float], Tensor]:
    """Accuracy of the main pair on labelled images, overall and by class name, and the right classes' ranks."""
    encoded = _encode(run, labelled)
    classes = class_embeddings(
        lambda texts: encode_texts(run.model, texts, run.tokenizer, run.device),
        labelled.class_names,
        labelled.templates or DEFAULT_TEMPLATES,
    )
    labels = torch.tensor([_label(labelled, int(i)) for i in encoded.index])
    image = encoded.views["img"]
    per_class = per_class_accuracy(image, classes, labels)
    named = {name: float(v) for name, v in zip(labelled.class_names, per_class, strict=True) if not v.isnan()}
    return accuracy(image, classes, labels), named, label_ranks(image, classes, labels)


def _label(source: Source, index: int) -> int:
    label = source.record(index).label
    return -1 if label is None else label


def _clip_benchmark(result: Evaluation, folder: Path) -> list[dict[str, Any]]:
    rows = []
    if result.test:
        rows.append(clip_benchmark_result(result.data, str(folder), "", "zeroshot_retrieval", result.test))
    if result.zero_shot:
        rows.append(
            clip_benchmark_result("classes", str(folder), "", "zeroshot_classification", result.zero_shot)
        )
    return rows

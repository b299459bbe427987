"""The evaluation of a finished run: every evaluator of one list, and the files that hold what they found."""

import json
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threetowers.config import RunConfig
from threetowers.data.decode import decode
from threetowers.data.open import open_source
from threetowers.data.source import Source, Subset, count_reasons
from threetowers.errors import BadSample, CheckpointError, DataError
from threetowers.evaluate.clip_benchmark import clip_benchmark_result
from threetowers.evaluate.combine import combination
from threetowers.evaluate.encode import Encoded, EvaluationData, Labelled, encode, encode_texts
from threetowers.evaluate.ranked import Rankings
from threetowers.evaluate.result import Result
from threetowers.evaluate.retrieval import ranks_from_features, recalls, retrieval
from threetowers.evaluate.suite.live import describe_watched, open_watched
from threetowers.evaluate.zero_shot import DEFAULT_TEMPLATES, check_prompts, class_embeddings, zero_shot
from threetowers.files import write_whole
from threetowers.heartbeats import PLACE
from threetowers.processes import ALONE, Processes
from threetowers.progress import warn
from threetowers.run.finished import changed_parts, read_description, restore_trained
from threetowers.run.setup import Setup, autocast, check_enough, open_data, prepare, world
from threetowers.settings import read_config
from threetowers.towers.weights import write_safetensors

SCHEMA = 2
"""Of evaluation.json, and of the figures in it: 1 took equal captions of different images for wrong answers."""
TRIED = 100  # images of which one at least must be readable


@dataclass(frozen=True)
class Evaluator:
    """A function from what was encoded to figures, and the sections of evaluation.json that it fills.

    It returns None when the data that it needs are missing; its sections are empty then.
    """

    measure: Callable[[EvaluationData], Result | None]
    sections: tuple[str, ...]


EVALUATORS = (
    Evaluator(retrieval, ("val", "test")),
    Evaluator(combination, ("combination",)),
    Evaluator(zero_shot, ("zero_shot", "per_class")),
)
"""What `evaluate` runs, in the order of evaluation.json and of the terminal. A new evaluator is one line here."""


@dataclass
class Evaluation:
    """The figures of one run; every metric is a share in [0, 1].

    sections: by name, from all evaluators: `val` and `test` (retrieval of the main pair), `combination` (by third
    tower, the sweep over α), `zero_shot` and `per_class` (classification by the main pair).
    lines: the figures as text. num_bad: how many of the captioned images cannot be used. repeated_captions: by part,
    the share of captions that are equal to a caption of another image.
    """

    data: str
    num_val: int
    num_test: int
    sections: dict[str, dict[str, Any]]
    lines: list[str]
    num_bad: int = 0
    repeated_captions: dict[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """The figures as a few lines for the terminal."""
        bad = [f"{self.num_bad} images could not be read and are left out"] if self.num_bad else []
        return "\n".join([*self.lines, *bad])

    def as_dict(self) -> dict[str, Any]:
        """The figures as evaluation.json holds them."""
        counts = {"data": self.data, "num_val": self.num_val, "num_test": self.num_test}
        repeated = {"repeated_captions": self.repeated_captions}
        return counts | repeated | self.sections | {"num_bad": self.num_bad}


@PLACE.named("validation")
def evaluate_run(
    folder: Path,
    *,
    data: str | None = None,
    classes: str | None = None,
    ranked: Rankings | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Evaluates a finished run and writes evaluation.json and features.safetensors into its folder.

    data: other images and captions to test on. classes: other labelled images. With either, the run's files stay as
    they are. ranked: where to write the ranked ids of the test data, or None. processes: those that call this together,
    of which each encodes its share. The first one measures and writes, and what the others return has no figures.
    Raises CheckpointError for an unfinished run and DataError for data that cannot be used.
    """
    processes.told(lambda: None)  # the first one has written the run
    own = data is None and classes is None
    described = read_description(folder)
    if own and not os.access(folder, os.W_OK):
        raise DataError(
            f"{folder}: the figures are written there, and it cannot be written; copy the run elsewhere"
        )
    config = read_config(folder / "config.toml")
    if classes is not None:
        config = replace(config, classes=classes)
    with processes.one_before_all():
        labelled = open_labelled(config)
        other = None if data is None else open_source(
            data, image_column=config.inputs.image_column, caption_columns=config.inputs.caption_columns
        )  # fmt: skip
    setup = prepare(config, folder, saved_tokenizer=folder, processes=processes)
    restore_trained(setup.model, folder)
    changed = changed_parts(described.get("data", {}), setup.parts())
    if changed and processes.first:
        warn(
            f"{folder}: the data has changed since this run was trained: {', '.join(changed)}. The figures are of the "
            "data as it is, and not comparable with earlier ones"
        )
    _check_thirds(setup, described, folder, says=processes.first)
    test = other or setup.test
    encoded = encode_all(setup, test, labelled, processes)
    if not processes.first:
        return Evaluation(test.name, len(setup.val), len(test), {}, [])
    evaluation, saved = evaluate(encoded, test.name, len(setup.val), len(test))
    if ranked and encoded.test is not None:
        ranked.write("test", encoded.test, test)
    if own:
        save_features(folder / "features.safetensors", encoded, saved)
        written = evaluation.as_dict() | {
            "schema": SCHEMA,
            "clip_benchmark": _clip_benchmark(evaluation, encoded, folder),
        }
        write_whole(folder / "evaluation.json", json.dumps(written, indent=2, ensure_ascii=False))
    return evaluation


def _check_thirds(setup: Setup, described: dict[str, Any], folder: Path, *, says: bool) -> None:
    """Says which frozen towers are not those of the training, unless another process does.

    Raises CheckpointError where such a tower is the main image tower.
    """
    replaced = setup.thirds.changed({third["view"]: third["fingerprint"] for third in described["thirds"]})
    if not replaced:
        return
    text = (
        f"{folder}: third tower {', '.join(replaced)} is not the one that this run was trained with: weights or "
        "preprocessing differ"
    )
    if setup.model.img is None:
        raise CheckpointError(f"{text}. It is the image tower of the trained model; put it back")
    if says:
        warn(f"{text}. Figures in which it takes part say nothing about the trained model; put it back")


def check_evaluation(config: RunConfig) -> list[str]:
    """Looks at whether a run can train and be evaluated, before it begins; returns lines about further data.

    Raises DataError or UsageError for what would be raised only after training.
    """
    check_enough(config)
    labelled = open_labelled(config)
    for part in (*open_data(config)[1:], labelled):
        if part is not None and len(part):
            _check_readable(part)
    lines = describe_watched(open_watched(config.suite, config.suite_images))
    if labelled is None:
        return lines
    left_out = f" ({count_reasons(labelled.problems)})" if labelled.problems else ""
    classes = f"{len(labelled):,} images of {len(labelled.class_names):,} classes"
    return [f"{classes} for zero-shot classification{left_out}", *lines]


def open_labelled(config: RunConfig) -> Source | None:
    """The labelled images for zero-shot classification, or None when the configuration names none.

    Images without a label are left out. Raises DataError or UsageError for data that cannot be classified.
    """
    if config.classes is None:
        return None
    try:
        source = open_source(
            str(world() / "objects" / "test") if config.classes == "shapes" else config.classes
        )
    except DataError as error:
        raise DataError(f"classes: {error}") from None
    labelled, problems = array("q"), list(source.problems)
    for index in range(len(source)):
        record = source.record(index)
        if record.label is None:
            problems.append(BadSample(record.id, "no class"))
        else:
            labelled.append(index)
    if not labelled or not source.class_names:
        raise DataError(
            f"classes: {config.classes} ({source.layout}) holds no class labels. Give a folder with one subfolder of "
            "images for each class, or CLIP_benchmark's layout"
        )
    check_prompts(source.class_names, source.templates or DEFAULT_TEMPLATES)
    return source if len(labelled) == len(source) else Subset(source, labelled, source.name, problems)


def _check_readable(source: Source) -> None:
    """Raises DataError when none of the first images can be read."""
    problem: BadSample | None = None
    for index in range(min(len(source), TRIED)):
        try:
            decode(source.image(index), source.record(index).id)
            return
        except BadSample as error:
            problem = problem or error
    raise DataError(
        f"{source.name}: none of {min(len(source), TRIED)} images can be read, so nothing can be evaluated on them; "
        f"the first is {problem}"
    )


def encode_all(
    setup: Setup, test: Source, labelled: Source | None, processes: Processes = ALONE
) -> EvaluationData:
    """Encodes the validation data, the test data and the labelled images of a setup with trained weights.

    processes: as in `encode`.
    """
    return EvaluationData(
        val=_captioned(setup, setup.val, processes),
        test=_captioned(setup, test, processes),
        labelled=None if labelled is None else _labelled(setup, labelled, processes),
    )


def evaluate(
    data: EvaluationData, name: str, num_val: int, num_test: int
) -> tuple[Evaluation, dict[str, Tensor]]:
    """Runs every evaluator; also returns the per-item results that features.safetensors holds.

    name: of the test data. num_val, num_test: their sizes, images that cannot be used included.
    """
    parts = {"val": data.val, "test": data.test}
    lines = [
        f"no {'validation' if part == 'val' else part} images with captions, so no retrieval on them"
        for part, each in parts.items()
        if each is None
    ]
    evaluation = Evaluation(name, num_val, num_test, {}, lines)
    usable = {part: each for part, each in parts.items() if each is not None}
    evaluation.num_bad = sum(len(each.bad) for each in usable.values())
    evaluation.repeated_captions = {part: each.repeated() for part, each in usable.items()}
    saved: dict[str, Tensor] = {}
    for evaluator in EVALUATORS:
        result = evaluator.measure(data)
        found = {} if result is None else result.sections
        evaluation.sections |= {section: dict(found.get(section, {})) for section in evaluator.sections}
        if result is not None:
            lines += result.lines
            saved |= {item: result.items[item] for item in result.saved}
    return evaluation, saved


def save_features(path: Path, data: EvaluationData, saved: dict[str, Tensor]) -> None:
    """Writes every view as `PART/VIEW`, with `text_image`, `text_group` and `index` of each PART, and `saved`.

    saved: the per-item results.
    """
    tensors = dict(saved)
    for part, each in (("val", data.val), ("test", data.test)):
        if each is not None:
            tensors |= {f"{part}/{view}": value.contiguous() for view, value in each.views.items()}
            tensors |= {f"{part}/text_image": each.text_image, f"{part}/text_group": each.text_group}
            tensors[f"{part}/index"] = each.index
    write_safetensors(path, tensors)


def _captioned(setup: Setup, source: Source, processes: Processes) -> Encoded | None:
    encoded = _encode(setup, source, processes) if len(source) else None
    return encoded if encoded is not None and encoded.captions else None


def _encode(setup: Setup, source: Source, processes: Processes = ALONE, *, merge: bool = True) -> Encoded:
    return encode(
        setup.model,
        source,
        setup.tokenizer,
        setup.thirds.stores(source),
        setup.device,
        workers=setup.config.inputs.workers,
        autocast=autocast(setup.config, setup.device),
        merge=merge,
        kept=setup.kept_views(source),
        processes=processes,
    )


def _labelled(setup: Setup, source: Source, processes: Processes = ALONE) -> Labelled:
    # accuracy is over the published number of images
    encoded = _encode(setup, source, processes, merge=False)
    precision = autocast(setup.config, setup.device)
    classes = class_embeddings(
        lambda texts: encode_texts(
            setup.model, texts, setup.tokenizer, setup.device, autocast=precision, processes=processes
        ),
        source.class_names,
        source.templates or DEFAULT_TEMPLATES,
    )
    known = (source.record(index).label for index in encoded.index.tolist())
    labels = torch.tensor([-1 if label is None else label for label in known])
    return Labelled(encoded.views["img"], classes, labels, list(source.class_names))


def _clip_benchmark(evaluation: Evaluation, data: EvaluationData, folder: Path) -> list[dict[str, Any]]:
    """The test figures by CLIP_benchmark's convention, in which an image's own captions alone are right."""
    rows = []
    test, classes = evaluation.sections["test"], evaluation.sections["zero_shot"]
    if data.test is not None and evaluation.repeated_captions["test"]:
        test = recalls(ranks_from_features(*data.test.system("main"), data.test.text_image))
    if test:
        rows.append(clip_benchmark_result(evaluation.data, str(folder), "", "zeroshot_retrieval", test))
    if classes:
        rows.append(clip_benchmark_result("classes", str(folder), "", "zeroshot_classification", classes))
    return rows

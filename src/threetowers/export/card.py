"""The model card of an export: README.md with the Hub's metadata, made of what the run has recorded about itself.

Nothing is fetched or sent. Folders of this machine are not named, because a card is written to be published.
Metadata: https://huggingface.co/docs/hub/model-cards.
"""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from threetowers.export.folder import HEADING, listed
from threetowers.export.results import Figure, Results, read_results
from threetowers.files import write_whole
from threetowers.objective.pairs import METHODS
from threetowers.progress import duration
from threetowers.run.finished import FinishedRun

TASK = "zero-shot-image-classification"
"""The Hub's only task for models that score images against texts; its widget and its search go by it."""
SMALL = 1_000_000
"""Training images below which the card says that they are few."""
_PREFIX = re.compile(r"(?:\w+=)?(?:[\w-]+:)*(?:[\w.-]+@)?")
_NAMED = re.compile(r"(\w+)=(.*)")
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")

Settings = dict[str, Any]
"""The settings of a run by their path (`optim.lr`), but for those that are `none`."""

CARD = """---
{metadata}
---
{heading}, {title}

{summary}

{usage}
The code above reads the folder on this machine. After a push to the Hub, fetch the folder with
`hf download USER/NAME --local-dir {folder}`. The code stays as it is.

## Results

{results}

## Training

{training}

## Time and energy

{energy}

## Limits

{limits}

## Licence and data

{licence}
"""


def write_card(
    folder: Path, finished: FinishedRun, run: Path, *, library: str, title: str, usage: str, name: str,
    alpha: float = 0.0, tags: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Writes README.md into the folder of an export.

    library: the Hub's library_name. title: what follows the heading. usage: how to load the model, and how it differs
    from training, in Markdown. name: of the exported folder. alpha: weight of the third tower, where the
    export is the convex combination. tags: of the format, for the Hub.
    """
    settings, described = _settings(run), finished.described
    reads = {third["view"]: third["reads"] for third in described["thirds"]}
    results = read_results(run, reads, alpha)
    data = ModelCardData(
        library_name=library,
        pipeline_tag=TASK,
        tags=["threetowers", "clip", "image-text", described["method"], *tags],
        model_name=name,
        eval_results=_eval_results(results) or None,
    )
    if not results.figures:
        data.pop("model_name")  # the name belongs to the results alone
    text = CARD.format(
        metadata=data.to_yaml(),
        heading=HEADING,
        title=title,
        summary=_summary(finished, alpha),
        usage=usage,
        folder=name,
        results=_results(results, described, alpha),
        training=_table(("", ""), _training(run, settings, finished)),
        energy=_energy(run),
        limits=listed(list(_limits(finished, results))),
        licence=_licence(settings, described),
    )
    write_whole(folder / "README.md", text)


def public_name(text: str) -> str:
    """The name of a tower or of data without the folders that lead to it; names on the Hub stay whole.

    >>> [public_name(text) for text in ("timm:resnet18@/home/me/r18.safetensors", "data/photos.csv", "hf:org/name")]
    ['timm:resnet18@r18.safetensors', 'photos.csv', 'hf:org/name']
    """
    if "::" in text:
        return ", ".join(public_name(part) for part in text.split("::"))
    found = _PREFIX.match(text)
    prefix, rest = (found[0], text[found.end() :]) if found else ("", text)
    if (
        prefix.endswith(("hf:", "hf-text:", "hf-hub:", "hf_hub:"))
        and _ON_HUB.fullmatch(rest)
        and not Path(rest).exists()
    ):
        return text
    return prefix + Path(rest.partition("?")[0]).name


# The parts of the text.


def _summary(finished: FinishedRun, alpha: float) -> str:
    entry = METHODS[finished.described["method"]]
    holds = (
        "An image tower and a text tower. Images and texts become vectors of the same space, and the cosine of two "
        f"vectors says how well they fit. The method of training is {entry.label}. "
    )
    if not alpha:
        return holds + entry.summary
    return holds + f"Here the frozen third tower is kept, and takes part with the weight α = {alpha:g}."


def _results(results: Results, described: dict[str, Any], alpha: float) -> str:
    if not results.figures:
        return f"There are no figures, because {results.missing}. `threetowers evaluate RUN` measures them."
    rows = [(figure.task, figure.words, _percent(figure)) for figure in results.figures]
    of = f"Of the convex combination with α = {alpha:g}. " if alpha else ""
    chosen = " α was given to the export; `evaluate` chooses one on validation data." if alpha else ""
    averaged = " The model is an average of several runs." if "averaged" in described else ""
    places = {
        "retrieval": f"retrieval on {results.num_test:,} test images with captions (`{results.data}`)",
        "zero-shot": "zero-shot classification on the labelled images of the run",
    }
    measured = [text for task, text in places.items() if task in {figure.task for figure in results.figures}]
    return (
        f"{of}In percent: {', '.join(measured)}.{chosen}{averaged}\n\n"
        + _table(("task", "measure", "result"), rows)
        + "\n\nIn brackets: 95 % interval of a bootstrap over the test images. It does not include the variation "
        "between training runs."
    )


def _percent(figure: Figure) -> str:
    text = f"{100 * figure.value:.1f}"
    if figure.low is None or figure.high is None:
        return text
    return f"{text} ({100 * figure.low:.1f} to {100 * figure.high:.1f})"


def _eval_results(results: Results) -> list[EvalResult]:
    """The figures for the metadata; the Hub has no field for an interval."""
    names = {"retrieval": "Image-text retrieval", "zero-shot": "Zero-shot image classification"}
    return [
        EvalResult(
            task_type=TASK if figure.task == "zero-shot" else "image-text-retrieval",
            task_name=names[figure.task],
            dataset_type="own",
            dataset_name=results.data if figure.task == "retrieval" else "labelled images",
            dataset_split="test",
            metric_type=figure.metric,
            metric_name=figure.words,
            metric_value=round(figure.value, 4),
        )
        for figure in results.figures
    ]


def _training(run: Path, settings: Settings, finished: FinishedRun) -> Iterator[tuple[str, str]]:
    """What the run says about itself, as rows of a table."""
    described, cfg = finished.described, finished.architecture.model_cfg
    method = described["method"]
    yield "method", f"{METHODS[method].label} (`{method}`)"
    yield "objective", ", ".join(f"{a}–{b} {weight:.3g} ({kind})" for a, b, weight, kind in described["rows"])
    if ends := settings.get("objective.weights_end"):
        way = settings.get("objective.weights_schedule", "")
        yield "weights at the end", f"{', '.join(f'{weight:.3g}' for weight in ends)} ({way})"
    thirds = [f"`{public_name(third['spec'])}`" for third in described["thirds"]]
    yield "third tower, frozen", ", ".join(thirds) or "none"
    tower = settings.get("pair.model") or cfg["vision_cfg"].get("timm_model_name") or "open_clip's ViT"
    yield "image tower", f"{public_name(str(tower))}, {finished.architecture.image.size} pixels"
    vocabulary = "of open_clip" if described["tokenizer"] == "open_clip" else "of its own"
    yield "text tower", f"{_context_length(finished)} tokens, a vocabulary {vocabulary}"
    yield "width of the vectors", f"{finished.embed_dim}"
    image, text = _starts(settings, described)
    frozen = ", which stayed frozen" if METHODS[method].image == "third" else ""
    yield "start of the image tower", f"`{public_name(image)}`{frozen}" if image else "random weights"
    yield "start of the text tower", f"`{public_name(text)}`" if text else "random weights"
    yield "trained parameters", f"{described['num_trainable']:,}"
    if averaged := described.get("averaged"):
        weights = ", ".join(f"{each['weight']:.3g}" for each in averaged)
        yield "average", f"of {len(averaged)} runs, with the weights {weights}; this table is of the first"
    parts = ", ".join(f"{name} {part['images']:,}" for name, part in described.get("data", {}).items())
    data = f" (`{public_name(settings['data'])}`)" if "data" in settings else ""
    yield "images with captions", f"{parts or 'not counted'}{data}"
    steps, batch = _last_row(run).get("step", settings.get("steps")), settings.get("batch_size")
    if steps and batch:
        yield "steps", f"{steps:,} of {batch:,} pairs, {steps * batch:,} in all"
    if "keep_best" in settings:
        yield "weights kept", f"those of the step with the best `{settings['keep_best']}`"
    for key, name in (("optim.lr", "learning rate"), ("precision", "precision"), ("seed", "seed")):
        if key in settings:
            yield name, f"{settings[key]}"


def _context_length(finished: FinishedRun) -> int:
    return int(finished.architecture.model_cfg["text_cfg"].get("context_length", 77))


def _starts(settings: Settings, described: dict[str, Any]) -> tuple[str, str]:
    """The models whose weights the image and the text tower started at; empty for random weights."""
    both = settings.get("pair.weights", "")
    image, text = str(settings.get("start.image", both)), str(settings.get("start.text", both))
    if METHODS[described["method"]].image != "own" and not settings.get("start.image"):
        image = "third"
    thirds: dict[str, str] = {}
    for entry in settings.get("third", ()):
        named = _NAMED.fullmatch(entry)
        thirds |= {f"third_{named[1]}": named[2]} if named else {"third": entry}
    thirds |= {third["view"]: third["spec"] for third in described["thirds"]}
    if image == "third" and thirds:
        image = next(iter(thirds.values()))
    return thirds.get(image, image), text


def _energy(run: Path) -> str:
    """Time and machine out of the run's records, and the arithmetic to energy, which nobody has measured."""
    row, machine = _last_row(run), _machine(run)
    on = f" on {machine}" if machine else ""
    if "seconds" not in row:
        return "How long the training took was not recorded. Energy was not measured."
    seconds = float(row["seconds"])
    hours = seconds / 3600
    return (
        f"The training took {duration(seconds)}{on}, validation and saving included. Energy was not measured. As an "
        f"estimate, multiply {hours:.3g} hours by the average power of the machine: every 100 watts are "
        f"{hours * 0.1:.2g} kWh. Features of frozen towers, evaluation and earlier attempts come on top."
    )


def _limits(finished: FinishedRun, results: Results) -> Iterator[str]:
    if results.figures:
        yield "It was tested on what stands under Results, and on nothing else."
    else:
        yield "It was not tested."
    images = finished.described.get("data", {}).get("train", {}).get("images", 0)
    if 0 < images < SMALL:
        yield (
            f"{images:,} training images are few: well-known models of this kind have seen hundreds of millions. "
            "Expect it to fail on what does not resemble its training data"
        ) + "."
    yield "The languages of the captions were not recorded. Do not expect it to understand others."
    yield f"Texts are cut after {_context_length(finished)} tokens."
    yield "Whether it treats groups of people differently was not examined. Examine it before it is used on people."


def _licence(settings: Settings, described: dict[str, Any]) -> str:
    sources = [third["spec"] for third in described["thirds"]] + [*_starts(settings, described)]
    named = ", ".join(f"`{public_name(source)}`" for source in dict.fromkeys(sources) if source)
    models = f" and of the models that took part in the training: {named}" if named else ""
    return (
        "No licence has been chosen. Add `license: …` to the metadata at the top of this file, with one of the Hub's "
        "identifiers. Add `datasets: [USER/NAME]` if the training data are on the Hub. The licence has to respect "
        f"those of the training data{models}."
    )


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)


# The records of a run.


def _settings(run: Path) -> Settings:
    """What config.toml says. It is not judged, because the run is finished; nothing where it cannot be read."""
    try:
        values = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found: Settings = {}
    for key, value in values.items():
        inner = (
            {f"{key}.{name}": each for name, each in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
        found |= {name: each for name, each in inner.items() if each not in ("none", [])}
    return found


def _last_row(run: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl that states the time; nothing where there is none."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:  # of an average of runs
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(row, dict) and "seconds" in row:
            return row
    return {}


def _machine(run: Path) -> str:
    """Device, threads and processes of the newest checkpoint; empty where none is left."""
    for path in sorted((run / "checkpoints").glob("step-*/MANIFEST.json"), reverse=True):
        try:
            found = json.loads(path.read_bytes())["environment"]
        except (OSError, ValueError, KeyError):
            continue
        device, processes = str(found.get("device", "?")), int(found.get("processes", 1))
        if device == "cpu":
            device = f"a CPU (threads: {found.get('threads', '?')})"
        return (
            f"{device}{f', {processes} processes' if processes > 1 else ''}, torch {found.get('torch', '?')}"
        )
    return ""

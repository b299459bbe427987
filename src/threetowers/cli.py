"""The command line: verbs that read options into dataclasses and call one function each.

Nothing heavy is imported before a verb is known, so that --help is immediate.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from threetowers.config import (
    CompareConfig,
    PretrainConfig,
    RunConfig,
    apply_values,
    config_hash,
    did_you_mean,
    read_toml,
)
from threetowers.errors import ThreeTowersError, UsageError, of_system
from threetowers.recipes import PRESETS

T = TypeVar("T")
STOPPED = 75  # stopped on request; the same command continues


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `threetowers`; exits with 0 or the code of what went wrong, without a traceback of a mistake."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        for name in ("SIGTERM", "SIGUSR1"):  # as an interrupt from the keyboard, until training knows better
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.default_int_handler)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    if words[0] == "--version":
        from threetowers import __version__

        print(f"threetowers {__version__}")
        sys.exit(0)
    try:
        verb = VERBS.get(words[0])
        if verb is None:
            raise UsageError(f"{words[0]}: no such command{did_you_mean(words[0], VERBS)}")
        sys.exit(verb(words[1:]) or 0)
    except ThreeTowersError as error:
        print(f"threetowers: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"threetowers: {of_system(error)}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        print("threetowers: interrupted; the same command continues", file=sys.stderr)
        sys.exit(STOPPED)


def _overview() -> str:
    lines = [
        "threetowers: image-text models that learn from frozen pretrained models without being locked to them",
        "",
        *(f"  threetowers {name:<10} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()),
        "",
        "  threetowers VERB --help says what a verb takes. Exit codes: 0 done, 2 usage, 3 data or checkpoint,",
        "  4 non-finite training, 75 stopped on request: the same command continues.",
    ]
    return "\n".join(lines)


def _parse(kind: Callable[..., T], words: list[str], verb: str, default: T | None = None) -> T:
    settings: dict[str, Any] = {} if default is None else {"default": default}
    parsed: T = tyro.cli(
        kind,
        prog=f"threetowers {verb}",
        args=words,
        config=(tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes),
        **settings,
    )
    return parsed


@dataclass(frozen=True, kw_only=True)
class _TrainArguments:
    """Train a model. Precedence: preset, then file, then flags."""

    out: Annotated[str, tyro.conf.arg(help="Run folder; default runs/PRESET-CONFIGHASH.")] = "none"
    fresh: Annotated[bool, tyro.conf.arg(help="Replace the run that is in the folder.")] = False
    max_minutes: Annotated[
        float, tyro.conf.arg(help="Save and stop after this long, to continue later; 0 never.")
    ] = 0.0
    run: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class _CompareArguments:
    """Train and evaluate several methods on equal terms, and write report.html. Run again, it continues."""

    out: Annotated[str, tyro.conf.arg(help="Folder of the comparison.")] = "runs/compare"
    max_minutes: Annotated[
        float, tyro.conf.arg(help="Save and stop after this long, to continue later; 0 never.")
    ] = 0.0
    options: Annotated[CompareConfig, tyro.conf.arg(name="")] = field(default_factory=CompareConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")]


A = TypeVar("A", _TrainArguments, _CompareArguments)


def _arguments(kind: type[A], words: list[str], verb: str) -> tuple[str, A]:
    """The name of the preset or file in the first word, and the arguments: its configuration under the flags."""
    name, config, flags = _start(words, verb)
    arguments = _parse(kind, flags, f"{verb} {name}", kind(run=config))
    return name, replace(arguments, run=_own_towers(arguments.run, config))


def _start(words: list[str], verb: str) -> tuple[str, RunConfig, list[str]]:
    """The preset's or file's name and configuration, and the flags that are left."""
    if not words or words[0].startswith("-"):
        if any(word in ("-h", "--help") for word in words):
            return "tiny", PRESETS["tiny"](), words
        raise UsageError(f"{verb}: name a preset or a TOML file first: {', '.join(PRESETS)}, or run.toml")
    name = words[0]
    if name in PRESETS:
        return name, PRESETS[name](), words[1:]
    if not name.endswith(".toml"):
        raise UsageError(f"{name}: neither a preset nor a .toml file{did_you_mean(name, PRESETS)}")
    return Path(name).stem, load_file(Path(name)), words[1:]


def load_file(path: Path) -> RunConfig:
    """A TOML file's configuration; a file may begin with `preset = "…"`, whose values it then overrides."""
    values = read_toml(path)
    preset = values.pop("preset", None)
    if preset is None:
        return apply_values(RunConfig(), values, path)
    if preset not in PRESETS:
        raise UsageError(f"{path}: preset: {preset!r} is no preset{did_you_mean(str(preset), PRESETS)}")
    start = PRESETS[preset]()
    return _own_towers(apply_values(start, values, path), start)


def _own_towers(config: RunConfig, start: RunConfig) -> RunConfig:
    """Where another open_clip model is named than at the start, the start's own towers do not shape it."""
    pair, old = config.pair, start.pair
    if pair.model in ("none", old.model):
        return config
    left: dict[str, Any] = {
        name: {} for name in ("vision", "text") if getattr(pair, name) == getattr(old, name)
    }
    return replace(config, pair=replace(pair, **left))


def _run_folder(name: str, arguments: _TrainArguments) -> Path:
    given = arguments.out
    return Path("runs") / f"{name}-{config_hash(arguments.run)}" if given == "none" else Path(given)


def _train(words: list[str]) -> int:
    """train a model: threetowers train PRESET|FILE.toml --data PATH [--third timm:NAME] [--method 3t] …"""
    name, arguments = _arguments(_TrainArguments, words, "train")
    config = arguments.run
    out = _run_folder(name, arguments)

    from threetowers.evaluate.evaluation import evaluate_run
    from threetowers.objective.pairs import objective
    from threetowers.run.setup import check_settings, describe_data
    from threetowers.train.loop import train

    check_settings(config)  # a mistake in the settings is said before any data is read
    objective(config)
    print(describe_data(config), flush=True)
    result = train(config, out, fresh=arguments.fresh, max_minutes=arguments.max_minutes)
    if not result.finished:
        print(f"stopped at step {result.step}; the same command continues. Run folder: {out}")
        return STOPPED
    evaluation = evaluate_run(out)
    print(evaluation.text())
    print(f"run folder: {out}")
    return 0


def _compare(words: list[str]) -> int:
    """find out which method wins: threetowers compare PRESET|FILE --data PATH --third NAME=SPEC … [--seeds 0 1 2]"""
    _, arguments = _arguments(_CompareArguments, words, "compare")

    from threetowers.compare.runs import compare

    out = Path(arguments.out)
    return _report(compare(arguments.run, arguments.options, out, max_minutes=arguments.max_minutes), out)


def _demo(words: list[str]) -> int:
    """see the method at work on the built-in world: threetowers demo [--out runs/demo]"""
    options = CompareConfig(lrs=(2e-3,), title="Three Towers on the built-in world")
    default = _CompareArguments(out="runs/demo", options=options, run=PRESETS["shapes"]())
    arguments = _parse(_CompareArguments, words, "demo", default)

    from threetowers.compare.demo import demo

    return _report(demo(arguments.run, arguments.options, Path(arguments.out)), Path(arguments.out))


def _report(result: dict[str, Any] | None, out: Path) -> int:
    if result is None:
        print(f"stopped; the same command continues. Folder: {out}")
        return STOPPED

    from threetowers.report.page import write_report
    from threetowers.report.tables import text_table

    page = write_report(out)
    print(f"\n{text_table(result)}\n\nreport: {page}")
    return 0


def _evaluate(words: list[str]) -> int:
    """evaluate a finished run on its own test data or another: threetowers evaluate RUN [--data PATH]"""

    def evaluate(run: tyro.conf.Positional[Path], *, data: str = "none", classes: str = "none") -> None:
        """Retrieval, the convex combination and, with classes, zero-shot classification.

        Args:
            run: A finished run folder.
            data: Other images and captions to test on; none is the run's own test data.
            classes: Labelled images for zero-shot classification; none is the run's own.
        """
        from threetowers.evaluate.evaluation import evaluate_run

        print(evaluate_run(run, data=data, classes=classes).text())

    _parse(evaluate, words, "evaluate")
    return 0


@dataclass(frozen=True, kw_only=True)
class _PretrainArguments:
    """Train a timm classifier and save it as a tower: --third file:DIR."""

    out: Annotated[str, tyro.conf.arg(help="Folder to write.")]
    config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)


def _pretrain(words: list[str]) -> int:
    """train a small classifier as third tower: threetowers pretrain --out DIR [--data IMAGES|objects|scenes] …"""
    arguments = _parse(_PretrainArguments, words, "pretrain")

    from threetowers.train.pretrain import pretrain

    accuracy = pretrain(arguments.config, Path(arguments.out))
    print(f"held-out accuracy {accuracy:.1%}; use it as --third file:{arguments.out}")
    return 0


def _export(words: list[str]) -> int:
    """write the main pair for another library: threetowers export RUN --to open_clip --out DIR"""

    def export(run: tyro.conf.Positional[Path], *, out: Path, to: str = "open_clip") -> None:
        """The two main towers, without third tower and heads.

        Args:
            run: A finished run folder.
            out: Folder to write.
            to: Format; open_clip.
        """
        from threetowers.export.open_clip import export_open_clip

        formats = {"open_clip": export_open_clip}
        if to not in formats:
            raise UsageError(f"--to: {to!r} is no format{did_you_mean(to, formats)}")
        folder = formats[to](run, out)
        print(f'written; load it with open_clip.create_model_and_transforms("local-dir:{folder}")')

    _parse(export, words, "export")
    return 0


def _convert(words: list[str]) -> int:
    """a foreign .pt, .pth or .bin file as safetensors, no code run: threetowers convert FILE --out FILE.safetensors"""

    def convert(file: tyro.conf.Positional[Path], *, out: Path) -> None:
        """Only tensors are read; whatever else is in the file is refused or left out by name.

        Args:
            file: A checkpoint of plain PyTorch, open_clip, timm or a trainer.
            out: The file to write, ending in .safetensors.
        """
        from threetowers.commands.convert import convert

        print(convert(file, out).text())

    _parse(convert, words, "convert")
    return 0


def _validate(words: list[str]) -> int:
    """check a run in seconds, train nothing: threetowers validate PRESET|FILE.toml [the flags of train]"""
    name, arguments = _arguments(_TrainArguments, words, "validate")
    out = _run_folder(name, arguments)

    from threetowers.commands.validate import validate

    for line in validate(arguments.run, out):
        print(line, flush=True)
    return 0


def _doctor(words: list[str]) -> int:
    """look at this machine: versions, devices, disk, memory, each with a remedy: threetowers doctor"""

    def doctor(*, folder: Path = Path()) -> int:
        """Exits with 1 when something is broken.

        Args:
            folder: Where runs will be; its disk is measured.
        """
        from threetowers.commands.doctor import doctor, tally

        checks = []
        for check in doctor(folder):
            print(check.text(), flush=True)
            checks.append(check)
        counts = tally(checks)
        print("\n" + ", ".join(f"{count} {state}" for state, count in counts.items()))
        return 1 if counts["fail"] else 0

    return _parse(doctor, words, "doctor")


def _towers(words: list[str]) -> int:
    """see what can be a frozen third tower, or describe one: threetowers towers [WORD|timm:NAME|hf:ID …]"""

    def towers(name: tyro.conf.Positional[str] = "", /) -> None:
        """Downloads no weights of published towers.

        Args:
            name: A word to look for in the names, or a tower as --third takes it; without it, an overview.
        """
        from threetowers.commands.towers import towers

        print(towers(name))

    _parse(towers, words, "towers")
    return 0


@dataclass(frozen=True, kw_only=True)
class _EmbedArguments:
    """Compute a frozen tower's features of every sample once. Run again, it continues; give the folder to train
    as --embeddings."""

    tower: Annotated[str, tyro.conf.arg(help="timm:NAME, hf:…, open_clip:…, file:RUN, hf-text:…")]
    data: Annotated[str, tyro.conf.arg(help="What train is given as --data, or another source.")]
    out: Annotated[Path, tyro.conf.arg(help="Folder of the store.")]
    views: Annotated[int, tyro.conf.arg(help="Random views of each image; 0 is one fixed view.")] = 0
    crop_scale: Annotated[tuple[float, float], tyro.conf.arg(help="As inputs.crop_scale of the run.")] = (
        0.9,
        1.0,
    )
    crop_ratio: Annotated[tuple[float, float], tyro.conf.arg(help="As inputs.crop_ratio of the run.")] = (
        0.75,
        1.3333333,
    )
    flip: Annotated[bool, tyro.conf.arg(help="As inputs.flip of the run.")] = False
    dtype: Annotated[Literal["fp16", "bf16"], tyro.conf.arg(help="Of what is stored.")] = "fp16"
    part: Annotated[str, tyro.conf.arg(help="I/N: this process does every N-th chunk from the I-th.")] = "0/1"
    precision: Annotated[Literal["fp32", "bf16"], tyro.conf.arg(help="As third_precision of the run.")] = (
        "fp32"
    )
    features: Annotated[
        Literal["pooled", "cls", "mean"], tyro.conf.arg(help="As third_features of the run.")
    ] = "pooled"
    image_column: Annotated[str, tyro.conf.arg(help="As inputs.image_column of the run.")] = "none"
    caption_columns: Annotated[tuple[str, ...], tyro.conf.arg(help="As inputs.caption_columns.")] = ()
    batch_size: Annotated[int, tyro.conf.arg(help="Views or captions that go through the tower at once.")] = (
        256
    )
    workers: Annotated[int, tyro.conf.arg(help="Processes that decode; 0 decodes in this one.")] = 2
    device: Annotated[str, tyro.conf.arg(help="auto, cpu, cuda or cuda:1.")] = "auto"


def _embed(words: list[str]) -> int:
    """store a frozen tower's features of a source: threetowers embed --tower SPEC --data PATH --out DIR [--part I/N]"""
    arguments = _parse(_EmbedArguments, words, "embed")
    index, slash, count = arguments.part.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(
            f"--part: {arguments.part!r} is no part; write I/N with I from 0 to N-1, for example 0/4"
        )
    if arguments.batch_size < 1 or arguments.workers < 0 or arguments.views < 0:
        raise UsageError("embed: --batch-size is at least 1, --workers and --views at least 0")

    from threetowers.data.open import open_source
    from threetowers.run.setup import pick_device
    from threetowers.store.embed import write_store
    from threetowers.store.read import Views
    from threetowers.towers.frozen.load import load_frozen

    device = pick_device(arguments.device)
    views = Views(arguments.views, arguments.crop_scale, arguments.crop_ratio, arguments.flip)
    image_column = None if arguments.image_column == "none" else arguments.image_column
    source = open_source(arguments.data, image_column=image_column, caption_columns=arguments.caption_columns)
    tower = load_frozen(arguments.tower, features=arguments.features, precision=arguments.precision)
    store = write_store(
        tower.to(device), source, arguments.out, device, views=views, dtype=arguments.dtype,
        part=(int(index), int(count)), batch_size=arguments.batch_size, workers=arguments.workers,
    )  # fmt: skip
    if store is None:
        print(f"part {arguments.part} is done; the store is made when the other parts are")
    else:
        print(f"{arguments.out}: {store.summary()}; use it as --embeddings {arguments.out}")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "compare": _compare,
    "demo": _demo,
    "evaluate": _evaluate,
    "pretrain": _pretrain,
    "export": _export,
    "convert": _convert,
    "embed": _embed,
    "towers": _towers,
    "validate": _validate,
    "doctor": _doctor,
}

if __name__ == "__main__":
    main()

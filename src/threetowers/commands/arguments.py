"""What the command line takes, read into dataclasses: presets and files first, then flags.

Nothing heavy is imported here, so that --help is immediate.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from threetowers.commands.words import parse
from threetowers.config import CompareConfig, PretrainConfig, RunConfig
from threetowers.errors import UsageError
from threetowers.export.formats import FORMATS, formats_help
from threetowers.objective.pairs import without_own_weights
from threetowers.recipes import PRESETS
from threetowers.settings import apply_values, config_hash, did_you_mean, read_toml


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train a model. Precedence: preset, then file, then flags."""

    out: Annotated[Path | None, tyro.conf.arg(help="Run folder; none is runs/PRESET-CONFIGHASH.")] = None
    fresh: Annotated[bool, tyro.conf.arg(help="Replace the run that is in the folder.")] = False
    max_minutes: Annotated[
        float, tyro.conf.arg(help="Save and stop after this long, to continue later; 0 never.")
    ] = 0.0
    profile: Annotated[
        bool, tyro.conf.arg(help="Measure where the time of each step goes: profile.json and trace.json.gz.")
    ] = False
    processes: Annotated[
        int,
        tyro.conf.arg(
            help="Processes of this machine that share each batch, one a GPU; several machines: torchrun."
        ),
    ] = 1
    run: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class ValidateArguments(TrainArguments):
    """Check a run without training. Precedence: preset, then file, then flags."""

    near_copies: Annotated[
        bool,
        tyro.conf.arg(help="Decode every image, and look for test images nearly equal to training images."),
    ] = False
    details: Annotated[
        bool,
        tyro.conf.arg(help="Also show tokens, towers, parameters, learning rates, one step and the disk."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Train and evaluate several methods on equal terms, and write report.html. Run again, it continues."""

    out: Annotated[Path, tyro.conf.arg(help="Folder of the comparison.")] = Path("runs/compare")
    max_minutes: Annotated[
        float, tyro.conf.arg(help="Save and stop after this long, to continue later; 0 never.")
    ] = 0.0
    jobs: Annotated[
        int,
        tyro.conf.arg(
            help="Runs that train at a time, each in a process of its own with its share of the cores; 0 (auto) takes "
            "what a trial of a few steps finds fastest, and on a GPU one."
        ),
    ] = 0
    options: Annotated[CompareConfig, tyro.conf.arg(name="")] = field(default_factory=CompareConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class AdviseArguments:
    """Forecast from short pilots which method wins at the full training. Run again, it continues.

    Every flag is that of the full training; the pilots take an eighth, a quarter and a half of its images.
    """

    out: Annotated[Path, tyro.conf.arg(help="Folder of the pilots.")] = Path("runs/advise")
    max_minutes: Annotated[
        float, tyro.conf.arg(help="Save and stop after this long, to continue later; 0 never.")
    ] = 0.0
    options: Annotated[CompareConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: CompareConfig(seeds=(0, 1), title="Which method for this data")
    )
    run: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class PretrainArguments:
    """Train a timm classifier and save it as a tower: --third file:DIR."""

    out: Annotated[Path, tyro.conf.arg(help="Folder to write.")]
    config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)


@dataclass(frozen=True, kw_only=True)
class AnalyseArguments:
    """Similarity of towers, agreement of their errors, and how both came about; writes analysis.html."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(help="Finished runs with the same test data, such as those of a comparison."),
    ]
    out: Annotated[Path, tyro.conf.arg(help="Folder to write.")] = Path("runs/analysis")


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Evaluate a run on its own test data, with the convex combination; or any model on other data or a suite."""

    target: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            help="A run folder; open_clip:NAME@TAG; hf:DIR_OR_ID; a directory of open_clip's or transformers'; "
            "features:FOLDER."
        ),
    ]
    data: Annotated[
        str | None, tyro.conf.arg(help="Other images and captions; none is the run's own test data.")
    ] = None
    classes: Annotated[
        str | None, tyro.conf.arg(help="Labelled images for zero-shot classification; none is the run's own.")
    ] = None
    suite: Annotated[
        str | None,
        tyro.conf.arg(
            help="Many data sets and tasks: a TOML file, DataComp's tasklist.yml, a folder of wds_* folders, or shapes."
        ),
    ] = None
    out: Annotated[
        Path,
        tyro.conf.arg(help="Folder of a suite's results and features; what is there is not computed again."),
    ] = Path("runs/evaluate")
    part: Annotated[
        str, tyro.conf.arg(help="I/N: this process takes every N-th data set of the suite from the I-th.")
    ] = "0/1"
    ranked: Annotated[
        int,
        tyro.conf.arg(
            help="Write the ids of the so many best texts of each image, and the reverse, to ranked/ in --out."
        ),
    ] = 0
    device: Annotated[str, tyro.conf.arg(help="auto, cpu, cuda or cuda:1.")] = "auto"
    workers: Annotated[int, tyro.conf.arg(help="Processes that read images.")] = 0


@dataclass(frozen=True, kw_only=True)
class EmbedArguments:
    """Compute a frozen tower's features of every sample once. Run again, it continues; give the folder to train
    as --embeddings."""

    tower: Annotated[str, tyro.conf.arg(help="Such as timm:NAME; `threetowers towers` lists the kinds.")]
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
    image_column: Annotated[str | None, tyro.conf.arg(help="As inputs.image_column of the run.")] = None
    caption_columns: Annotated[tuple[str, ...], tyro.conf.arg(help="As inputs.caption_columns.")] = ()
    batch_size: Annotated[int, tyro.conf.arg(help="Views or captions that go through the tower at once.")] = (
        256
    )
    workers: Annotated[int, tyro.conf.arg(help="Processes that decode for a GPU; on a CPU threads do.")] = 2
    device: Annotated[str, tyro.conf.arg(help="auto, cpu, cuda or cuda:1.")] = "auto"


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """The two main towers; without third tower and heads, unless --alpha asks for the convex combination."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="A finished run folder.")]
    out: Annotated[Path, tyro.conf.arg(help="Folder to write.")]
    to: Annotated[str, tyro.conf.arg(help=f"Format. {formats_help()}.")] = next(iter(FORMATS))
    alpha: Annotated[
        float,
        tyro.conf.arg(
            help="Weight of the third tower in the convex combination, from 0 to 1; `evaluate` chooses one. With more "
            "than 0 the third tower runs at inference. For --to onnx."
        ),
    ] = 0.0


@dataclass(frozen=True, kw_only=True)
class PushArguments:
    """Send an exported folder to the Hugging Face Hub, after saying what will be sent and asking."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="What `export` has written.")]
    repository: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help="USER/NAME or ORGANISATION/NAME.")]
    private: Annotated[bool, tyro.conf.arg(help="Make a new repository private.")] = False
    revision: Annotated[str, tyro.conf.arg(help="Branch; one that is not there is made.")] = "main"
    yes: Annotated[bool, tyro.conf.arg(help="Send without asking.")] = False


@dataclass(frozen=True, kw_only=True)
class AverageArguments:
    """Average the weights of finished runs that began at the same weights, and write the average as a run."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(help="Finished runs of one architecture, tokenizer, preprocessing and objective."),
    ]
    weights: Annotated[
        tuple[float, ...], tyro.conf.arg(help="One for each run, with sum 1; without, all are equal.")
    ] = ()
    out: Annotated[Path, tyro.conf.arg(help="Run folder to write, which must not be there or be empty.")]


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """Only tensors are read; whatever else is in the file is refused or left out by name."""

    file: Annotated[
        tyro.conf.Positional[Path],
        tyro.conf.arg(
            help="A checkpoint of plain PyTorch, open_clip, timm or a trainer; or safetensors with a prefix to take "
            "off."
        ),
    ]
    out: Annotated[Path, tyro.conf.arg(help="The file to write, ending in .safetensors.")]
    key: Annotated[
        str | None,
        tyro.conf.arg(help="Under which the weights are, such as model_ema; none takes the usual ones."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class VectorsArguments:
    """Write unit vectors of a finished run's main towers for FAISS, Qdrant, LanceDB and other search indexes.

    OUT gets vectors.npy, float32 with a row for each image or text in the order of the data, and ids.jsonl.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="A finished run folder.")]
    data: Annotated[str, tyro.conf.arg(help="What train is given as --data, or another source.")]
    out: Annotated[Path, tyro.conf.arg(help="Folder to write, which must not be there or be empty.")]
    of: Annotated[Literal["images", "texts"], tyro.conf.arg(help="What to embed.")] = "images"
    image_column: Annotated[str | None, tyro.conf.arg(help="As inputs.image_column of a run.")] = None
    caption_columns: Annotated[tuple[str, ...], tyro.conf.arg(help="As inputs.caption_columns.")] = ()
    workers: Annotated[int, tyro.conf.arg(help="Processes that decode for a GPU; on a CPU threads do.")] = 2
    device: Annotated[str, tyro.conf.arg(help="auto, cpu, cuda or cuda:1.")] = "auto"


A = TypeVar("A", TrainArguments, ValidateArguments, CompareArguments, AdviseArguments)


def run_arguments(kind: type[A], words: list[str], verb: str) -> tuple[str, A]:
    """The name of the preset or file in the first word, and the arguments: its configuration under the flags."""
    name, config, flags = _start(words, verb)
    arguments = parse(kind, flags, f"{verb} {name}", kind(run=config))
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
        return without_own_weights(apply_values(RunConfig(), values, path))
    if preset not in PRESETS:
        raise UsageError(f"{path}: preset: {preset!r} is no preset{did_you_mean(str(preset), PRESETS)}")
    start = PRESETS[preset]()
    return without_own_weights(_own_towers(apply_values(start, values, path), start))


def _own_towers(config: RunConfig, start: RunConfig) -> RunConfig:
    """Where another open_clip model is named than at the start, the start's own towers do not shape it."""
    pair, old = config.pair, start.pair
    if pair.model in (None, old.model):
        return config
    left: dict[str, Any] = {
        name: {} for name in ("vision", "text") if getattr(pair, name) == getattr(old, name)
    }
    return replace(config, pair=replace(pair, **left))


def run_folder(name: str, arguments: TrainArguments) -> Path:
    """The folder of a run: as given, or named after the preset or file and the configuration."""
    return arguments.out or Path("runs") / f"{name}-{config_hash(arguments.run)}"


def part_of_work(text: str) -> tuple[int, int]:
    """(i, n) of `I/N`, the part of a work that several processes share; raises UsageError."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--part: {text!r} is no part; write I/N with I from 0 to N-1, for example 0/4")
    return int(index), int(count)

"""The command line: verbs that read options into dataclasses and call one function each.

Nothing heavy is imported before a verb is known, so that --help is immediate.
"""

import atexit
import dataclasses
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from threetowers.commands.arguments import (
    AdviseArguments,
    AnalyseArguments,
    AverageArguments,
    CompareArguments,
    ConvertArguments,
    EmbedArguments,
    EvaluateArguments,
    ExportArguments,
    PretrainArguments,
    PushArguments,
    TrainArguments,
    ValidateArguments,
    VectorsArguments,
    part_of_work,
    run_arguments,
    run_folder,
)
from threetowers.commands.early import check_data, check_run
from threetowers.commands.words import parse, spelled_out
from threetowers.config import CompareConfig
from threetowers.errors import STOPPED, ThreeTowersError, UsageError, of_system
from threetowers.explore.start import explore
from threetowers.progress import say
from threetowers.recipes import PRESETS
from threetowers.settings import did_you_mean

SPINS = 1_000
"""Turns that a thread of GNU OpenMP waits actively at a barrier. By default it waits so long that a run beside one busy
process falls to a fraction of its speed; see benchmarks/busy.py. Results do not depend on it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `threetowers`; exits with 0 or the code of what went wrong, without a traceback of a mistake."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        atexit.register(
            gc.freeze
        )  # a last search for cycles among all modules takes seconds on a busy machine
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))  # read once, when torch is imported
        # as an interrupt from the keyboard, until a training run handles them
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler)
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
        say(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:  # whoever read the output, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        say(f"{of_system(error)}")
        sys.exit(3)
    except KeyboardInterrupt:
        say("interrupted; the same command continues")
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


def _train(words: list[str]) -> int:
    """train a model: threetowers train PRESET|FILE.toml --data PATH [--third timm:NAME] [--method 3t] …"""
    name, arguments = run_arguments(TrainArguments, words, "train")
    check_run(arguments.run)

    from threetowers.commands.train import train

    return train(arguments, run_folder(name, arguments), words)


def _compare(words: list[str]) -> int:
    """find out which method wins: threetowers compare PRESET|FILE --data PATH --third NAME=SPEC … [--seeds 0 1 2]"""
    _, arguments = run_arguments(CompareArguments, words, "compare")
    check_run(arguments.run, compared=True)
    return _compared(arguments)


def _compared(arguments: CompareArguments) -> int:
    from threetowers.compare.comparison import compare

    given = (arguments.run, arguments.options, arguments.out)
    result = compare(*given, max_minutes=arguments.max_minutes, jobs=arguments.jobs)
    return _report(result, arguments.out)


def _advise(words: list[str]) -> int:
    """which method for my data, from short pilots: threetowers advise PRESET|FILE --data PATH --third NAME=SPEC …"""
    _, arguments = run_arguments(AdviseArguments, words, "advise")
    check_run(arguments.run, compared=True)

    from threetowers.compare.advise import advise

    advice = advise(arguments.run, arguments.options, arguments.out, max_minutes=arguments.max_minutes)
    if advice is None:
        print(f"stopped; the same command continues. Folder: {arguments.out}")
        return STOPPED

    from threetowers.report.advice import advice_text, write_advice

    page = write_advice(arguments.out)
    print(f"\n{advice_text(advice)}\n\nreport: {page}")
    return 0


def _demo(words: list[str]) -> int:
    """see the method at work on the built-in world: threetowers demo [--out runs/demo]"""
    options = CompareConfig(
        methods=("baseline", "lit", "3t", "3t-main"), lrs=(2e-3,), title="Three Towers on the built-in world"
    )
    thirds = tuple(f"{name}=shapes:{name}" for name in ("matched", "mismatched"))
    run = dataclasses.replace(PRESETS["shapes"](), third=thirds)
    default = CompareArguments(out=Path("runs/demo"), options=options, run=run)
    return _compared(parse(CompareArguments, words, "demo", default))


def _report(result: dict[str, Any] | None, out: Path) -> int:
    if result is None:
        print(f"stopped; the same command continues. Folder: {out}")
        return STOPPED

    from threetowers.report.page import write_report
    from threetowers.report.terminal import how_to_export, text_table

    page = write_report(out)
    print(f"\n{text_table(result)}\n{how_to_export(result, out)}\nreport: {page}")
    return 0


def _reproduce(words: list[str]) -> int:
    """the study of the paper's claims, resumable at any kill: threetowers reproduce [--quick] [--only C1 C5] …"""

    def reproduce(
        *,
        quick: bool = False,
        only: tuple[str, ...] = (),
        out: Path | None = None,
        records: Path | None = None,
        docs: Path | None = None,
        jobs: int = 0,
        max_minutes: float = 0.0,
    ) -> int:
        """Trains what is missing, and writes a page with the claims, their verdicts, and the figures behind them.

        Args:
            quick: Fewer methods and steps, the third towers of the package and no tuning; about 20 minutes.
            only: Claims (C1 to C6) or parts (tuning, main, growth, ablations, budgets); all without.
            out: Folder of runs, worlds and towers; none is runs/reproduce, or runs/reproduce-quick.
            records: Folder of the finished runs' records, which need no other file; none is OUT/records.
            docs: A Markdown file to write beside the page.
            jobs: Runs at a time; 0 takes what a short trial finds fastest.
            max_minutes: Stop after this long, to be continued; 0 sets no limit.
        """
        from threetowers.report.study import study_text, write_study
        from threetowers.reproduce.plan import FULL, QUICK
        from threetowers.reproduce.study import reproduce
        from threetowers.reproduce.summary import write_summary
        from threetowers.reproduce.tasks import Places

        folder = out or Path("runs/reproduce-quick" if quick else "runs/reproduce")
        protocol = QUICK if quick else FULL
        places = Places(folder, records or folder / "records", shipped=not protocol.own_towers)
        found = reproduce(protocol, places, only=only, jobs=jobs, max_minutes=max_minutes)
        study = write_summary(protocol, places)
        page = write_study(places.page, docs)
        print(f"\n{study_text(study)}\n\nreport: {page}")
        if found is None:
            print(f"stopped; the same command continues. Folder: {folder}")
            return STOPPED
        return 0

    return parse(reproduce, spelled_out(words, "--quick"), "reproduce")


def _page(words: list[str]) -> int:
    """write the page of a run or a comparison: threetowers report FOLDER"""

    def report(folder: tyro.conf.Positional[Path]) -> None:
        """Results, learning curves, settings and, of a run that was profiled, where the time of its steps went.

        Args:
            folder: Of a run, finished or not, or of a comparison.
        """
        from threetowers.report.page import write_report
        from threetowers.report.run import write_run_report

        write = write_report if (folder / "compare.json").is_file() else write_run_report
        print(f"report: {write(folder)}")

    parse(report, words, "report")
    return 0


def _evaluate(words: list[str]) -> int:
    """measure any model: threetowers evaluate RUN|open_clip:…|hf:…|features:DIR [--suite FILE] [--data PATH] …"""
    arguments = parse(EvaluateArguments, words, "evaluate")

    from threetowers.commands.evaluate import evaluate

    evaluate(arguments)
    return 0


def _analyse(words: list[str]) -> int:
    """what the towers of finished runs know, and where they differ: threetowers analyse RUN [RUN …] [--out DIR]"""
    arguments = parse(AnalyseArguments, words, "analyse")

    from threetowers.compare.analysis import analyse
    from threetowers.report.analysis import write_analysis

    print(f"report: {write_analysis(analyse(arguments.runs, arguments.out))}")
    return 0


def _pretrain(words: list[str]) -> int:
    """train a small classifier as third tower: threetowers pretrain --out DIR [--data IMAGES|objects|scenes] …"""
    arguments = parse(PretrainArguments, words, "pretrain")

    from threetowers.train.pretrain import pretrain

    accuracy = pretrain(arguments.config, arguments.out)
    print(f"held-out accuracy {accuracy:.1%}; use it as --third file:{arguments.out}")
    return 0


def _export(words: list[str]) -> int:
    """write the main pair for another library: threetowers export RUN --to open_clip|transformers|onnx --out DIR"""
    arguments = parse(ExportArguments, words, "export")

    from threetowers.commands.export import export

    print(export(arguments))
    return 0


def _push(words: list[str]) -> int:
    """send an exported folder to the Hugging Face Hub, once you agree: threetowers push FOLDER USER/NAME [--private]"""
    arguments = parse(PushArguments, spelled_out(words, "--private", "--yes"), "push")

    from threetowers.commands.push import push

    print(push(arguments))
    return 0


def _convert(words: list[str]) -> int:
    """a foreign .pt, .pth or .bin file as safetensors, no code run: threetowers convert FILE --out FILE.safetensors"""
    arguments = parse(ConvertArguments, words, "convert")

    from threetowers.commands.convert import convert

    print(convert(arguments.file, arguments.out, arguments.key).text())
    return 0


def _average(words: list[str]) -> int:
    """the averaged weights of finished runs as a run: threetowers average RUN RUN … [--weights …] --out DIR"""
    arguments = parse(AverageArguments, words, "average")

    from threetowers.run.average import average_runs

    print(f"run folder: {average_runs(arguments.runs, arguments.weights, arguments.out)}")
    return 0


def _validate(words: list[str]) -> int:
    """check a run in seconds, train nothing: threetowers validate PRESET|FILE.toml [the flags of train]"""
    name, arguments = run_arguments(ValidateArguments, words, "validate")
    check_run(arguments.run)

    from threetowers.commands.validate import show_findings

    show_findings(arguments, run_folder(name, arguments))
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

    return parse(doctor, words, "doctor")


def _embed(words: list[str]) -> int:
    """store a frozen tower's features of a source: threetowers embed --tower SPEC --data PATH --out DIR [--part I/N]"""
    arguments = parse(EmbedArguments, words, "embed")
    part_of_work(arguments.part)
    check_data(arguments.data, arguments.image_column, arguments.caption_columns)

    from threetowers.commands.embed import embed

    print(embed(arguments))
    return 0


def _vectors(words: list[str]) -> int:
    """unit vectors of a finished run for search indexes: threetowers vectors RUN --data PATH --out DIR [--of texts]"""
    arguments = parse(VectorsArguments, words, "vectors")

    from threetowers.commands.vectors import vectors

    print(vectors(arguments))
    return 0


def _towers(words: list[str]) -> int:
    """see what can be a frozen third tower, or describe one: threetowers towers [WORD|timm:NAME|hf:ID …]"""

    def towers(name: tyro.conf.Positional[str] = "", /) -> None:
        """Downloads no weights of published towers.

        Args:
            name: A word to look for in the names, or a tower as --third takes it; without it, an overview.
        """
        from threetowers.commands.towers import towers

        print(towers(name))

    parse(towers, words, "towers")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "compare": _compare,
    "advise": _advise,
    "demo": _demo,
    "reproduce": _reproduce,
    "evaluate": _evaluate,
    "analyse": _analyse,
    "report": _page,
    "explore": explore,
    "pretrain": _pretrain,
    "export": _export,
    "push": _push,
    "average": _average,
    "convert": _convert,
    "embed": _embed,
    "vectors": _vectors,
    "towers": _towers,
    "validate": _validate,
    "doctor": _doctor,
}

if __name__ == "__main__":
    main()

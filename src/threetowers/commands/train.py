"""A training run: in this process, in several that this one starts, or as one of those that torchrun has started."""

import signal
from collections.abc import Sequence
from pathlib import Path

from threetowers.commands.arguments import TrainArguments
from threetowers.errors import STOPPED, ThreeTowersError, UsageError
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.objective.pairs import objective
from threetowers.processes import Processes, is_first_to_say, is_restart, joined, named_by_environment
from threetowers.run.setup import check_settings, describe_data
from threetowers.store.write import BAD_FILE
from threetowers.train import loop
from threetowers.train.together import check_divisible


def train(arguments: TrainArguments, out: Path, words: Sequence[str]) -> int:
    """Trains, evaluates and prints what came of it; returns the exit code.

    words: of the command, for the processes that are started. Raises UsageError for a number of processes that cannot
    be, and what training raises.
    """
    config, started = arguments.run, named_by_environment()
    if started.size > 1 and arguments.processes not in (1, started.size):
        raise UsageError(
            f"processes: {arguments.processes} are asked for, and torchrun has started {started.size}; leave one out"
        )
    check_settings(config)  # a mistake in the settings is said before any data is read
    objective(config)
    check_divisible(config, started.size if started.size > 1 else arguments.processes)
    if arguments.processes > 1 and started.size == 1:
        from threetowers.commands.launch import launch  # torchrun's launcher, which one process does not need

        return launch(arguments.processes, ["train", *words])
    try:
        with joined(config.device) as processes:
            if processes.first:
                print(describe_data(config), flush=True)
            was_finished = (out / "model.json").is_file()
            result = loop.train(
                config,
                out,
                fresh=arguments.fresh and not is_restart(),
                max_minutes=arguments.max_minutes,
                profile=arguments.profile,
                processes=processes,
            )
            evaluation = evaluate_run(out, processes=processes) if result.finished else None
    except ThreeTowersError as error:
        _ignore_launcher(started)
        if is_first_to_say(str(error)):
            raise
        return error.exit_code
    if not processes.first:
        _ignore_launcher(started)
        return 0  # the first one says whether the run is finished
    if arguments.profile:
        print(
            result.profile
            or f"--profile: {out} is finished, so no step was taken; --fresh True trains it again"
        )
    if evaluation is None:
        print(f"stopped at step {result.step}; the same command continues. Run folder: {out}")
        return STOPPED
    if was_finished and not arguments.fresh:
        print("this run was finished before; --fresh True trains it again")
    print(evaluation.text())
    if (out / BAD_FILE).is_file():
        count = len((out / BAD_FILE).read_bytes().splitlines())
        print(f"{count:,} samples could not be used as they are; {out / BAD_FILE} names them and says why")
    print(f"run folder: {out}")
    return 0


def _ignore_launcher(started: Processes) -> None:
    """Lets this process, which is about to end, end by itself; the launcher sends SIGTERM when another has ended."""
    if started.size > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

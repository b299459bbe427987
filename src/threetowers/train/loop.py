"""The one trainer of every method: from batch to optimiser step on a page."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from threetowers.config import RunConfig
from threetowers.data.loader import batches
from threetowers.data.source import check_holds_no_data
from threetowers.evaluate.encode import encode
from threetowers.evaluate.retrieval import ranks_of, recalls
from threetowers.evaluate.suite.live import suite_metrics
from threetowers.objective.pairs import resolved
from threetowers.processes import ALONE, Processes
from threetowers.progress import Progress, duration
from threetowers.run.finished import save_run
from threetowers.run.setup import Setup, autocast
from threetowers.settings import write_config
from threetowers.train import checkpoint
from threetowers.train.guards import StopRequest, differing_keys, folder_lock, holds_run
from threetowers.train.log import Clock, step_metrics, summary, weight_metrics
from threetowers.train.optim import learning_rate
from threetowers.train.profile import TABLE, TRACE, fetched
from threetowers.train.session import (
    Session,
    final_weights,
    log_validation,
    open_session,
    return_to_checkpoint,
    too_many_skipped,
)
from threetowers.train.shards import whole
from threetowers.train.trackers import ID

WRITTEN = (
    "model.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl", "evaluation.json",
    "features.safetensors", "bad_samples.jsonl", TABLE, TRACE, ID,
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """The outcome of a call of `train`. stopped: whether a stop was requested meanwhile.

    profile: where the time of the steps went, as a table; empty where no step was taken, or none to be profiled.
    """

    folder: Path
    finished: bool
    step: int
    stopped: bool = False
    profile: str = ""


def train(
    config: RunConfig,
    folder: Path,
    *,
    fresh: bool = False,
    max_minutes: float = 0.0,
    profile: bool = False,
    stop: StopRequest | None = None,
    processes: Processes = ALONE,
) -> Trained:
    """Trains a configuration in a run folder, or continues what is there; a finished run is left as it is.

    On SIGINT, SIGTERM, SIGUSR1 or after max_minutes the step is finished, a checkpoint written and `finished` is False.
    profile: measure the steps of this call, and write profile.json and trace.json.gz; the weights are the same.
    stop: a request that the caller has entered and that counts instead. processes: those that call this together, to
    train one model; the first of them writes. Raises UsageError, DataError, CheckpointError or NonFiniteError.
    """
    started, config = time.monotonic(), resolved(config)
    folder.mkdir(parents=True, exist_ok=True)
    listening = StopRequest(max_minutes) if stop is None else nullcontext(stop)
    with listening as stop, folder_lock(folder) if processes.first else nullcontext():
        with processes.one_before_all():
            found = _claim(config, folder, fresh) if processes.first else _claimed(folder)
        if (folder / "model.json").is_file():
            return Trained(folder, True, config.steps)
        profile &= processes.first
        session = open_session(config, folder, found, stop, profile=profile, processes=processes)
        try:
            with session.profile or nullcontext():
                while _steps(session):
                    if session.profile:
                        session.profile.step_done()
                    return_to_checkpoint(session)
        finally:
            session.saver.wait()
            session.log.close()
        table = session.profile.write(folder) if session.profile else ""
        setup, step = session.setup, session.state.step
        stopped = stop.requested or (step < config.steps and not session.patience_over)
        if not processes.first:
            return Trained(folder, step == config.steps or session.patience_over, step, stopped)
        if step < config.steps and not session.patience_over:
            session.log.event(f"stopped on request at step {step}")
            return Trained(folder, False, step, stopped=True, profile=table)
        save_run(
            folder,
            config,
            setup.model,
            setup.architecture,
            setup.tokenizer,
            setup.thirds.towers,
            setup.parts(),
            final_weights(session),
        )
        session.log.event(f"finished in {duration(time.monotonic() - started)}")
        return Trained(folder, True, step, stopped=stop.requested, profile=table)


def _steps(session: Session) -> bool:
    """Steps to the end, a stop request or the end of patience; True when the run must return to a checkpoint."""
    setup, state, config = session.setup, session.state, session.setup.config
    table = setup.model.objective
    phase = session.take_step.phase
    bar = Progress(f"training {config.method}", config.steps, "steps", done=state.step)
    clock = Clock(state.seconds)
    if session.patience_over:
        return False
    first, last = state.step + state.skipped_batches, config.steps + state.skipped_batches
    cuda, processes = setup.device.type == "cuda", session.processes
    own, say = processes.own(config.batch_size), session.log.warn_of_own
    for batch in fetched(batches(session.reader, first, last, own=own, pin_memory=cuda, say=say), phase):
        clock.data_ready()
        lr = learning_rate(state.step, config.steps, config.optim)
        weights = table.weights(state.step)
        watch = partial(session.guard.watch, state.step, batch.index)
        result = session.take_step(batch, lr, watch, step=state.step, weights=weights)
        stop = session.agree(batch)

        state.step += 1
        clock.step_done(config.batch_size)
        end = state.step == config.steps
        report = end or state.step % config.log_every_steps == 0
        with phase("log"):
            if (report or not cuda) and too_many_skipped(session):  # waits for the device
                return True
            if report:
                row = step_metrics(setup.model, result, processes)
                row |= weight_metrics(table, weights)
                row |= {"train/lr": lr, "train/grad_norm": result.norm.item()} | clock.rates()
                session.log.metrics(state.step, row | session.bad.counts())
                bar.update(state.step, summary(row), force=end)
                if not cuda and (slow := session.load.remark(torch.get_num_threads())):
                    session.log.warn(slow)
        improved = False
        if end or (config.eval_every_steps and state.step % config.eval_every_steps == 0):
            with phase("validation"), whole(setup.model):
                values = validate(setup, processes)
                values |= suite_metrics(setup, session.watched, processes)
                improved = log_validation(session, values)
        # while steps are being skipped the weights may be bad already, and a run must not return to them
        due = state.step % config.checkpoint_every_steps == 0 and not session.guard.in_row
        if stop or end or improved or due or session.patience_over:
            state.seconds = clock.seconds()
            with phase("checkpoint"):
                session.save(final=stop or end or session.patience_over)
        if session.profile:
            session.profile.step_done()
        if stop or session.patience_over:
            if not end:
                _show_early_end(bar, session)
            break
        clock.lap()
    bar.clear()
    return False


def _show_early_end(bar: Progress, session: Session) -> None:
    """The state at the last step of a run that is stopped or whose patience is over."""
    config, step, why = session.setup.config, session.state.step, ""
    if session.patience_over:
        bar.total = step  # nothing is left to do
        why = f"ended early: no better {config.keep_best} in {config.patience} validations"
    bar.update(step, why, force=True)


def validate(setup: Setup, processes: Processes = ALONE) -> dict[str, float]:
    """Retrieval of the main pair on the validation data, as metrics; nothing when there is none.

    processes: those that call this together, of which each encodes its share.
    """
    if not len(setup.val):
        return {}
    encoded = encode(
        setup.model,
        setup.val,
        setup.tokenizer,
        setup.thirds.stores(setup.val),
        setup.device,
        workers=setup.config.inputs.workers,
        autocast=autocast(setup.config, setup.device),
        kept=setup.kept_views(setup.val),
        processes=processes,
    )
    if not encoded.captions:
        return {}
    return processes.told(
        lambda: {f"val/{name}": value for name, value in recalls(ranks_of(encoded)).items()}
    )


def _claimed(folder: Path) -> checkpoint.Restored | None:
    """The checkpoint that the first process goes on from, which has claimed the folder; None where there is none."""
    return None if (folder / "model.json").is_file() else checkpoint.find(folder / "checkpoints")


def _claim(config: RunConfig, folder: Path, fresh: bool) -> checkpoint.Restored | None:
    """Claims the folder for the run: writes its config, or checks that what is there belongs to the run."""
    path = folder / "config.toml"
    if not fresh and holds_run(folder, config):
        if differing_keys(path, config, all_keys=True):
            write_config(config, path)  # the evaluation, and whoever repeats the run, reads them there
        return checkpoint.find(folder / "checkpoints")
    if not path.is_file():
        check_holds_no_data(folder)
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    checkpoint.discard(folder / "checkpoints")
    write_config(config, path)
    return None

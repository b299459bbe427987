"""The one trainer of every method: from batch to optimiser step on a page."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from threetowers.config import RunConfig, write_config
from threetowers.data.loader import batches
from threetowers.errors import CheckpointError
from threetowers.evaluate.encode import encode
from threetowers.evaluate.retrieval import ranks_from_features, recalls
from threetowers.progress import Progress, duration
from threetowers.run.finished import save_run
from threetowers.run.setup import Prepared
from threetowers.towers.attention import own_attention, trained_attention
from threetowers.train import checkpoint
from threetowers.train.accumulate import accumulate, masked_ids
from threetowers.train.guards import StopRequest, differing_keys, folder_lock
from threetowers.train.log import Clock, step_metrics, summary
from threetowers.train.optim import learning_rate, set_learning_rate
from threetowers.train.session import (
    Session,
    judge,
    must_return,
    open_session,
    return_to_checkpoint,
    take_best,
)

WRITTEN = (
    "model.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl", "evaluation.json",
    "features.safetensors", "bad_samples.jsonl",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a call of `train` came to: the run is finished or not, and whether a stop was asked for meanwhile."""

    folder: Path
    finished: bool
    step: int
    stopped: bool = False


def train(config: RunConfig, folder: Path, *, fresh: bool = False, max_minutes: float = 0.0) -> Trained:
    """Trains a configuration in a run folder, or continues what is there; a finished run is left as it is.

    On SIGINT, SIGTERM, SIGUSR1 or after max_minutes the step is finished, a checkpoint written and `finished` is False.
    Raises UsageError, DataError, CheckpointError or NonFiniteError.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with StopRequest(max_minutes) as stop, folder_lock(folder):
        found = _claim(config, folder, fresh)
        if (folder / "model.json").is_file():
            return Trained(folder, True, config.steps)
        session = open_session(config, folder, found, stop)
        run = session.run
        try:
            with trained_attention(run.device, run.model.img, run.model.txt, bf16=config.precision != "fp32"):
                while _run(session):
                    return_to_checkpoint(session)
        finally:
            session.saver.wait()
        step = session.at.step
        if step < config.steps and not session.patience_over:
            session.log.event(f"stopped on request at step {step}")
            return Trained(folder, False, step, stopped=True)
        take_best(session)
        save_run(folder, config, run.model, run.architecture, run.tokenizer, run.thirds)
        session.log.event(f"finished in {duration(time.monotonic() - started)}")
        return Trained(folder, True, step, stopped=stop.requested)


def _run(session: Session) -> bool:
    """Steps to the end, a stop request or the end of patience; True when the run must return to a checkpoint."""
    run, optimizer, at = session.run, session.optimizer, session.at
    config, model = run.config, run.model
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    bar = Progress(f"training {config.method}", config.steps, "steps", done=at.step)
    clock = Clock(at.seconds)
    model.train()
    if session.patience_over:
        return False
    first, last = at.step + at.moved_on, config.steps + at.moved_on
    pin = run.device.type == "cuda"
    for batch in batches(session.reader, first, last, pin_memory=pin, say=session.log.warn):
        clock.data_ready()
        session.bad.add(batch.bad, seen=len(batch.index))
        lr = learning_rate(at.step, config.steps, config.optim)
        set_learning_rate(optimizer, lr)

        optimizer.zero_grad(set_to_none=True)
        if 0 < config.micro_batch_size < len(batch.index):
            loss, rows, feats = accumulate(run, batch)
        else:
            batch = batch.to(run.device)
            feats = run.features(batch)
            loss, rows = model.loss(feats, masked_ids(run, batch))
            loss.backward()  # type: ignore[no-untyped-call]
        if run.working:
            run.working.hand_over()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm or float("inf"))
        optimizer.found_inf = session.guard.watch(at.step, batch.index, loss.detach(), norm)  # type: ignore[attr-defined]
        optimizer.step()
        model.clamp_scale()
        if run.working:
            run.working.refresh()

        at.step += 1
        clock.step_done(len(batch.index))
        end = at.step == config.steps
        report = end or at.step % config.log_every_steps == 0
        if (report or run.device.type == "cpu") and must_return(session):  # waits for the device
            return True
        if report:
            row = step_metrics(model, loss, rows, feats, batch)
            row |= {"train/lr": lr, "train/grad_norm": norm.item()} | clock.rates()
            session.log.metrics(at.step, row | session.bad.counts())
            bar.update(at.step, summary(row), force=end)
        improved = False
        if end or (config.eval_every_steps and at.step % config.eval_every_steps == 0):
            improved = judge(session, validate(run))
        stop = session.stop.requested
        # in the midst of skipped steps the weights may be broken already: no place to return to
        due = at.step % config.checkpoint_every_steps == 0 and not session.guard.in_row
        if stop or end or improved or due or session.patience_over:
            at.seconds = clock.seconds()
            session.save(final=stop or end or session.patience_over)
        if stop or session.patience_over:
            break
        clock.lap()
    return False


def validate(run: Prepared) -> dict[str, float]:
    """Retrieval of the main pair on the validation data, as metrics; nothing when there is none."""
    if not len(run.val):
        return {}
    with own_attention():
        encoded = encode(
            run.model,
            run.val,
            run.tokenizer,
            run.stores(run.val),
            run.device,
            workers=run.config.inputs.workers,
            autocast=run.autocast(),
        )
    if not encoded.captions:
        return {}
    ranks = ranks_from_features(*encoded.system("main"), encoded.text_image)
    return {f"val/{name}": value for name, value in recalls(ranks).items()}


def _claim(config: RunConfig, folder: Path, fresh: bool) -> checkpoint.Restored | None:
    """Makes the folder this run's: writes its config, or checks that what is there belongs to it."""
    path = folder / "config.toml"
    # a first try that failed before its first checkpoint has nothing to protect
    claimed = (folder / "model.json").is_file() or bool(checkpoint.checkpoints(folder / "checkpoints"))
    if path.is_file() and claimed and not fresh:
        differing = differing_keys(path, config)
        if differing:
            raise CheckpointError(
                f"{folder} holds a run with other settings ({', '.join(differing)}). Give another --out, "
                "or --fresh to replace it"
            )
        return checkpoint.find(folder / "checkpoints")
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    checkpoint.discard(folder / "checkpoints")
    write_config(config, path)
    return None

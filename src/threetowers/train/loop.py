"""The one trainer of every method: from batch to optimiser step on a page."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from threetowers.config import RunConfig, write_config
from threetowers.data.loader import Batch, BatchReader, batches
from threetowers.data.order import Order
from threetowers.errors import CheckpointError, NonFiniteError
from threetowers.evaluate.encode import encode
from threetowers.evaluate.retrieval import ranks_from_features, recalls
from threetowers.model import ThreeTowers
from threetowers.prepare import Prepared, prepare
from threetowers.progress import Progress, duration
from threetowers.run import save_run
from threetowers.train import checkpoint
from threetowers.train.accumulate import accumulate, masked_ids
from threetowers.train.guards import BadSamples, StopRequest, differing_keys
from threetowers.train.log import RunLog
from threetowers.train.optim import adamw, learning_rate, set_learning_rate

WRITTEN = (
    "model.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl", "evaluation.json",
    "features.safetensors", "bad_samples.jsonl",
)  # fmt: skip
MAX_SKIPPED = 5  # non-finite steps in a row after which going on is pointless


@dataclass(frozen=True)
class Trained:
    """What a call of `train` came to."""

    folder: Path
    finished: bool
    step: int


def train(config: RunConfig, folder: Path, *, fresh: bool = False) -> Trained:
    """Trains a configuration in a run folder, or continues what is there; a finished run is left as it is.

    On SIGINT, SIGTERM or SIGUSR1 the step is finished, a checkpoint written and `finished` is False. Raises
    UsageError, DataError, CheckpointError or NonFiniteError.
    """
    started = time.monotonic()
    found = _claim(config, folder, fresh)
    if (folder / "model.json").is_file():
        return Trained(folder, True, config.steps)
    log = RunLog(folder)
    run = prepare(config, folder, saved_tokenizer=folder)
    optimizer = adamw(run.model, config.optim)
    bad = BadSamples(folder, config.inputs.max_bad_share)
    bad.add(problem for source in (run.train, run.val, run.test) for problem in source.problems)
    start = 0
    if found is not None:
        checkpoint.restore(found, run.model, optimizer)
        torch.set_rng_state(_bytes(found.state["torch_rng"]))
        start = found.step
        for line in found.passed_over:
            log.event(f"passed over a checkpoint: {line}")
        log.event(f"continuing from step {start}")
    else:
        torch.manual_seed(config.seed)
        log.event(f"starting: {config.method}, {len(run.train)} training samples, {config.steps} steps")
    log.rewind(start)
    with StopRequest() as stop:
        step = _loop(run, optimizer, folder, log, bad, start, stop)
    if step < config.steps:
        log.event(f"stopped on request at step {step}")
        return Trained(folder, False, step)
    save_run(folder, config, run.model, run.architecture, run.tokenizer, run.thirds)
    log.event(f"finished in {duration(time.monotonic() - started)}")
    return Trained(folder, True, step)


def _loop(
    run: Prepared,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    log: RunLog,
    bad: BadSamples,
    start: int,
    stop: StopRequest,
) -> int:
    """Steps from `start` to the end or to a stop request; returns the number of steps done."""
    config, model = run.config, run.model
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    bar = Progress(f"training {config.method}", config.steps, "steps", done=start)
    clock = _Clock()
    skipped, step = 0, start
    model.train()
    for batch in batches(_reader(run), start, config.steps, pin_memory=run.device.type == "cuda"):
        clock.data_ready()
        bad.add(batch.bad, seen=len(batch.index))
        lr = learning_rate(step, config.steps, config.optim)
        set_learning_rate(optimizer, lr)

        optimizer.zero_grad(set_to_none=True)
        if 0 < config.micro_batch_size < len(batch.index):
            loss, rows, feats = accumulate(run, batch)
        else:
            batch = batch.to(run.device)
            feats = run.features(batch)
            loss, rows = model.loss(feats, masked_ids(run, batch))
            loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm or float("inf"))
        if torch.isfinite(norm):  # waits for the device
            optimizer.step()
            model.clamp_scale()
            skipped = 0
        else:
            skipped += 1
            _skip(log, step, skipped, batch, run)

        step += 1
        clock.step_done(len(batch.index))
        last = step == config.steps
        if step % config.log_every_steps == 0 or last:
            row = _metrics(model, loss, rows, feats, batch) | {"train/lr": lr, "train/grad_norm": norm.item()}
            row |= clock.rates()
            log.metrics(step, row | bad.counts())
            bar.update(step, _summary(row), force=last)
        if stop.requested or last or step % config.checkpoint_every_steps == 0:
            state = {"torch_rng": bytes(torch.get_rng_state().tolist()).hex()}
            checkpoint.save(folder / "checkpoints", step, model, optimizer, state, config.keep_checkpoints)
            if stop.requested and not last:
                break
        if last or (config.eval_every_steps and step % config.eval_every_steps == 0):
            log.metrics(step, validate(run))
        clock.lap()
    return step


def validate(run: Prepared) -> dict[str, float]:
    """Retrieval of the main pair on the validation data, as metrics; nothing when there is none."""
    if not len(run.val):
        return {}
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


def _reader(run: Prepared) -> BatchReader:
    return BatchReader(
        run.train,
        Order(run.config.seed, len(run.train), run.config.batch_size),
        run.tokenizer,
        run.config.inputs,
        image=run.model.spec if run.model.needs_pixels() else None,
        live={name: tower.image for name, tower in run.live_thirds().items()},
        stores=run.stores(run.train, training=True),
    )


def _claim(config: RunConfig, folder: Path, fresh: bool) -> checkpoint.Restored | None:
    """Makes the folder this run's: writes its config, or checks that what is there belongs to it."""
    folder.mkdir(parents=True, exist_ok=True)
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


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _skip(log: RunLog, step: int, skipped: int, batch: Batch, run: Prepared) -> None:
    ids = [run.train.record(int(i)).id for i in batch.index[:5]]
    log.event(
        f"step {step}: the gradient is not finite; the step is skipped. First samples: {', '.join(ids)}"
    )
    if skipped >= MAX_SKIPPED:
        raise NonFiniteError(
            f"{skipped} steps in a row gave gradients that are not finite, the last at step {step} with the samples "
            f"{', '.join(ids)} …. Lower optim.lr, or look at these samples; the last checkpoint is intact"
        )


def _metrics(
    model: ThreeTowers, loss: Tensor, rows: dict[str, Tensor], feats: dict[str, Tensor], batch: Batch
) -> dict[str, float]:
    """The numbers of a step, by metric path; waits for the device."""
    values = {"train/loss": loss.item()}
    values |= {f"train/loss/{name}": value.item() for name, value in rows.items()}
    values |= {f"train/accuracy/{name}": value.item() for name, value in model.accuracies(feats).items()}
    if len(model.log_scale) == 1:
        values["train/scale"] = model.scale().item()
    else:
        values |= {
            f"train/scale/{row.name}": model.scale(i).item() for i, row in enumerate(model.objective.rows)
        }
    for what, ids in (("images", batch.image_ids), ("captions", batch.caption_ids)):
        values[f"data/duplicate_{what}"] = float(len(ids) - len(torch.unique(ids)))
    return values


def _summary(row: dict[str, float]) -> str:
    losses = " ".join(
        f"{name.removeprefix('train/loss/')} {value:.2f}"
        for name, value in row.items()
        if name.startswith("train/loss/")
    )
    return f"loss {row['train/loss']:.3f} ({losses}), waiting for data {row['data/wait']:.0%}"


class _Clock:
    """Where the time of the steps since the last report goes."""

    def __init__(self) -> None:
        self._begin = self._mark = time.monotonic()
        self._waited = self._worked = 0.0
        self._examples = 0

    def data_ready(self) -> None:
        now = time.monotonic()
        self._waited, self._mark = self._waited + now - self._mark, now

    def step_done(self, examples: int) -> None:
        now = time.monotonic()
        self._worked, self._mark = self._worked + now - self._mark, now
        self._examples += examples

    def lap(self) -> None:
        """Starts waiting for the next batch; what was done since the step (validation, saving) counts as neither."""
        self._mark = time.monotonic()

    def rates(self) -> dict[str, float]:
        total = max(self._waited + self._worked, 1e-9)
        values = {
            "seconds": time.monotonic() - self._begin,
            "examples_per_second": self._examples / total,
            "data/wait": self._waited / total,
        }
        self._waited = self._worked = 0.0
        self._examples = 0
        return values

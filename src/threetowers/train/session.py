"""One process's share of a run: taken up, saved, returned to its last checkpoint, ended."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threetowers.config import RunConfig, config_hash, did_you_mean
from threetowers.data.loader import BatchReader
from threetowers.errors import CheckpointError, NonFiniteError, UsageError
from threetowers.evaluate.retrieval import METRICS
from threetowers.run.setup import Prepared, prepare
from threetowers.towers.pair import compile_towers
from threetowers.towers.working_copy import WorkingCopy
from threetowers.train import checkpoint
from threetowers.train.guards import BadSamples, FiniteGuard, StopRequest
from threetowers.train.log import RunLog
from threetowers.train.optim import adamw
from threetowers.train.saver import Saver

MAX_SKIPPED = 5  # non-finite steps in a row after which the run returns to its last checkpoint
MAX_RETURNS = 3  # returns after which going on is pointless


@dataclass
class Standing:
    """Where a run stands, beside its tensors; what a checkpoint's state.json holds of it."""

    step: int = 0
    moved_on: int = 0
    """Batches passed over on returns: step s takes the batch s + moved_on."""
    returns: int = 0
    seconds: float = 0.0
    best: float | None = None
    """Highest value of keep_best, and the step at which it was."""
    best_step: int | None = None
    stale: int = 0
    """Validations since then."""

    def judge(self, value: float) -> bool:
        """Takes note of a validation; whether it is the best so far."""
        if self.best is None or value > self.best:
            self.best, self.best_step, self.stale = value, self.step, 0
            return True
        self.stale += 1
        return False


@dataclass
class Session:
    """One process's share of a run."""

    run: Prepared
    reader: BatchReader
    optimizer: torch.optim.Optimizer
    folder: Path
    log: RunLog
    bad: BadSamples
    stop: StopRequest
    saver: Saver
    at: Standing = field(default_factory=Standing)
    guard: FiniteGuard = field(default_factory=FiniteGuard)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def patience_over(self) -> bool:
        return 0 < self.run.config.patience <= self.at.stale

    def save(self, *, final: bool = False) -> None:
        state = {
            **dataclasses.asdict(self.at),
            **_random_state(self.run.device),
            "in_row": self.guard.in_row,
            "bad": self.bad.state(),
            "data": self.run.train.fingerprint,
        }
        self.saver.save(
            self.at.step, self.run.model, self.optimizer, state, best=self.at.best_step, final=final
        )

    def restore(self, found: checkpoint.Restored) -> None:
        """Takes up a checkpoint; raises CheckpointError when it belongs to other data."""
        state = found.state
        if state["data"] != self.run.train.fingerprint:
            raise CheckpointError(
                f"{self.folder}: the training data is not what it was when this run stopped (step {found.step}): "
                "files, captions or the split differ. Put it back, or give --fresh to start this run again"
            )
        checkpoint.restore(found, self.run.model, self.optimizer)
        if self.run.working:
            self.run.working.refresh()
        _set_random_state(self.run.device, state)
        self.bad.restore(state["bad"])
        self.at = Standing(**{f.name: state[f.name] for f in dataclasses.fields(Standing)})
        self.guard = FiniteGuard(state["in_row"])
        self.log.rewind(found.step)


def open_session(
    config: RunConfig, folder: Path, found: checkpoint.Restored | None, stop: StopRequest
) -> Session:
    """Everything a run needs, at its start or where its checkpoint left it."""
    log = RunLog(folder)
    run = prepare(config, folder, saved_tokenizer=folder)
    _check_keep_best(run)
    optimizer = adamw(run.model, config.optim)
    if config.precision == "bf16-copy":
        run.working = WorkingCopy(run.model.img, run.model.txt)
    if config.compile:
        towers = run.working or run.model
        compile_towers(towers.img, towers.txt)
    bad = BadSamples(folder, config.inputs.max_bad_share, len(run.train))
    bad.add(problem for source in (run.train, run.val, run.test) for problem in source.problems)
    checkpoint.sweep(folder / "checkpoints")
    environment = _environment(config)
    saver = Saver(
        folder / "checkpoints", config.keep_checkpoints, log, environment, background=config.background_saves
    )
    session = Session(run, run.reader(), optimizer, folder, log, bad, stop, saver)
    if found is None:
        torch.manual_seed(config.seed)
        log.rewind(0)
        log.event(f"starting: {config.method}, {len(run.train)} training samples, {config.steps} steps")
        session.save(final=True)  # a disk that refuses is better met now than later
        return session
    for line in found.passed_over:
        log.warn(f"passed over a checkpoint: {line}")
    changed = [
        f"{key} {found.environment.get(key)} → {value}"
        for key, value in environment.items()
        if key != "config" and found.environment.get(key) != value
    ]
    if changed:
        log.warn(f"the last bits of the result may differ from an uninterrupted run's: {', '.join(changed)}")
    session.restore(found)
    log.event(f"continuing from step {found.step}")
    return session


def _environment(config: RunConfig) -> dict[str, Any]:
    """What the last bits of the arithmetic depend on beside the configuration, and the configuration's hash."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "config": config_hash(config),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
    }


def must_return(session: Session) -> bool:
    """Takes note of the steps that were skipped; whether there were too many in a row.

    Raises NonFiniteError when returning has not helped.
    """
    for step, samples in session.guard.skipped():
        ids = ", ".join(session.run.train.record(int(i)).id for i in samples[:3])
        say = session.log.warn if session.guard.in_row == 1 else session.log.event
        say(f"step {step}: loss or gradient is not finite; the step is skipped. First samples: {ids}")
        if session.guard.in_row < MAX_SKIPPED:
            continue
        if session.at.returns >= MAX_RETURNS:
            raise NonFiniteError(
                f"{MAX_SKIPPED} steps in a row gave a loss or gradients that are not finite, after {MAX_RETURNS} "
                f"returns to the last checkpoint; the last was step {step} with the samples {ids} …. Lower optim.lr, "
                "or look at these samples; the last checkpoint is intact"
            )
        return True
    return False


def return_to_checkpoint(session: Session) -> None:
    """Takes up the last checkpoint again, with the batches that have been seen since passed over."""
    session.saver.wait()
    seen, returns = session.at.step + session.at.moved_on, session.at.returns + 1
    found = checkpoint.find(session.checkpoints)
    assert found is not None, "the first checkpoint is written before the first step"
    session.restore(found)
    session.at.moved_on, session.at.returns = seen - found.step, returns
    session.guard = FiniteGuard()
    session.log.warn(
        f"{MAX_SKIPPED} steps in a row were not finite: back to the checkpoint of step {found.step}, going on with the "
        f"batch after them (return {returns} of {MAX_RETURNS})"
    )


def judge(session: Session, values: dict[str, float]) -> bool:
    """Logs a validation; whether it is the best so far by keep_best."""
    session.log.metrics(session.at.step, values)
    name = session.run.config.keep_best
    return name != "none" and session.at.judge(values[name])


def _check_keep_best(run: Prepared) -> None:
    """Raises UsageError for a metric that no validation of this run gives."""
    name = run.config.keep_best
    if name == "none":
        return
    if not len(run.val):
        raise UsageError(f"keep_best: {name!r}: there is no validation data; give --inputs.val-fraction")
    known = [f"val/{metric}" for metric in METRICS]
    if name not in known:
        raise UsageError(f"keep_best: {name!r} is no metric of the validation{did_you_mean(name, known)}")


def take_best(session: Session) -> None:
    """Puts the best checkpoint's weights into the model, when that is asked for."""
    step = session.at.best_step
    if step is None or step == session.at.step:
        return
    try:
        checkpoint.restore_model(session.checkpoints, step, session.run.model)
    except CheckpointError as error:
        raise CheckpointError(
            f"the best checkpoint (step {step}) cannot be used: {error}. Its weights are lost; give --fresh to train "
            "again, or --keep-best none with another --out"
        ) from None
    name = session.run.config.keep_best
    session.log.event(
        f"the weights are those of step {step}, where {name} was highest: {session.at.best:.4f}"
    )


def _random_state(device: torch.device) -> dict[str, str]:
    state = {"torch_rng": bytes(torch.get_rng_state().tolist()).hex()}
    if device.type == "cuda":
        state["cuda_rng"] = bytes(torch.cuda.get_rng_state(device).tolist()).hex()
    return state


def _set_random_state(device: torch.device, state: dict[str, Any]) -> None:
    torch.set_rng_state(_bytes(state["torch_rng"]))
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda_rng"]), device)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

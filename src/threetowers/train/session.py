"""The state of a run in this process: started or continued, saved, and returned to its last checkpoint."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threetowers.config import RunConfig
from threetowers.data.loader import Batch, BatchReader
from threetowers.errors import BadSample, CheckpointError, NonFiniteError, UsageError
from threetowers.evaluate.evaluation import check_evaluation
from threetowers.evaluate.retrieval import METRICS
from threetowers.evaluate.suite.live import open_watched, suite_metrics
from threetowers.evaluate.suite.sets import OpenSet
from threetowers.files import write_whole
from threetowers.heartbeats import PLACE, phases_told
from threetowers.processes import ALONE, Processes
from threetowers.progress import say
from threetowers.run.finished import changed_parts
from threetowers.run.setup import Setup, prepare
from threetowers.settings import config_hash, did_you_mean
from threetowers.system import OtherLoad
from threetowers.train import checkpoint
from threetowers.train.guards import BadSamples, FiniteGuard, StopRequest
from threetowers.train.log import RunLog
from threetowers.train.optim import describe_groups
from threetowers.train.profile import Profile, no_phase
from threetowers.train.room import check_room, room
from threetowers.train.saver import Saver
from threetowers.train.shards import cut_parameters, is_sharded
from threetowers.train.step import TrainingStep
from threetowers.train.together import check_equal, check_shares, share_machine, speak_of_own
from threetowers.train.trackers import Trackers, check_trackers

MAX_SKIPPED = 5  # non-finite steps in a row after which the run returns to its last checkpoint
MAX_RETURNS = 3  # returns after which the run ends


@dataclass
class RunState:
    """The counters of a run; its tensors are in the model and the optimiser."""

    step: int = 0
    skipped_batches: int = 0
    """Batches passed over on returns: step s takes the batch s + skipped_batches."""
    returns: int = 0
    seconds: float = 0.0
    best: float | None = None
    """Highest value of keep_best, and the step at which it was."""
    best_step: int | None = None
    stale: int = 0
    """Validations since then."""

    def as_dict(self) -> dict[str, Any]:
        """The counters under their names in a checkpoint's state.json."""
        return {_STATE_KEYS.get(name, name): value for name, value in dataclasses.asdict(self).items()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "RunState":
        """The counters in a checkpoint's state.json; other keys are left alone."""
        names = [field.name for field in dataclasses.fields(RunState)]
        return RunState(**{name: values[_STATE_KEYS.get(name, name)] for name in names})

    def is_best(self, value: float) -> bool:
        """Records a validation's value of keep_best; whether it is the highest so far."""
        if self.best is None or value > self.best:
            self.best, self.best_step, self.stale = value, self.step, 0
            return True
        self.stale += 1
        return False


_STATE_KEYS = {"skipped_batches": "moved_on"}
"""Names in state.json that differ from the fields'."""


@dataclass
class Session:
    """A run in this process."""

    setup: Setup
    reader: BatchReader
    take_step: TrainingStep
    folder: Path
    log: RunLog
    bad: BadSamples
    stop: StopRequest
    saver: Saver
    state: RunState = field(default_factory=RunState)
    guard: FiniteGuard = field(default_factory=FiniteGuard)
    load: OtherLoad = field(default_factory=OtherLoad)
    profile: Profile | None = None
    watched: list[OpenSet] = field(default_factory=list)
    """The data sets of a suite that are measured at each validation."""
    processes: Processes = ALONE
    """Those that train the model together; all have the same counters, and decide alike."""

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def patience_over(self) -> bool:
        return 0 < self.setup.config.patience <= self.state.stale

    def agree(self, batch: Batch) -> bool:
        """Counts the bad samples of all processes in a step; whether any of these was asked to stop."""
        stop, bad = self.stop.requested, batch.bad
        if self.processes.size > 1:
            some = self.processes.add(torch.tensor([int(stop), len(bad)]))  # in host memory
            stop = bool(some[0])
            if some[1]:
                named = self.processes.exchange([[each.id, each.reason, each.detail] for each in bad])
                bad = [BadSample(*words) for of_one in named for words in of_one]
        self.bad.add(bad, seen=len(batch.index) * self.processes.size)
        PLACE.step_done(self.state.step + 1)
        return stop

    def save(self, *, final: bool = False) -> None:
        """Writes a checkpoint of the step; final: waits for it, and lets no failure pass."""
        if not (self.processes.first or is_sharded(self.setup.model)):
            return
        state = {
            **self.state.as_dict(),
            **_random_state(self.setup.device),
            "in_row": self.guard.in_row,
            "bad": self.bad.state(),
            "data": self.setup.train.fingerprint,
            "parts": self.setup.parts(),
            "thirds": self.setup.thirds.fingerprints(),
        }
        self.saver.save(
            self.state.step, self.setup.model, self.take_step.optimizer, state,
            best=self.state.best_step, final=final,
        )  # fmt: skip

    def restore(self, found: checkpoint.Restored) -> None:
        """Continues from a checkpoint; raises CheckpointError when it belongs to other data."""
        state = found.state
        if state["data"] != self.setup.train.fingerprint:
            raise CheckpointError(
                f"{self.folder}: the training data is not what it was when this run stopped (step {found.step}): "
                "files, captions or the split differ. Put it back, or give --fresh to start this run again"
            )
        replaced = self.setup.thirds.changed(state.get("thirds", {}))
        if replaced:
            raise CheckpointError(
                f"{self.folder}: third tower {', '.join(replaced)} is not what it was when this run stopped (step "
                f"{found.step}): weights or preprocessing differ. Put it back, or give --fresh to start this run again"
            )
        changed = changed_parts(state.get("parts", {}), self.setup.parts())
        if changed:
            self.log.warn(f"data has changed since this run was stopped: {', '.join(changed)}")
        checkpoint.restore(found, self.setup.model, self.take_step.optimizer)
        _set_random_state(self.setup.device, state)
        self.bad.restore(state["bad"])
        self.state = RunState.from_dict(state)
        self.guard = FiniteGuard(state["in_row"])
        self.log.rewind(found.step)


def open_session(
    config: RunConfig,
    folder: Path,
    found: checkpoint.Restored | None,
    stop: StopRequest,
    *,
    profile: bool = False,
    processes: Processes = ALONE,
) -> Session:
    """The session of a run, at its start or at its last checkpoint. profile: measure its steps.

    processes: those that train together.
    """
    check_trackers(config.trackers)
    check_evaluation(config)  # before hours of training
    share_machine(processes)
    setup = prepare(config, folder, saved_tokenizer=folder, processes=processes)
    reader = setup.reader()
    speak_of_own(processes)
    check_shares(setup, processes)
    check_equal(processes, setup, found)
    watched = open_watched(config.suite, config.suite_images)
    _check_keep_best(setup, watched, processes)
    own = Profile(setup.device, found.step if found else 0, config.steps) if profile else None
    phase = own.phase if own else no_phase
    if processes.size > 1:
        PLACE.step, phase = found.step if found else 0, phases_told(phase)
    take_step = TrainingStep(config, setup.model, setup.device, setup.thirds.features, phase, processes)
    bad = BadSamples(folder, config.inputs.max_bad_share, len(setup.train), writes=processes.first)
    bad.add(problem for source in (setup.train, setup.val, setup.test) for problem in source.problems)
    if processes.first:
        checkpoint.sweep(folder / "checkpoints")
    environment = {**_environment(config), "processes": processes.size}
    trackers = Trackers(
        config.trackers if processes.first else (), folder, config, found.step if found else 0
    )
    log = RunLog(folder, trackers, writes=processes.first)
    saver = Saver(
        folder / "checkpoints", config.keep_checkpoints, log, environment, background=config.background_saves,
        writers=processes if is_sharded(setup.model) else ALONE,
    )  # fmt: skip
    session = Session(
        setup, reader, take_step, folder, log, bad, stop, saver,
        profile=own, watched=watched, processes=processes,
    )  # fmt: skip
    if found is not None:
        _go_on(session, found, environment)
    else:
        _begin(session)
    return session


def _begin(session: Session) -> None:
    """Writes what is written before the first step."""
    setup, folder, log = session.setup, session.folder, session.log
    config = setup.config
    torch.manual_seed(config.seed)
    log.rewind(0)
    if session.processes.first:
        table = describe_groups(session.take_step.optimizer, config.optim.lr)
        write_whole(folder / "optimizer.json", json.dumps(table, indent=1))
    log.event(f"starting: {config.method}, {len(setup.train)} training samples, {config.steps} steps")
    session.save(final=True)  # a full disk is better found now than after hours
    needs = room(setup)
    if session.processes.first:
        check_room(
            folder, config.keep_checkpoints * needs.checkpoint + needs.model
        )  # besides what was just saved


def _go_on(session: Session, found: checkpoint.Restored, environment: dict[str, Any]) -> None:
    """Continues from a checkpoint, and says what differs from when it was written."""
    log, before = session.log, {"processes": 1, **found.environment}
    for line in found.passed_over:
        log.warn(f"passed over a checkpoint: {line}")
    changed = [
        f"{key} {before.get(key)} → {value}"
        for key, value in environment.items()
        if key != "config" and before.get(key) != value
    ]
    if changed:
        log.warn(f"the last bits of the result may differ from an uninterrupted run's: {', '.join(changed)}")
    session.restore(found)
    log.event(f"continuing from step {found.step}")
    if session.processes.first:
        say(f"{session.folder}: continuing from step {found.step}")


def _environment(config: RunConfig) -> dict[str, Any]:
    """The configuration's hash, and what else the last bits of the result depend on."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "config": config_hash(config),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
    }


def too_many_skipped(session: Session) -> bool:
    """Logs the steps that were skipped since the last call; whether there were too many in a row.

    Raises NonFiniteError when returning has not helped.
    """
    for step, samples in session.guard.skipped():
        ids = ", ".join(session.setup.train.record(int(i)).id for i in samples[:3])
        say = session.log.warn if session.guard.in_row == 1 else session.log.event
        say(f"step {step}: loss or gradient is not finite; the step is skipped. First samples: {ids}")
        if session.guard.in_row < MAX_SKIPPED:
            continue
        if session.state.returns >= MAX_RETURNS:
            raise NonFiniteError(
                f"{MAX_SKIPPED} steps in a row gave a loss or gradients that are not finite, after {MAX_RETURNS} "
                f"returns to the last checkpoint; the last was step {step} with the samples {ids} …. Lower optim.lr, "
                "or look at these samples; the last checkpoint is intact"
            )
        return True
    return False


def return_to_checkpoint(session: Session) -> None:
    """Continues from the last checkpoint, and passes over the batches that have been seen since."""
    seen, returns = session.state.step + session.state.skipped_batches, session.state.returns + 1
    with session.processes.one_before_all():
        session.saver.wait()
        found = checkpoint.find(session.checkpoints)
    assert found is not None, "the first checkpoint is written before the first step"
    session.restore(found)
    session.state.skipped_batches, session.state.returns = seen - found.step, returns
    session.guard = FiniteGuard()
    session.log.warn(
        f"{MAX_SKIPPED} steps in a row were not finite: back to the checkpoint of step {found.step}, going on with the "
        f"batch after them (return {returns} of {MAX_RETURNS})"
    )


def log_validation(session: Session, values: dict[str, float]) -> bool:
    """Logs a validation; whether it is the best so far by keep_best."""
    session.log.metrics(session.state.step, values)
    name = session.setup.config.keep_best
    return name is not None and session.state.is_best(values[name])


def _check_keep_best(setup: Setup, watched: Sequence[OpenSet], processes: Processes) -> None:
    """Raises UsageError for a metric that no validation of this run gives."""
    name = setup.config.keep_best
    if name is None:
        return
    if name.startswith("val/") and not len(setup.val):
        raise UsageError(f"keep_best: {name!r}: there is no validation data; give --inputs.val-fraction")
    known = [f"val/{metric}" for metric in METRICS]
    if name not in known and watched:
        # which metrics a suite gives is known when it is measured
        known += suite_metrics(setup, watched, processes)
    if name not in known:
        raise UsageError(f"keep_best: {name!r} is no metric of the validation{did_you_mean(name, known)}")


def final_weights(session: Session) -> dict[str, Tensor]:
    """The whole weights that a finished run keeps: those of its last step, or of the best one where that is asked for.

    A model that is cut up is read from the run's last checkpoint, which is that of its last step.
    """
    model, last = session.setup.model, session.state.step
    step = last if session.state.best_step is None else session.state.best_step
    if step == last and not is_sharded(model):
        return model.state_dict()
    try:
        if not is_sharded(model):
            checkpoint.restore_model(session.checkpoints, step, model)
            weights = model.state_dict()
        else:
            weights = checkpoint.read_model(session.checkpoints, step)
            cut = cut_parameters(model)
            model.load_state_dict({n: w for n, w in weights.items() if n not in cut}, strict=False)
    except CheckpointError as error:
        raise CheckpointError(
            f"the best checkpoint (step {step}) cannot be used: {error}. Its weights are lost; give --fresh to train "
            "again, or --keep-best none with another --out"
        ) from None
    if step != last:
        name = session.setup.config.keep_best
        session.log.event(
            f"the weights are those of step {step}, where {name} was highest: {session.state.best:.4f}"
        )
    return weights


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

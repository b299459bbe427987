"""The one training step, from a batch to moved weights. Training, `validate` and the benchmarks all take this one.

take_step = TrainingStep(config, model, device, setup.thirds.features)
result = take_step(batch, lr=1e-3)
result.loss, result.rows, result.norm
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from threetowers.config import RunConfig
from threetowers.data.loader import Batch
from threetowers.model import ThreeTowers
from threetowers.processes import ALONE, Processes
from threetowers.run.setup import autocast
from threetowers.towers.attention import trained_attention
from threetowers.towers.pair import compile_towers
from threetowers.train.accumulate import accumulate
from threetowers.train.optim import adamw, set_learning_rate
from threetowers.train.profile import Phase, no_phase
from threetowers.train.shards import Gradients, last_backward, shard


@dataclass(frozen=True)
class StepResult:
    """What a step computed. loss, rows: the weighted sum, and each row's own loss by name; norm: of the gradient.

    These are of the whole batch. feats: the towers' features by name, without gradients where micro-batches were taken.
    batch: as the step saw it, on the device unless micro-batches were taken. Both are those of this process.
    """

    loss: Tensor
    rows: dict[str, Tensor]
    feats: dict[str, Tensor]
    norm: Tensor
    batch: Batch


class TrainingStep:
    """Moves a model's weights by one optimiser step at each call.

    third_features: the frozen features [B, P] of a batch by view name, stored or computed on the spot. phase: the
    context in which each part of the step is taken. processes: those that take the step together, each with its part of
    the batch; all end with the same weights. Puts the model into train mode, takes frozen parameters out of
    training and, when the configuration says so, compiles the towers, or cuts them up over the processes. Raises
    UsageError as `adamw` does.
    """

    def __init__(
        self,
        config: RunConfig,
        model: ThreeTowers,
        device: torch.device,
        third_features: Callable[[Batch], dict[str, Tensor]],
        phase: Phase = no_phase,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.model, self.device, self.third_features = config, model, device, third_features
        self.phase, self.processes = phase, processes
        self.bf16 = config.precision != "fp32"
        if config.shard == "blocks" and processes.size > 1:
            shard(model, device, processes, bf16=self.bf16)
        self.optimizer = adamw(model, config.optim, model.started)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.gradients = Gradients(model, self.optimizer, processes)
        if config.compile:
            compile_towers(model.img, model.txt)
        model.train()

    def __call__(
        self,
        batch: Batch,
        lr: float,
        found_inf: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        step: int = 0,
        weights: Sequence[float] | None = None,
    ) -> StepResult:
        """One step on a batch in host memory or on the device.

        step: its number, counted from 0, by which rules say what trains.
        weights: of the rows at this step; None takes those of the first step.
        found_inf: from the loss and the gradient's norm, 1.0 on the device when the weights must stay as they are.
        """
        config, model, optimizer, phase = self.config, self.model, self.optimizer, self.phase
        with phase("optimiser"):
            set_learning_rate(optimizer, lr, step)
            optimizer.zero_grad(set_to_none=True)
        self.processes.seed(config.seed, step)
        # around the backward pass too, where checkpointed activations are made again
        with trained_attention(self.device, model.img, model.txt, bf16=self.bf16):
            if 0 < config.micro_batch_size < len(batch.index):
                loss, rows, feats = accumulate(
                    batch,
                    config.micro_batch_size,
                    self.device,
                    self.features,
                    partial(self.loss, weights=weights),
                    phase,
                    partial(last_backward, model),
                )
            else:
                with phase("data"):
                    batch = batch.to(self.device)
                feats = self.features(batch)
                loss, rows = self.loss(feats, batch, weights)
                with phase("backward"):
                    loss.backward()  # type: ignore[no-untyped-call]
        with phase("optimiser"):
            self.gradients.collect()
            norm = self.gradients.norm()
            clip_grads_with_norm_(self.parameters, config.optim.clip_norm or float("inf"), norm)
            if found_inf is not None:
                optimizer.found_inf = found_inf(loss.detach(), norm)  # type: ignore[attr-defined]
            optimizer.step()
            model.clamp_scale()
        return StepResult(loss, rows, feats, norm, batch)

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """The features fp32 by tower name of a batch that lies on the device."""
        with self.phase("third"):
            thirds = self.third_features(batch)
        with self.phase("forward"):
            return self.model.features(
                pixels=batch.pixels,
                tokens=batch.tokens,
                thirds=thirds,
                autocast=autocast(self.config, self.device),
            )

    def loss(
        self, feats: dict[str, Tensor], batch: Batch, weights: Sequence[float] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum over the rows of the objective, and each row's own loss by name; weights: as in a step."""
        with self.phase("loss"):
            ids: tuple[Tensor, ...] = ()
            if self.config.inputs.mask_duplicates:
                ids = (batch.image_ids.to(self.device), batch.caption_ids.to(self.device))
            bf16 = self.bf16 and self.device.type == "cuda"
            return self.model.loss(feats, ids, bf16=bf16, weights=weights, processes=self.processes)

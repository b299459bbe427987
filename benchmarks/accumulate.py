"""A batch beyond memory in micro-batches: ours against open_clip's `--accum-freq`, and how exact ours is.

    python benchmarks/accumulate.py [--device cpu] [--num 4096] [--micro 256] [--rounds 1] [--out FILE.json]

A step is both passes through the towers, the loss of the whole batch, clipping and AdamW, at the size of ViT-S-32 and
with stored frozen features. open_clip's side is `open_clip_train.train.train_one_epoch`, as it is, in bf16 autocast; it
computes the loss of the whole batch once for each micro-batch. About 23 minutes a round on two cores.
"""

import argparse
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import open_clip
import torch
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn

from measure import interleaved, report
from step import MODEL, PAIR, SPEC, TOKENS, WIDTH, as_batch, random_batch
from threetowers.config import RunConfig
from threetowers.data.transforms import normalise
from threetowers.model import build
from threetowers.objective.pairs import METHODS
from threetowers.run.setup import pick_device
from threetowers.towers.frozen.base import FrozenTower
from threetowers.train.accumulate import accumulate
from threetowers.train.step import TrainingStep

TABLES = {
    "rows": (
        "One training step of each contender: `samples per second`, their `ratio` to those of the reference, "
        "and `spread`, the slowest round divided by the fastest."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""


class Rows(nn.Module):
    """open_clip's ClipLoss for one row, or for 3T's three with plain linear heads, as one would patch it."""

    def __init__(self, third: Tensor | None, dim: int) -> None:
        super().__init__()
        self.third, self.loss = third, open_clip.ClipLoss(cache_labels=True)
        sizes = {} if third is None else {"img": dim, "txt": dim, "third_img": WIDTH, "third_txt": WIDTH}
        self.heads = nn.ModuleDict({name: nn.Linear(size, dim, bias=False) for name, size in sizes.items()})

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = True
    ) -> dict[str, Tensor]:
        rows = [(image_features, text_features)]
        if self.third is not None:
            rows.append((self.view("img", image_features), self.view("third_img", self.third)))
            rows.append((self.view("txt", text_features), self.view("third_txt", self.third)))
        return {"contrastive": torch.stack([self.loss(a, b, logit_scale) for a, b in rows]).mean()}

    def view(self, head: str, features: Tensor) -> Tensor:
        return nn.functional.normalize(self.heads[head](features), dim=-1)


class Epoch:
    """One global batch as open_clip's trainer takes its data: an epoch of micro-batches, float images included."""

    def __init__(self, pixels: Tensor, tokens: Tensor, micro: int) -> None:
        self.dataloader = self
        self.num_samples, self.num_batches = len(pixels), len(pixels) // micro
        self._parts = list(zip(torch.split(pixels, micro), torch.split(tokens, micro), strict=True))

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, tokens in self._parts:
            yield normalise(pixels, SPEC), tokens


def open_clip_step(pixels: Tensor, tokens: Tensor, third: Tensor | None, micro: int) -> Callable[[], None]:
    """An epoch of one optimiser step under open_clip's own trainer."""
    device = pixels.device
    model = open_clip.create_model(MODEL, device=device, output_dict=True)
    loss = Rows(third, model.text_projection.shape[1]).to(device)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *loss.parameters()], lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
    )
    data = Epoch(pixels, tokens, micro)
    options = Namespace(
        device=str(device), precision="amp_bf16", accum_freq=data.num_batches, distill=False, horovod=False,
        skip_scheduler=True, grad_clip_norm=1.0, log_every_n_steps=1, batch_size=micro, world_size=1, rank=0,
        log_local=False, wandb=False,
    )  # fmt: skip
    return lambda: train_one_epoch(model, {"train": data}, loss, 0, optimizer, None, None, None, options)


def our_step(config: RunConfig, device: torch.device) -> TrainingStep:
    """The step of `train` with a micro-batch size, on stored frozen features."""
    frozen = FrozenTower("third", "benchmark", nn.Identity(), WIDTH, SPEC)
    thirds = {"third": frozen} if METHODS[config.method].needs_third else {}
    model, _ = build(config, thirds, {"vocab_size": 49_408})
    return TrainingStep(config, model.to(device), device, lambda batch: batch.third_features)


def exactness(device: torch.device, num: int = 96, micro: int = 17) -> dict[str, float]:
    """Norm-wise relative error of all gradients together, fp32, with an uneven last micro-batch.

    Without dropout against the whole batch at once; with patch dropout against one graph over the same micro-batches
    under the same random states.
    """
    found = {}
    for name, dropout in (("whole batch", 0.0), ("patch dropout", 0.5)):
        pair = replace(PAIR, vision={"patch_dropout": dropout})
        config = RunConfig(method="3t", third=("timm:x",), pair=pair, micro_batch_size=micro)
        step = our_step(config, device)
        parameters = list(step.model.parameters())
        pixels, tokens = random_batch(num, device)
        batch = as_batch(pixels, tokens[:, :TOKENS], torch.randn(num, WIDTH, device=device))
        size = micro if dropout else num
        torch.manual_seed(1)
        parts = [step.features(batch.part(start, start + size)) for start in range(0, num, size)]
        loss, _ = step.loss({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, batch)
        expected = torch.autograd.grad(loss, parameters, allow_unused=True)
        torch.manual_seed(1)
        accumulate(batch, micro, device, step.features, step.loss)
        pairs = [(p.grad, g) for p, g in zip(parameters, expected, strict=True) if p.grad is not None]
        assert all(g is not None for _, g in pairs)
        error = sum(
            float((a - b).double().square().sum()) for a, b in pairs if b is not None and a is not None
        )
        size_of = sum(float(b.double().square().sum()) for _, b in pairs if b is not None)
        found[name] = (error / size_of) ** 0.5
        print(f"gradient error against {name}: {found[name]:.1e} (bar 1e-6)", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num", type=int, default=4096)
    parser.add_argument("--micro", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/accumulate.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = pick_device(arguments.device)
    errors = exactness(device)
    pixels, tokens = random_batch(arguments.num, device)
    third = torch.randn(arguments.num, WIDTH, device=device)
    batch = as_batch(pixels, tokens[:, :TOKENS], third)
    three = RunConfig(
        method="3t", third=("timm:x",), pair=PAIR, precision="bf16-autocast", micro_batch_size=arguments.micro
    )
    one_row = replace(three, method="baseline", third=())

    def ours(config: RunConfig) -> Callable[[], object]:
        step = our_step(config, device)
        return lambda: step(batch, config.optim.lr)

    names = {rows: f"open_clip accum-freq, {rows}" for rows in ("CLIP", "3T")}
    steps: dict[str, Callable[[], object]] = {
        names["CLIP"]: open_clip_step(pixels, tokens, None, arguments.micro),
        "ours, CLIP": ours(one_row),
        names["3T"]: open_clip_step(pixels, tokens, third, arguments.micro),
        "ours, 3T": ours(three),
    }
    warm_ups = 0 if device.type == "cpu" else 2  # a step of minutes needs none
    times = interleaved(steps, arguments.rounds, device, warm_ups)
    settings = {"model": MODEL, "num": arguments.num, "micro": arguments.micro, "errors": errors}
    rates = report(times, arguments.num, names["CLIP"], device, arguments.out, **settings)
    for rows, name in names.items():
        print(f"{rows}: ours {rates[f'ours, {rows}'] / rates[name]:.2f} times as fast (bar 2)")


if __name__ == "__main__":
    main()

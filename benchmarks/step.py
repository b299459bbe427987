"""One training step at the size of ViT-S-32: ours rung by rung, beside open_clip's CLIP step and a 3T of its parts.

    python benchmarks/step.py [--device cpu] [--batch-size 64] [--rounds 4] [--out runs/bench/step.json]

A step is forward, loss, backward, clipping and AdamW, on the same pixels and captions of at most 24 tokens. open_clip
runs as its trainer does: all 77 tokens, its ClipLoss, its autocast (`amp`, the default of its trainer, is fp16 and made
for GPUs; `amp_bf16` is what it offers CPUs). Random weights; the frozen tower is ViT-B-32.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from measure import interleaved, report
from threetowers.config import InputConfig, PairConfig, RunConfig
from threetowers.data.loader import Batch
from threetowers.data.transforms import ImageSpec, normalise
from threetowers.model import build
from threetowers.objective.pairs import METHODS
from threetowers.run.setup import pick_device
from threetowers.run.thirds import Thirds
from threetowers.towers.frozen.base import FrozenTower
from threetowers.train.step import TrainingStep

TABLES = {
    "rows": (
        "One training step of each contender: `samples per second`, their `ratio` to those of the reference, "
        "and `spread`, the slowest round divided by the fastest."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

MODEL, THIRD, TOKENS, CONTEXT = "ViT-S-32", "ViT-B-32", 24, 77
WIDTH = 512  # of the frozen tower's features
PAIR = PairConfig(model=MODEL)
SPEC = ImageSpec(224, PAIR.mean, PAIR.std)


def random_batch(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 pixels, and token ids whose end token stands between places 12 and 24."""
    pixels = torch.randint(0, 256, (size, 3, 224, 224), dtype=torch.uint8)
    tokens = torch.zeros(size, CONTEXT, dtype=torch.long)
    for row in tokens:
        length = int(torch.randint(12, TOKENS + 1, ()))
        row[:length] = torch.randint(1, 49_000, (length,))
        row[length - 1] = 49_407
    tokens[0, TOKENS - 1] = 49_407
    return pixels.to(device), tokens.to(device)


def open_clip_step(
    batch: tuple[Tensor, Tensor], device: torch.device, dtype: torch.dtype | None, third: nn.Module | None
) -> Callable[[], None]:
    """open_clip's model and loss as its trainer runs them; with a third tower, three of its losses and linear heads."""
    model = open_clip.create_model(MODEL, device=device)
    width = model.text_projection.shape[1]
    names = {"img": width, "txt": width, "third@img": WIDTH, "third@txt": WIDTH} if third else {}
    heads = nn.ModuleDict({name: nn.Linear(size, width) for name, size in names.items()}).to(device)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    loss_fn = open_clip.ClipLoss()

    def view(head: str, features: Tensor) -> Tensor:
        return nn.functional.normalize(heads[head](features), dim=-1)

    def step() -> None:
        images = normalise(batch[0], SPEC)
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            f, g, scale = model(images, batch[1])
            loss = loss_fn(f, g, scale)
            if third is not None:
                with torch.no_grad():
                    p = third(images)
                of_image = loss_fn(view("img", f), view("third@img", p), scale)
                of_text = loss_fn(view("txt", g), view("third@txt", p), scale)
                loss = (loss + of_image + of_text) / 3
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)

    return step


def as_batch(pixels: Tensor, tokens: Tensor, third: Tensor | None, *, live: bool = False) -> Batch:
    """A batch as the loader makes it; third: stored features, unless a live tower computes them."""
    ids = torch.arange(len(pixels))
    stored = {} if third is None or live else {"third": third}
    return Batch(ids, tokens, pixels, stored, {"third": pixels} if live else {}, ids, ids)


def our_step(
    config: RunConfig, batch: tuple[Tensor, Tensor], device: torch.device, *, live: bool, trimmed: bool = True
) -> Callable[[], object]:
    """A step as `train` takes it; the frozen tower computed in the step in bf16, or stored."""
    visual = open_clip.create_model(THIRD).visual
    tower = FrozenTower("third", "benchmark", visual, WIDTH, SPEC, precision="bf16").to(device)
    thirds = {"third": tower} if METHODS[config.method].needs_third else {}
    model, _ = build(config, thirds, {"vocab_size": 49_408})
    stored = torch.randn(len(batch[0]), WIDTH, device=device) if thirds else None
    inputs = as_batch(batch[0], batch[1][:, :TOKENS] if trimmed else batch[1], stored, live=live)
    owner = Thirds(thirds, model.thirds, InputConfig(third_view="same" if live else "fixed"), device, Path())
    take_step = TrainingStep(config, model.to(device), device, owner.features)
    return lambda: take_step(inputs, config.optim.lr)


def contenders(size: int, device: torch.device, amp: bool) -> dict[str, Callable[[], object]]:
    batch = random_batch(size, device)
    frozen = open_clip.create_model(THIRD, device=device).visual.eval().requires_grad_(False)
    base = RunConfig(method="3t", third=("timm:x",), pair=PAIR)
    auto = replace(base, precision="bf16-autocast")

    def ours(config: RunConfig, **options: Any) -> Callable[[], object]:
        return our_step(config, batch, device, **options)

    steps: dict[str, Callable[[], object]] = {
        "open_clip CLIP, amp_bf16": open_clip_step(batch, device, torch.bfloat16, None)
    }
    if amp:
        steps["open_clip CLIP, amp (its default)"] = open_clip_step(batch, device, torch.float16, None)
    return steps | {
        "open_clip CLIP, fp32": open_clip_step(batch, device, None, None),
        "3T of open_clip parts, live, amp_bf16": open_clip_step(batch, device, torch.bfloat16, frozen),
        "ours 3T live, autocast, 77 tokens": ours(auto, live=True, trimmed=False),
        "ours 3T live, autocast, trimmed": ours(auto, live=True),
        "ours 3T stored, autocast, trimmed": ours(auto, live=False),
        "ours 3T stored, fp32, trimmed": ours(base, live=False),
        "ours CLIP, autocast, trimmed": ours(replace(auto, method="baseline", third=()), live=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--amp", action="store_true", help="also open_clip's default, fp16; very slow on CPUs"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/step.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = pick_device(arguments.device)
    times = interleaved(contenders(arguments.batch_size, device, arguments.amp), arguments.rounds, device)
    size, plain = arguments.batch_size, "open_clip CLIP, amp_bf16"
    rates = report(times, size, plain, device, arguments.out, model=MODEL, third=THIRD, batch_size=size)
    stored = rates["ours 3T stored, autocast, trimmed"] / max(rates[plain], rates["open_clip CLIP, fp32"])
    live = rates["ours 3T live, autocast, trimmed"] / rates["3T of open_clip parts, live, amp_bf16"]
    print(f"3T stored against open_clip's faster CLIP step: {stored:.2f} (bar 1.6)")
    print(f"3T live against 3T of open_clip parts: {live:.2f} (bar 2.3)")


if __name__ == "__main__":
    main()

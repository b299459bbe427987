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
from threetowers.config import PairConfig, RunConfig
from threetowers.data.transforms import ImageSpec, normalise
from threetowers.model import build
from threetowers.run.setup import pick_device
from threetowers.towers.attention import trained_attention
from threetowers.towers.frozen.load import FrozenTower
from threetowers.towers.working_copy import WorkingCopy
from threetowers.train.optim import adamw

TABLES = {
    "rows": (
        "One training step of each contender: `samples per second`, their `ratio` to those of the reference, "
        "and `spread`, the slowest round divided by the fastest."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

MODEL, THIRD, TOKENS, CONTEXT = "ViT-S-32", "ViT-B-32", 24, 77
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
    names = {"img": width, "txt": width, "third@img": 512, "third@txt": 512} if third else {}
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


def our_step(
    config: RunConfig, batch: tuple[Tensor, Tensor], device: torch.device, *, live: bool, trimmed: bool = True
) -> Callable[[], None]:
    """A step as `train` makes it; the frozen tower computed in the step in bf16, or stored."""
    visual = open_clip.create_model(THIRD).visual
    tower = FrozenTower("third", "benchmark", visual, 512, SPEC, None, precision="bf16").to(device)
    thirds = {} if config.method == "baseline" else {"third": tower}
    model, _ = build(config, thirds, {"vocab_size": 49_408})
    model.to(device).train()
    optimizer = adamw(model, config.optim)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    working = WorkingCopy(model.img, model.txt) if config.precision == "bf16-copy" else None
    stored = torch.randn(len(batch[0]), 512, device=device)
    tokens = batch[1][:, :TOKENS] if trimmed else batch[1]

    @trained_attention(device, model.img, model.txt, bf16=config.precision != "fp32")
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16-autocast")
        features = {"third": tower(batch[0]) if live else stored} if thirds else {}
        feats = model.features(
            pixels=batch[0],
            tokens=tokens,
            thirds=features,
            autocast=None if working else autocast,
            working=working,
        )
        loss, _ = model.loss(feats)
        loss.backward()  # type: ignore[no-untyped-call]
        if working:
            working.hand_over()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        model.clamp_scale()
        if working:
            working.refresh()

    return step


def contenders(size: int, device: torch.device, amp: bool) -> dict[str, Callable[[], None]]:
    batch = random_batch(size, device)
    frozen = open_clip.create_model(THIRD, device=device).visual.eval().requires_grad_(False)
    base = RunConfig(method="3t", third=("timm:x",), pair=PAIR)
    auto, copy = replace(base, precision="bf16-autocast"), replace(base, precision="bf16-copy")

    def ours(config: RunConfig, **options: Any) -> Callable[[], None]:
        return our_step(config, batch, device, **options)

    steps = {"open_clip CLIP, amp_bf16": open_clip_step(batch, device, torch.bfloat16, None)}
    if amp:
        steps["open_clip CLIP, amp (its default)"] = open_clip_step(batch, device, torch.float16, None)
    return steps | {
        "open_clip CLIP, fp32": open_clip_step(batch, device, None, None),
        "3T of open_clip parts, live, amp_bf16": open_clip_step(batch, device, torch.bfloat16, frozen),
        "ours 3T live, autocast, 77 tokens": ours(auto, live=True, trimmed=False),
        "ours 3T live, bf16 copy, 77 tokens": ours(copy, live=True, trimmed=False),
        "ours 3T live, bf16 copy, trimmed": ours(copy, live=True),
        "ours 3T stored, bf16 copy, trimmed": ours(copy, live=False),
        "ours 3T stored, autocast, trimmed": ours(auto, live=False),
        "ours 3T stored, fp32, trimmed": ours(base, live=False),
        "ours CLIP, bf16 copy, trimmed": ours(replace(copy, method="baseline", third=()), live=False),
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
    stored = rates["ours 3T stored, bf16 copy, trimmed"] / max(rates[plain], rates["open_clip CLIP, fp32"])
    live = rates["ours 3T live, bf16 copy, trimmed"] / rates["3T of open_clip parts, live, amp_bf16"]
    print(f"3T stored against open_clip's faster CLIP step: {stored:.2f} (bar 1.6)")
    print(f"3T live against 3T of open_clip parts: {live:.2f} (bar 2.3)")


if __name__ == "__main__":
    main()

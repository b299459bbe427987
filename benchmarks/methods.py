"""Samples per second of each method, beside the same towers under open_clip's own loss in a plain loop.

    python benchmarks/methods.py [--batch-size 256] [--rounds 8] [--out runs/bench/methods.json]

Every round times one step of each contender, in turn, in this process, on the same batch shapes; the ratio is of the
fastest steps. All start from the same preset's towers, AdamW and fp32.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import open_clip
import timm
import torch
from torch import Tensor

from measure import interleaved, report
from step import as_batch
from threetowers.config import RunConfig
from threetowers.data.transforms import ImageSpec, normalise
from threetowers.model import build
from threetowers.objective.pairs import METHODS
from threetowers.recipes import PRESETS
from threetowers.towers.frozen.base import FrozenTower
from threetowers.towers.frozen.timm import TimmTrunk
from threetowers.towers.pair import build_image_tower, build_text_tower, model_config
from threetowers.train.step import TrainingStep

TABLES = {
    "rows": (
        "One training step of each contender: `samples per second`, their `ratio` to those of the reference, "
        "and `spread`, the slowest round divided by the fastest."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

WORDS = 16  # tokens of the longest caption in a batch of the built-in world
VOCABULARY = {"vocab_size": 512, "pool_type": "eos", "eos_id": 2}


def random_batch(size: int, image: int, context: int) -> tuple[Tensor, Tensor]:
    """uint8 pixels and token ids with the end token at or before WORDS."""
    pixels = torch.randint(0, 256, (size, 3, image, image), dtype=torch.uint8)
    tokens = torch.zeros(size, context, dtype=torch.long)
    for row in tokens:
        length = int(torch.randint(8, WORDS + 1, ()))
        row[:length] = torch.randint(3, 512, (length,))
        row[length - 1] = 2
    tokens[0, :WORDS] = torch.randint(3, 512, (WORDS,))
    tokens[0, WORDS - 1] = 2
    return pixels, tokens


def open_clip_step(config: RunConfig, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """open_clip's towers and ClipLoss in a plain loop: no trimming of text, its own loss."""
    model_cfg = model_config(config.pair)
    model_cfg["text_cfg"] |= VOCABULARY
    image, text = build_image_tower(model_cfg, 0), build_text_tower(model_cfg, 0)
    log_scale = torch.nn.Parameter(torch.tensor(config.objective.init_scale).log())
    parameters = [*image.parameters(), *text.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
    loss_fn = open_clip.ClipLoss()
    spec = ImageSpec(batch[0].shape[-1], config.pair.mean, config.pair.std)

    def step() -> None:
        f = torch.nn.functional.normalize(image(normalise(batch[0], spec)), dim=-1)
        g = torch.nn.functional.normalize(text(batch[1]), dim=-1)
        loss = loss_fn(f, g, log_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def our_step(config: RunConfig, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """A step as `train` takes it, the frozen features stored."""
    trunk = timm.create_model("test_convnext2", num_classes=0)
    size = batch[0].shape[-1]
    vision_cfg = {"timm_model_name": "test_convnext2", "timm_pool": "", "image_size": size}
    image = ImageSpec(size, config.pair.mean, config.pair.std)
    tower = FrozenTower("third", "benchmark", TimmTrunk(trunk), trunk.num_features, image, vision_cfg)
    model, _ = build(config, {"third": tower} if METHODS[config.method].needs_third else {}, VOCABULARY)
    stored = torch.randn(len(batch[0]), tower.width) if model.thirds else None
    inputs = as_batch(batch[0], batch[1][:, :WORDS], stored)
    take_step = TrainingStep(config, model, torch.device("cpu"), lambda batch: batch.third_features)
    return lambda: take_step(inputs, config.optim.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/methods.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    preset = PRESETS["shapes"]()
    batch = random_batch(
        arguments.batch_size, int(preset.pair.vision["image_size"]), int(preset.pair.text["context_length"])
    )
    peer, device = f"open_clip {open_clip.__version__}, plain loop", torch.device("cpu")
    contenders: dict[str, Callable[[], object]] = {peer: open_clip_step(preset, batch)}
    contenders |= {
        f"threetowers {m}": our_step(replace(preset, method=m, third=("timm:x",)), batch) for m in METHODS
    }
    times = interleaved(contenders, arguments.rounds, device)
    report(times, arguments.batch_size, peer, device, arguments.out, batch_size=arguments.batch_size)


if __name__ == "__main__":
    main()

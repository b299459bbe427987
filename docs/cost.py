"""What a run in several processes costs: operations, bytes between processes, memory and time of a step.

    python docs/cost.py vit-b-32 --third timm:NAME --processes 64 --batch-size 32768
    python docs/cost.py run.toml --processes 8 --peak 312e12 --link 12e9

The operations of the towers and what they keep for the backward pass are counted on torch's meta device, where nothing
is computed. What travels and what the loss computes is derived below from the views that the rows compare, and
tests/test_cost.py holds both against a real step. Times are computed from the assumptions in Hardware, and are no
measurements. `make docs` puts the table for three sizes into docs/scaling.md.

Legend: W processes, B samples of each, N = W · B samples of a step, D width of a compared view.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from threetowers.commands.arguments import TrainArguments, run_arguments
from threetowers.config import RunConfig
from threetowers.errors import ThreeTowersError, UsageError
from threetowers.model import ThreeTowers
from threetowers.objective.pairs import objective
from threetowers.objective.sharded import SHARES
from threetowers.objective.tiled import BUDGET
from threetowers.processes import BUCKET
from threetowers.progress import duration
from threetowers.towers.pair import (
    build_image_tower,
    build_text_tower,
    checkpoint_activations,
    image_spec,
    model_config,
)
from threetowers.train.room import amount

PASSES = 3
"""What a tower's forward and backward pass cost, in forward passes. torch's counter is not asked for the backward pass,
since it counts that of a convolution in groups as if it had none."""
HALF = 2
"""Bytes of a number of stored features."""
PAIRS = 1e9
"""Samples that a run of the table sees."""


@dataclass(frozen=True)
class Hardware:
    """What is assumed of each GPU and of its share of its machine."""

    peak: float = 989e12
    """Operations a second in bf16: an H100 SXM, by its data sheet."""
    used: float = 0.4
    """Share of the peak that towers and loss reach."""
    link: float = 50e9
    """Bytes a second that a GPU sends to other machines: a network card of 400 Gbit/s each."""
    near: float = 450e9
    """The same within a machine: NVLink of an H100, by its data sheet."""
    per_machine: int = 8
    """GPUs of a machine."""
    reached: float = 0.7
    """Share of `link` or `near` that collectives reach."""
    images: float = 2_400
    """Images a second that a GPU's share of the processor cores decodes, crops and resizes: that of docs/hours.py."""


@dataclass(frozen=True)
class RowCost:
    """A row of the objective.

    width: of its views. trains: which of its two views has a gradient. frozen, frozen_width: the third tower of one of
    its views and the width of its features, where these travel instead of a view.
    """

    kind: str
    width: int
    trains: tuple[bool, bool]
    frozen: str = ""
    frozen_width: int = 0

    @property
    def contrastive(self) -> bool:
        return self.kind in ("softmax", "sigmoid")


@dataclass(frozen=True)
class ModelCost:
    """What is counted of a model. Operations and bytes are those of one sample, in fp32.

    image, text: operations of the towers' forward passes. heads, third_heads: of the heads on the main towers and of
    those that several processes apply to the frozen features of all, forward and backward. saved: bytes kept for the
    backward pass. pixels: bytes of an image.
    """

    image: float
    text: float
    heads: float
    third_heads: float
    saved: float
    pixels: int
    parameters: int
    trained: int
    rows: tuple[RowCost, ...]


def counted(config: RunConfig, third_width: int = 768) -> ModelCost:
    """Counts the model of a configuration on the meta device, with stored features of frozen towers.

    third_width: P of every frozen tower, which is not loaded. A warm start counts as the image tower of the pair.
    Raises UsageError for a configuration that cannot be built.
    """
    table, described = objective(config), model_config(config.pair)
    if config.pair.tokenizer == "trained":
        described["text_cfg"] = {**described["text_cfg"], "vocab_size": config.pair.vocab_size}
    spec = image_spec(described, config.pair)
    thirds = dict.fromkeys(config.thirds(), third_width)
    if table.image == "third" and not config.objective.lit_projection:
        described["embed_dim"] = third_width
    with torch.device("meta"):
        image = None if table.image == "third" else build_image_tower(described, config.seed)
        text = build_text_tower(described, config.seed)
        model = ThreeTowers(
            table, image, text, described["embed_dim"], thirds, config.objective, spec, config.seed
        )
    if config.grad_checkpointing:
        checkpoint_activations(image, text)
    pixels = torch.empty(1, 3, spec.size, spec.size, dtype=torch.uint8, device="meta")
    context = int(model.txt.context_length)  # type: ignore[arg-type]
    tokens = torch.zeros(1, context, dtype=torch.long, device="meta")
    of_image, image_saved = _forward(model, pixels=pixels)
    of_text, text_saved = _forward(model, tokens=tokens)
    feats = model.features(pixels=pixels, tokens=tokens, thirds={
        name: torch.empty(1, width, device="meta") for name, width in thirds.items()
    })  # fmt: skip
    feats = {name: each.detach().requires_grad_(each.requires_grad) for name, each in feats.items()}
    rows, operations = [], {"main": 0.0, "third": 0.0}
    for index, row in enumerate(table.rows):
        sources = [model.source(view) for view in (row.a, row.b)]
        frozen = next((source for source in sources if source in thirds), "")
        if row.kind not in SHARES:
            frozen = ""
        for view, source in zip((row.a, row.b), sources, strict=True):
            with FlopCounterMode(display=False) as count:
                made = model.view(view, feats)
                if made.requires_grad:
                    made.sum().backward()  # type: ignore[no-untyped-call]
            operations["third" if source == frozen else "main"] += count.get_total_flops()
        both = model.compared(index, feats)
        trains = both.a.requires_grad, both.b.requires_grad
        rows.append(RowCost(row.kind, both.a.shape[1], trains, frozen, thirds.get(frozen, 0)))
    parameters = list(model.parameters())
    return ModelCost(
        of_image, of_text, operations["main"], operations["third"], image_saved + text_saved,
        pixels.numel() if image is not None else 0, _numel(parameters), model.num_trainable(), tuple(rows),
    )  # fmt: skip


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _forward(model: ThreeTowers, **inputs: Tensor) -> tuple[float, float]:
    """Operations of a sample's way through a tower, and the bytes that are kept for the way back."""
    kept: dict[int, Tensor] = {}
    own = {_storage(parameter) for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as count, hooks:
        model.features(**inputs)  # type: ignore[arg-type]
    return count.get_total_flops(), sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class Collective:
    """A collective of a step, and the bytes that a process gives to it."""

    name: str
    given: int

    def sent(self, processes: int) -> float:
        """Bytes that a process sends by a ring."""
        others = processes - 1
        if self.name == "all_gather":
            return float(others * self.given)
        return (2.0 if self.name == "all_reduce" else 1.0) * others / processes * self.given


def collectives(config: RunConfig, model: ModelCost, processes: int, *, bf16: bool) -> list[Collective]:
    """What a step sends, in its order; see objective/sharded.py. bf16: whether views travel in it, as on CUDA."""
    if processes == 1:
        return []
    num, own = config.batch_size, config.batch_size // processes
    contrastive = [row for row in model.rows if row.contrastive]
    ids = 2 * 8 if config.inputs.mask_duplicates and contrastive else 0
    features = sum({row.frozen: row.frozen_width for row in contrastive}.values())
    pairs = [row for row in contrastive if not row.frozen]
    gathered = ids + HALF * features + sum(row.width for row in pairs) * (2 if bf16 else 4)
    sums = sum(3 * num if row.kind == "softmax" else 1 for row in model.rows)
    back = sum(row.width for row in pairs if all(row.trains))
    found = [Collective("all_gather", own * gathered), Collective("all_reduce", 8 * sums)]
    found.append(Collective("reduce_scatter", 4 * num * back))
    found.append(Collective("all_reduce", 4 * model.trained))
    return [each for each in found if each.given]


def loss_operations(config: RunConfig, model: ModelCost, processes: int, *, bf16: bool) -> float:
    """Operations of a process in the products of all rows: one for the logits, one for each gradient.

    The softmax makes those tiles a second time that did not stay in memory.
    """
    num, own = config.batch_size, config.batch_size // processes
    total = 0.0
    for row in model.rows:
        if not row.contrastive:
            continue
        budget = BUDGET // len(model.rows) if processes > 1 else BUDGET
        kept = min(1.0, budget / (own * num * (2 if bf16 else 4)))
        again = 1.0 - kept if row.kind == "softmax" else 0.0
        total += 2.0 * own * num * row.width * (1 + sum(row.trains) + again)
    return total


def memory(config: RunConfig, model: ModelCost, processes: int, *, bf16: bool) -> dict[str, float]:
    """Bytes of a process at the peak of a step, by what they are for."""
    num, own = config.batch_size, config.batch_size // processes
    at_once = min(config.micro_batch_size or own, own)
    views = sum(row.width * (16.0 if row.frozen else 12.0) + 4.0 * row.frozen_width for row in model.rows)
    kept = [
        min(BUDGET / len(model.rows), own * num * (2.0 if bf16 else 4.0))
        for row in model.rows
        if row.contrastive
    ]
    bucket = min(4 * model.trained, 4 * BUCKET) if processes > 1 else 0
    return {
        "weights": 4.0 * model.parameters,
        "gradients": 4.0 * model.trained,
        "moments": 8.0 * model.trained,
        "activations": at_once * (model.saved * (0.5 if config.precision != "fp32" else 1.0) + model.pixels),
        # views gathered as bytes and as tensors, or features, what heads make of them, and unit vectors; their
        # gradients; sums in fp64
        "loss": num * views + num * len(model.rows) * 80.0 + sum(kept),
        "buffers": float(bucket),
    }


@dataclass(frozen=True)
class Cost:
    """A step of one process. sent: bytes; seconds: by what takes them, under the assumptions of Hardware."""

    operations: float
    loss: float
    sent: float
    memory: float
    seconds: dict[str, float]

    @property
    def step(self) -> float:
        """Seconds of a step: images are read while the GPU works, and what the GPU does comes one after the other."""
        return max(self.seconds["data"], sum(self.seconds.values()) - self.seconds["data"])

    @property
    def bottleneck(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])


def cost(config: RunConfig, model: ModelCost, processes: int, hardware: Hardware) -> Cost:
    """The cost of a configuration with so many processes, one a GPU. Raises UsageError for unequal shares."""
    if processes < 1 or config.batch_size % processes:
        raise UsageError(
            f"batch_size: {config.batch_size} samples cannot be shared by {processes} processes equally"
        )
    own = config.batch_size // processes
    bf16 = config.precision != "fp32"
    passes = PASSES + (0 < config.micro_batch_size < own) + config.grad_checkpointing
    loss = loss_operations(config, model, processes, bf16=bf16)
    loss += own * model.heads + config.batch_size * model.third_heads
    image, text = own * passes * model.image, own * passes * model.text
    sent = sum(each.sent(processes) for each in collectives(config, model, processes, bf16=bf16))
    speed = hardware.peak * hardware.used
    link = (hardware.near if processes <= hardware.per_machine else hardware.link) * hardware.reached
    seconds = {
        "image tower": image / speed,
        "text tower": text / speed,
        "loss": loss / speed,
        "collectives": sent / link,
        "data": own / hardware.images if model.pixels else 0.0,
    }
    used = sum(memory(config, model, processes, bf16=bf16).values())
    return Cost(image + text + loss, loss, sent, used, seconds)


def lines(config: RunConfig, model: ModelCost, processes: int, hardware: Hardware) -> list[str]:
    """The cost of a configuration in words."""
    found = cost(config, model, processes, hardware)
    bf16 = config.precision != "fp32"
    own = config.batch_size // processes
    parts = memory(config, model, processes, bf16=bf16)
    sent = [
        f"{each.name} {amount(each.sent(processes))}"
        for each in collectives(config, model, processes, bf16=bf16)
    ]
    per_pair = (
        max(row.width for row in model.rows) * 2.0 * 4 * len([row for row in model.rows if row.contrastive])
    )
    towers, share = PASSES * (model.image + model.text), model.text / (model.image + model.text)
    return [
        f"{config.method}, {processes:,} processes × {own:,} samples = batches of {config.batch_size:,}; "
        f"{model.parameters / 1e6:.1f} M parameters, of which {model.trained / 1e6:.1f} M train",
        f"operations of a process in a step: {found.operations / 1e12:.3g} T, of which {found.loss / 1e12:.3g} T in "
        f"heads and loss; a sample takes {towers / 1e9:.3g} G in the towers, {share:.0%} for the text",
        f"sent by a process in a step: {amount(found.sent)}" + (f" ({', '.join(sent)})" if sent else ""),
        f"memory of a process: {amount(found.memory)} ("
        + ", ".join(f"{name} {amount(size)}" for name, size in parts.items())
        + ")",
        "assumed: "
        + ", ".join(
            f"{field.name} {getattr(hardware, field.name):g}" for field in dataclasses.fields(hardware)
        ),
        "a step would take: "
        + ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in found.seconds.items())
        + f"; together {1e3 * found.step:.3g} ms, as data is read meanwhile. Most of it: {found.bottleneck}",
        f"a billion pairs would take {duration(PAIRS / config.batch_size * found.step)}",
        f"the loss takes as many operations as the towers at batches of about {towers / per_pair:,.0f}"
        if per_pair
        else "no row needs the samples of other processes",
    ]


SIZES = ((8, 4_096), (64, 32_768), (1_024, 65_536), (1_024, 524_288))
"""Processes and batches of the table."""


def rows(config: RunConfig, methods: Sequence[str] = ("baseline", "lit", "3t")) -> list[tuple[str, ...]]:
    """The table of docs/scaling.md: methods by sizes, with the assumptions of Hardware."""
    found: list[tuple[str, ...]] = []
    for method in methods:
        third = () if method == "baseline" else ("timm:NAME",)
        each = replace(config, method=method, third=third)  # type: ignore[arg-type]
        model = counted(each)
        for processes, batch in SIZES:
            sized = replace(each, batch_size=batch)
            step = cost(sized, model, processes, Hardware())
            found.append((
                method, f"{processes:,}", f"{batch:,}", f"{step.operations / 1e12:.1f}",
                f"{step.loss / step.operations:.1%}",
                f"{step.sent / 1e6:,.0f}", f"{step.memory / 1e9:.1f}", f"{1e3 * step.step:.0f}", step.bottleneck,
                f"{PAIRS / batch * step.step / 3600:.2f}",
            ))  # fmt: skip
    return found


def main(words: Sequence[str]) -> int:
    """Prints the cost of the configuration that the words of a training command describe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="All other words are those of `threetowers train`.",
    )  # fmt: skip
    parser.add_argument("--third-width", type=int, default=768, help="width of the frozen towers' features")
    for field in dataclasses.fields(Hardware):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default,
            help="assumption; see Hardware",
        )  # fmt: skip
    options, rest = parser.parse_known_args(words)
    given: dict[str, Any] = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(Hardware)
    }
    try:
        _, arguments = run_arguments(TrainArguments, rest, "train")
        model = counted(arguments.run, options.third_width)
        text = lines(arguments.run, model, arguments.processes, Hardware(**given))
    except ThreeTowersError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

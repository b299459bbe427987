"""Losses over several processes: whether their gradients are those of one process, and what travels between them.

    python benchmarks/processes.py [--processes 2 4] [--size 64] [--width 256] [--out FILE]

Two linear maps stand for the towers, and each process has --size samples, whose texts lie in few groups. The third
tower's features, --width of them in half precision as they are stored, and the heads are those of 3T. `ours` is
objective/sharded.py. `ClipLoss` is open_clip's loss with its flags local_loss (L) and gather_with_grad (G), once for
the pair (CLIP) and three times for 3T, on the views of the process's own samples. The gradients of ours are added over
the processes, as our training does, and those of ClipLoss averaged, as DDP does in open_clip's. They are compared with
those of the plain loss of all samples in one process in fp64. Collectives are counted as they are called where NCCL is
the backend, and their bytes as what one process must send by a ring: (W − 1)/W of the whole for an all_gather or a
reduce_scatter, twice that for an all_reduce. The processes are of one machine, over gloo; nothing is timed.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from measure import write
from threetowers.compare.machine import machine
from threetowers.objective import sharded
from threetowers.objective.kinds import Compared
from threetowers.processes import Processes

TABLES = {
    "rows": (
        "`cosine` and `length` of the gradient of towers and heads, and the gradient of the `scale`, all against those "
        "of one process, so that 1 is right. `collectives` of a step, and the `kB` that a process sends in them. Both "
        "leave out the reduction of the parameters' gradients, which every contender needs."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""
FLAGS = {"default": (False, False), "L": (True, False), "G": (False, True), "L and G": (True, True)}
INPUTS, GROUPS = 48, 8


class Traffic(TorchDispatchMode):
    """The collectives of a block, and the bytes that this process sends in them by a ring."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.calls, self.bytes = size, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls += 1
            tensors = [[leaf for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)] for arg in args]
            whole = max(sum(leaf.numel() * leaf.element_size() for leaf in leaves) for leaves in tensors)
            twice = 2 if "allreduce" in func.__name__ else 1
            self.bytes += twice * whole * (self.size - 1) / self.size
        return func(*args, **(kwargs or {}))


def start(method: str, width: int) -> tuple[dict[str, Tensor], Tensor]:
    """The linear maps by the views that they make, of width × width for 3T's heads, and the scale."""
    generator = torch.Generator().manual_seed(1)
    sizes = dict.fromkeys(("img", "txt"), INPUTS)
    if method == "3T":
        sizes |= dict.fromkeys(("img@third", "txt@third", "third@img", "third@txt"), width)
    maps = {view: torch.randn(size, width, generator=generator) / size**0.5 for view, size in sizes.items()}
    return maps, torch.tensor(14.3)


def samples(num: int, width: int) -> dict[str, Tensor]:
    """Inputs by tower: the texts [N, INPUTS] lie in GROUPS groups, the images near their texts, third [N, width]."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(GROUPS, INPUTS, generator=generator)
    text = groups[torch.arange(num) % GROUPS] + 0.3 * torch.randn(num, INPUTS, generator=generator)
    image = text + torch.randn(num, INPUTS, generator=generator)
    third = image @ torch.randn(INPUTS, width, generator=generator) / INPUTS**0.5
    return {"img": image, "txt": text, "third": third.half()}


@dataclass(frozen=True)
class Step:
    """What a process has of a step: the maps and the scale as leaves, and its samples' inputs."""

    maps: dict[str, Tensor]
    scale: Tensor
    inputs: dict[str, Tensor]
    rank: int
    size: int

    def view(self, name: str, third: Tensor | None = None) -> Tensor:
        """Unit vectors of a view; third: of these features instead of the process's own."""
        tower = name.partition("@")[0]
        values = self.inputs[tower] if third is None else third
        for each in dict.fromkeys((tower, name)):
            if each in self.maps:
                values = values.to(self.maps[each].dtype) @ self.maps[each]
        return torch.nn.functional.normalize(values, dim=1)

    def pairs(self) -> list[tuple[str, str]]:
        third = [("img@third", "third@img"), ("txt@third", "third@txt")]
        return [("img", "txt"), *(third if "third@img" in self.maps else [])]


def ours(step: Step) -> Tensor:
    rows, views = [], {}
    for i, (main, other) in enumerate(step.pairs()):
        second = step.inputs["third"] if other.startswith("third") else step.view(other)
        if other.startswith("third"):
            views[i] = partial(step.view, other)
        rows.append(("softmax", Compared(step.view(main), second, step.scale)))
    return sharded.loss(rows, [1 / len(rows)] * len(rows), Processes(step.rank, step.size), views)[0]  # type: ignore[arg-type]


def clip_loss(flags: tuple[bool, bool]) -> Callable[[Step], Tensor]:
    def loss(step: Step) -> Tensor:
        each, pairs = open_clip.ClipLoss(*flags, rank=step.rank, world_size=step.size), step.pairs()
        return sum(each(step.view(a), step.view(b), step.scale) for a, b in pairs) / len(pairs)  # type: ignore[no-any-return]

    return loss


def gradients(
    loss: Callable[[Step], Tensor], share: float, method: str, options: tuple[int, int, int, int]
) -> dict[str, Any]:
    """What came of a step in this process; share: by which the sum of the processes' gradients is multiplied."""
    rank, size, num, width = options
    maps, scale = start(method, width)
    own = slice(rank * num, (rank + 1) * num)
    inputs = {tower: values[own] for tower, values in samples(size * num, width).items()}
    leaves = [each.requires_grad_() for each in (*maps.values(), scale)]
    # with another backend open_clip's way back is made of many calls
    nccl = mock.patch.object(dist, "get_backend", lambda group=None: dist.Backend.NCCL)
    with Traffic(size) as traffic, nccl, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss(Step(maps, scale, inputs, rank, size)).backward()  # type: ignore[no-untyped-call]
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    for gradient in found:
        dist.all_reduce(gradient.mul_(share))
    exact = in_one_process(method, size * num, width)
    towers, wanted = (torch.cat([each.flatten().double() for each in some[:-1]]) for some in (found, exact))
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(towers, wanted, dim=0)),
        "length": float(towers.norm() / wanted.norm()),
        "scale": float(found[-1]) / float(exact[-1]),
        "collectives": traffic.calls,
        "kB": traffic.bytes / 1e3,
    }


def in_one_process(method: str, num: int, width: int) -> list[Tensor]:
    maps, scale = start(method, width)
    maps = {view: each.double().requires_grad_() for view, each in maps.items()}
    scale = scale.double().requires_grad_()
    step = Step(maps, scale, samples(num, width), 0, 1)
    total, pairs = torch.zeros((), dtype=torch.float64), step.pairs()
    for a, b in pairs:
        logits, own = scale * step.view(a) @ step.view(b).T, torch.arange(num)
        both = [torch.nn.functional.cross_entropy(each, own) for each in (logits, logits.T)]
        total = total + 0.5 * (both[0] + both[1]) / len(pairs)
    return list(torch.autograd.grad(total, [*maps.values(), scale]))


def serve(rank: int, size: int, num: int, width: int, meeting: str, results: Any) -> None:
    """The body of one process: every contender in turn."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(minutes=5)
    )
    contenders = {"ours": (ours, 1.0)} | {
        f"ClipLoss, {name}": (clip_loss(flags), 1 / size) for name, flags in FLAGS.items()
    }
    for method in ("CLIP", "3T"):
        for name, (loss, share) in contenders.items():
            found = gradients(loss, share, method, (rank, size, num, width))
            if rank == 0:
                results.put({"loss": name, "method": method, "processes": size, **found})
    dist.destroy_process_group()


def measure(size: int, num: int, width: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(
                target=serve, args=(rank, size, num, width, f"{folder}/group", results), daemon=True
            )
            for rank in range(size)
        ]
        for process in started:
            process.start()
        rows = [results.get(timeout=600) for _ in range(2 * (1 + len(FLAGS)))]
        for process in started:
            process.join()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/processes.json"))
    options = parser.parse_args()
    rows = []
    for size in options.processes:
        for row in measure(size, options.size, options.width):
            print(
                "  ".join(
                    f"{value:.4f}" if isinstance(value, float) else f"{value}" for value in row.values()
                )
            )
            rows.append(row)
    write(
        options.out,
        {"machine": machine("cpu"), "samples_of_each": options.size, "width": options.width, "rows": rows},
    )


if __name__ == "__main__":
    main()

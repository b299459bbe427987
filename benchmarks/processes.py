"""Losses over several processes: whether their gradients are those of one process, and what travels between them.

    python benchmarks/processes.py [--processes 2 4] [--size 64] [--width 256] [--out FILE]

Two linear maps stand for the towers, and each process has --size samples, whose texts lie in few groups. `ours` is
objective/sharded.py. `ClipLoss` is open_clip's loss with its flags local_loss (L) and gather_with_grad (G), once for
the pair (CLIP) and three times for 3T. The gradients of ours are added over the processes, as our training does, and
those of ClipLoss averaged, as DDP does in open_clip's. They are compared with those of the plain loss of all samples in
one process in fp64. Collectives are counted as they are called where NCCL is the backend, and their bytes as what one
process must send by a ring: (W − 1)/W of the whole for an all_gather or a reduce_scatter, twice that for an all_reduce.
The processes are of one machine, over gloo; nothing is timed.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
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
        "`cosine` and `length` of the towers' gradient, and the gradient of the `scale`, all against those of one "
        "process, so that 1 is right. `collectives` of a step, and the `kB` that a process sends in them, without the "
        "reduction of the parameters' gradients that both need."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""
FLAGS = {"default": (False, False), "L": (True, False), "G": (False, True), "L and G": (True, True)}
INPUTS, GROUPS = 48, 8
Pairs = list[tuple[Tensor, Tensor]]


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


def start(rows: int, width: int) -> tuple[list[Tensor], Tensor]:
    """The linear maps of two towers and of each further row's views, and the scale."""
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(INPUTS, width, generator=generator) / INPUTS**0.5 for _ in range(2 * rows)]
    return maps, torch.tensor(14.3)


def samples(num: int) -> tuple[Tensor, Tensor]:
    """Inputs of the two sides [N, INPUTS]: the texts lie in GROUPS groups, and the images near their texts."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(GROUPS, INPUTS, generator=generator)
    text = groups[torch.arange(num) % GROUPS] + 0.3 * torch.randn(num, INPUTS, generator=generator)
    return text + torch.randn(num, INPUTS, generator=generator), text


def views(maps: list[Tensor], own: slice, num: int) -> Pairs:
    """The pairs of unit vectors that the rows compare."""
    sides = [side[own].to(maps[0].dtype) for side in samples(num)]
    return [
        tuple(torch.nn.functional.normalize(sides[k] @ maps[i + k], dim=1) for k in (0, 1))  # type: ignore[misc]
        for i in range(0, len(maps), 2)
    ]


def ours(pairs: Pairs, scale: Tensor, rank: int, size: int) -> Tensor:
    rows = [("softmax", Compared(a, b, scale)) for a, b in pairs]
    return sharded.loss(rows, [1 / len(rows)] * len(rows), Processes(rank, size))[0]  # type: ignore[arg-type]


def clip_loss(flags: tuple[bool, bool]) -> Callable[[Pairs, Tensor, int, int], Tensor]:
    def loss(pairs: Pairs, scale: Tensor, rank: int, size: int) -> Tensor:
        each = open_clip.ClipLoss(*flags, rank=rank, world_size=size)
        return sum(each(a, b, scale) for a, b in pairs) / len(pairs)  # type: ignore[no-any-return]

    return loss


def gradients(
    loss: Callable[[Pairs, Tensor, int, int], Tensor],
    share: float,
    rows: int,
    options: tuple[int, int, int, int],
) -> dict[str, Any]:
    """What came of a step in this process; share: by which the sum of the processes' gradients is multiplied."""
    rank, size, num, width = options
    maps, scale = start(rows, width)
    leaves = [each.requires_grad_() for each in (*maps, scale)]
    pairs = views(leaves[:-1], slice(rank * num, (rank + 1) * num), size * num)
    # with another backend open_clip's way back is made of many calls
    nccl = mock.patch.object(dist, "get_backend", lambda group=None: dist.Backend.NCCL)
    with Traffic(size) as traffic, nccl, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss(pairs, leaves[-1], rank, size).backward()  # type: ignore[no-untyped-call]
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    for gradient in found:
        dist.all_reduce(gradient.mul_(share))
    exact = in_one_process(rows, size * num, width)
    towers, wanted = (torch.cat([each.flatten().double() for each in some[:-1]]) for some in (found, exact))
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(towers, wanted, dim=0)),
        "length": float(towers.norm() / wanted.norm()),
        "scale": float(found[-1]) / float(exact[-1]),
        "collectives": traffic.calls,
        "kB": traffic.bytes / 1e3,
    }


def in_one_process(rows: int, num: int, width: int) -> list[Tensor]:
    maps, scale = start(rows, width)
    leaves = [each.double().requires_grad_() for each in (*maps, scale)]
    total = torch.zeros((), dtype=torch.float64)
    for a, b in views(leaves[:-1], slice(None), num):
        logits, own = leaves[-1] * a @ b.T, torch.arange(num)
        both = [torch.nn.functional.cross_entropy(each, own) for each in (logits, logits.T)]
        total = total + 0.5 * (both[0] + both[1]) / rows
    return list(torch.autograd.grad(total, leaves))


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
    for method, rows in (("CLIP", 1), ("3T", 3)):
        for name, (loss, share) in contenders.items():
            found = gradients(loss, share, rows, (rank, size, num, width))
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

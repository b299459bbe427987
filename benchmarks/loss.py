"""Three contrastive rows, forward and backward: ours tiled against open_clip's ClipLoss three times.

    python benchmarks/loss.py [--device cpu] [--num 4096] [--dim 512] [--rounds 7] [--out loss.json]

Speed in interleaved rounds of one process (fastest round each), peak memory each in a fresh process, gradient error
norm-wise against fp64 over scale × loss level × size. One table each, everything as JSON with --out.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from measure import best, interleaved, write
from threetowers.compare.machine import machine
from threetowers.objective import losses, tiled

TABLES = {
    "speed": (
        "Forward and backward passes of three rows over `num` samples of width `dim`: the `seconds` of the "
        "fastest round, `spread`, the slowest round divided by the fastest, and `ratio`, how many times as "
        "fast ours is."
    ),
    "memory": "MiB that a step over `num` samples needs beyond its inputs, by loss; an empty cell was not measured.",
    "errors": (
        "Relative errors of the gradients against fp64 at each number of samples (`num`), `scale` and value "
        "of the `loss`, for both losses, and the errors of the gradient of the scale."
    ),
    "worst_errors": (
        "The largest relative error of the gradients against fp64 over all sizes, scales and noise levels, "
        "`where` it was found, and the largest error of the gradient of the scale."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

ROWS = 3
Step = Callable[[list[Tensor], Tensor], Tensor]


def ours(views: list[Tensor], scale: Tensor, bf16: bool = False) -> Tensor:
    """Mean of three tiled rows."""
    pairs = zip(views[::2], views[1::2], strict=True)
    return torch.stack([tiled.softmax_loss(a, b, scale, bf16=bf16) for a, b in pairs]).mean()


def clip_loss(views: list[Tensor], scale: Tensor, bf16: bool = False) -> Tensor:
    """Mean of three calls of open_clip's ClipLoss, in the precision of the autocast that its trainer uses."""
    loss = open_clip.ClipLoss(cache_labels=True)
    with torch.autocast(views[0].device.type, torch.bfloat16, enabled=bf16):
        pairs = zip(views[::2], views[1::2], strict=True)
        return torch.stack([loss(a, b, scale) for a, b in pairs]).mean()


def problem(num: int, dim: int, device: str, noise: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Three pairs of unit vectors, the second of each a noisy copy of the first."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for _ in range(ROWS):
        a = torch.randn(num, dim, generator=generator)
        b = a + noise * torch.randn(num, dim, generator=generator)
        views += [losses.unit(a).to(device), losses.unit(b).to(device)]
    return views


def run_step(step: Step, views: list[Tensor], scale: float) -> tuple[float, list[Tensor]]:
    leaves = [view.detach().requires_grad_() for view in views]
    factor = torch.tensor(scale, device=views[0].device, requires_grad=True)
    loss = step(leaves, factor)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), [leaf.grad for leaf in (*leaves, factor)]  # type: ignore[misc]


def _named(bf16: bool) -> str:
    return "bf16" if bf16 else "fp32"


def speed(num: int, dim: int, device: str, rounds: int, bf16: bool) -> dict[str, Any]:
    views = problem(num, dim, device)
    times = interleaved(
        {
            "ours": lambda: run_step(lambda v, s: ours(v, s, bf16), views, 50.0),
            "ClipLoss × 3": lambda: run_step(lambda v, s: clip_loss(v, s, bf16), views, 50.0),
        },
        rounds,
        torch.device(device),
    )
    fastest = {name: best(values, torch.device(device)) for name, values in times.items()}
    return {
        "num": num,
        "dim": dim,
        "precision": _named(bf16),
        "seconds": fastest,
        "spread": {name: max(values) / min(values) for name, values in times.items()},
        "ratio": fastest["ClipLoss × 3"] / fastest["ours"],
    }


def errors(sizes: Sequence[int], bf16: bool, device: str) -> list[dict[str, Any]]:
    """Norm-wise relative gradient errors of both losses against fp64, for every size, scale and noise."""
    rows = []
    autocast = torch.autocast(device, torch.bfloat16, enabled=bf16)
    clip = autocast(open_clip.ClipLoss())
    tiles = partial(tiled.softmax_loss, bf16=bf16)
    for num in sizes:
        for scale in (1.0, 10.0, 30.0, 100.0):
            for noise in (0.02, 0.1, 0.3, 1.0, 3.0, 30.0):
                a, b = problem(num, 64, device, noise)[:2]
                truth = _truth(a, b, scale)
                if truth[0] < 1e-4:
                    continue
                row: dict[str, Any] = {
                    "precision": _named(bf16),
                    "num": num,
                    "scale": scale,
                    "loss": truth[0],
                }
                for name, step in (("ours", tiles), ("ClipLoss", clip)):
                    _, found = run_step(lambda v, s, step=step: step(v[0], v[1], s), [a, b], scale)  # type: ignore[misc]
                    sides = [
                        float((x.double() - y).norm() / y.norm())
                        for x, y in zip(found[:2], truth[1][:2], strict=True)
                    ]
                    row[name] = max(sides)
                    # relative to the terms it is the difference of, which are of size 1
                    row[f"{name} scale"] = abs(float(found[2]) - float(truth[1][2]))
                rows.append(row)
    return rows


def _truth(a: Tensor, b: Tensor, scale: float) -> tuple[float, list[Tensor]]:
    x, y = a.double().requires_grad_(), b.double().requires_grad_()
    s = torch.tensor(scale, dtype=torch.float64, device=a.device, requires_grad=True)
    logits = s * x @ y.T
    positive = logits.diagonal()
    loss = 0.5 * ((logits.logsumexp(1) - positive).mean() + (logits.logsumexp(0) - positive).mean())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), [x.grad, y.grad, s.grad]  # type: ignore[list-item]


def peak_memory(which: str, num: int, dim: int, device: str) -> float:
    """MiB that a step needs beyond its inputs, in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        which,
        "--num",
        str(num),
        "--dim",
        str(dim),
        "--device",
        device,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else math.nan


def _memory_of(which: str, num: int, dim: int, device: str) -> float:
    step = {"ours": ours, "ClipLoss": clip_loss}[which]
    run_step(step, problem(256, dim, device), 50.0)  # what libraries take once
    views = problem(num, dim, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
        run_step(step, views, 50.0)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    run_step(step, views, 50.0)
    return (_status("VmHWM") - before) / 2**10


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=int, nargs="*", default=[8192, 16384, 32768, 65536])
    parser.add_argument(
        "--errors-at", type=int, nargs="+", default=[64, 251, 512, 1021], help="numbers of samples"
    )
    parser.add_argument("--memory-of", choices=("ours", "ClipLoss"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(_memory_of(arguments.memory_of, arguments.num, arguments.dim, arguments.device))
        return
    result: dict[str, Any] = {"machine": machine(arguments.device), "speed": [], "memory": []}
    # the tiled loss multiplies in bf16 on CUDA alone, where torch has a product with an fp32 result
    precisions = (False, True) if arguments.device.startswith("cuda") else (False,)
    for bf16 in precisions:
        row = speed(arguments.num, arguments.dim, arguments.device, arguments.rounds, bf16)
        result["speed"].append(row)
        times = ", ".join(f"{name} {value:.3f} s" for name, value in row["seconds"].items())
        print(
            f"{row['precision']}, N = {row['num']}, d = {row['dim']}: {times}, ratio {row['ratio']:.2f}",
            flush=True,
        )
    result["errors"], result["worst_errors"] = [], []
    for bf16 in precisions:
        result["errors"] += (rows := errors(arguments.errors_at, bf16, arguments.device))
        print(f"gradient errors, {_named(bf16)}, {len(rows)} points")
        for name in ("ours", "ClipLoss"):
            worst = max(rows, key=lambda row: row[name])
            where = f"N {worst['num']}, scale {worst['scale']:g}, loss {worst['loss']:.1e}"
            of_scale = max(row[f"{name} scale"] for row in rows)
            print(f"  worst of {name}: {worst[name]:.1e} ({where}), of the scale {of_scale:.1e}")
            result["worst_errors"].append(
                {"precision": _named(bf16), "loss": name, "worst_gradient_error": worst[name], "where": where,
                 "worst_error_of_scale": of_scale}
            )  # fmt: skip
        above = max(row["ours"] / max(row["ClipLoss"], 1e-9) for row in rows)
        print(f"  ours / ClipLoss, worst point: {above:.2f}", flush=True)
    for num in arguments.memory:
        peers = ("ours", "ClipLoss") if num <= 8192 or arguments.device == "cuda" else ("ours",)
        row = {
            "num": num,
            **{which: peak_memory(which, num, arguments.dim, arguments.device) for which in peers},
        }
        result["memory"].append(row)
        print(
            f"extra memory, N = {num}: " + ", ".join(f"{name} {row[name]:.0f} MiB" for name in peers),
            flush=True,
        )
    if arguments.out:
        write(arguments.out, result)


if __name__ == "__main__":
    main()

"""Attention in bf16 forward and backward on this device: torch's fused kernels beside plain products and a softmax.

    python benchmarks/attention.py [--device cpu] [--rounds 8] [--shapes 6] [--out runs/bench/attention.json]

Milliseconds at the lengths of usual towers, and the worst norm-wise error of output and gradients against fp64.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from measure import best, interleaved, write
from threetowers.compare.machine import machine
from threetowers.run.setup import pick_device
from threetowers.towers.attention import LONGEST, OWN_CHOICE

TABLES = {
    "rows": (
        "One forward and backward pass for each `batch`, number of `heads` and number of `tokens`: "
        "milliseconds of the fused kernels and of plain products, and for both the larger of the errors of "
        "output and gradients against fp64."
    ),
}
"""The sentence that docs/benchmarks.md puts before each table."""

WIDTH = 64  # of a head
KERNELS = {"fused": OWN_CHOICE, "plain": [SDPBackend.MATH]}
# batch, heads, tokens, causal: texts of 24 and 77 tokens, ViT-S/32, a grid at the limit, ViT-B/16, ViT-L/14
SHAPES = (
    (64, 6, 24, True),
    (64, 6, 77, True),
    (64, 6, 50, False),
    (32, 6, 128, False),
    (32, 12, 197, False),
    (8, 16, 257, False),
)


def attention(inputs: tuple[Tensor, ...], kernels: list[SDPBackend], causal: bool) -> list[Tensor]:
    """The output for q, k and v, and the gradients of these three for the gradient of the output given last."""
    *views, gradient = inputs
    leaves = [view.detach().requires_grad_() for view in views]
    length = gradient.shape[-2]
    mask = gradient.new_full((length, length), float("-inf")).triu(1) if causal else None
    with sdpa_kernel(kernels):
        output = scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], attn_mask=mask)
    output.backward(gradient)  # type: ignore[no-untyped-call]
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--shapes", type=int, default=len(SHAPES), help="how many of the shapes, from the first"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/attention.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device, rows = pick_device(arguments.device), []
    print(
        f"{'tokens':>6} {'fused ms':>9} {'plain ms':>9} {'ratio':>6} {'fused error':>12} {'plain error':>12}"
    )
    for batch, heads, length, causal in SHAPES[: arguments.shapes]:
        # as towers make them: heads side by side in memory
        inputs = tuple(
            torch.randn(batch, length, heads, WIDTH, device=device).bfloat16().transpose(1, 2)
            for _ in range(4)
        )
        exact = attention(tuple(x.double() for x in inputs), KERNELS["plain"], causal)
        steps: dict[str, Callable[[], object]] = {
            name: partial(attention, inputs, kernels, causal) for name, kernels in KERNELS.items()
        }
        times = interleaved(steps, arguments.rounds, device)
        fused, plain = (best(times[name], device) * 1e3 for name in KERNELS)
        errors = [error(attention(inputs, kernels, causal), exact) for kernels in KERNELS.values()]
        rows.append(
            {
                "batch": batch,
                "heads": heads,
                "tokens": length,
                "fused_ms": fused,
                "plain_ms": plain,
                "fused_error": errors[0],
                "plain_error": errors[1],
            }
        )
        print(
            f"{length:>6} {fused:>9.1f} {plain:>9.1f} {fused / plain:>6.2f} {errors[0]:>12.1e} {errors[1]:>12.1e}",
            flush=True,
        )
    print(f"training on CPUs takes the plain one up to {LONGEST} tokens")
    write(arguments.out, {"machine": machine(device.type), "rows": rows})


if __name__ == "__main__":
    main()

"""Starts torchrun on several machines of a Ray cluster, for one run.

    python train_on_ray.py --machines 4 --gpus 8 vit-b-32 --data /data/shards --third timm:NAME --out /data/runs/mine

The words after the options are those of `threetowers train`. Ray chooses the machines and holds their GPUs. The
processes are torchrun's, and the run is the same as without Ray. Data and run folder are in a file system that all
machines see.
"""

import argparse
import subprocess
import sys
import uuid
from collections.abc import Sequence

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

PORT = 29500


def command(
    options: argparse.Namespace, name: str, host: str, number: int, words: Sequence[str]
) -> list[str]:
    """torchrun on the machine with this number, of which number 0, at `host`, is where the others meet."""
    return [
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes", str(options.machines), "--nproc-per-node", str(options.gpus),
        "--rdzv-id", name, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{PORT}",
        "--rdzv-conf", f"is_host={int(number == 0)}", "-m", "threetowers", "train", *words,
    ]  # fmt: skip


def address() -> str:
    """The address of the machine on which this is called."""
    return str(ray.util.get_node_ip_address())


def run(words: list[str]) -> int:
    """Runs a command and returns its exit code."""
    return subprocess.run(words, check=False).returncode


def main() -> int:
    """Returns the highest exit code of the machines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--machines", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="of each machine")
    parser.add_argument("--cpus", type=int, default=1, help="of each machine that Ray holds for the run")
    options, words = parser.parse_known_args()
    ray.init()
    machine = {"GPU": options.gpus, "CPU": options.cpus}
    group = placement_group([machine] * options.machines, strategy="STRICT_SPREAD")  # one bundle a machine
    ray.get(group.ready())
    places = [
        PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=number)
        for number in range(options.machines)
    ]
    whole = ray.remote(num_gpus=options.gpus, num_cpus=options.cpus, max_retries=0)
    host = ray.get(ray.remote(num_cpus=0)(address).options(scheduling_strategy=places[0]).remote())
    name = str(uuid.uuid4())
    started = [
        whole(run).options(scheduling_strategy=place).remote(command(options, name, host, number, words))
        for number, place in enumerate(places)
    ]
    return int(max(ray.get(started)))


if __name__ == "__main__":
    sys.exit(main())

"""The examples for clusters start a training command that exists. What a cluster does with them is not tested."""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import yaml
from torch.distributed.run import get_args_parser

from threetowers.commands.arguments import TrainArguments, run_arguments
from threetowers.objective.pairs import objective
from threetowers.run.setup import check_settings
from threetowers.train.together import check_divisible

CLUSTERS = Path(__file__).parents[1] / "examples" / "clusters"


def started(words: Sequence[str]) -> argparse.Namespace:
    """What torchrun is told, by the words after it; the training command is read as the command line does."""
    options: argparse.Namespace = get_args_parser().parse_args(words)
    assert options.module and options.training_script == "threetowers"
    verb, *rest = options.training_script_args
    assert verb == "train"
    run = run_arguments(TrainArguments, rest, verb)[1].run
    check_settings(run)
    objective(run)
    check_divisible(run, int(options.nnodes) * int(options.nproc_per_node))
    return options


def test_the_job_of_kubernetes() -> None:
    service, job = yaml.safe_load_all((CLUSTERS / "job.yaml").read_text(encoding="utf-8"))
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["bash", "-c"]
    (text,) = container["args"]
    program, *words = shlex.split(text.replace("$((JOB_COMPLETION_INDEX == 0))", "1").removeprefix("exec "))
    assert program == "torchrun"
    options = started(words)
    assert int(options.nnodes) == spec["completions"] == spec["parallelism"]
    assert int(options.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert options.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:29500"
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules in place of Ray's, which the tests do not install."""
    for name in ("ray", "ray.util", "ray.util.placement_group", "ray.util.scheduling_strategies"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock(spec=ModuleType))
    monkeypatch.setattr(sys.modules["ray.util.placement_group"], "placement_group", None, raising=False)
    monkeypatch.setattr(
        sys.modules["ray.util.scheduling_strategies"], "PlacementGroupSchedulingStrategy", None, raising=False
    )


@pytest.mark.usefixtures("ray")
def test_the_launcher_for_ray() -> None:
    path = CLUSTERS / "train_on_ray.py"
    example = re.search(r"train_on_ray\.py (--machines .*)", path.read_text(encoding="utf-8"))
    assert example
    words = shlex.split(example[1])
    assert (words[0], words[2]) == ("--machines", "--gpus")
    options = SimpleNamespace(machines=words[1], gpus=words[3])
    command = runpy.run_path(str(path))["command"]
    for number in (0, 1):
        python, *rest = command(options, "name", "10.0.0.1", number, words[4:])
        assert python == sys.executable and rest[:2] == ["-m", "torch.distributed.run"]
        told = started(rest[2:])
        assert (told.nnodes, told.nproc_per_node) == ("4", "8")
        assert told.rdzv_conf == f"is_host={1 - number}"

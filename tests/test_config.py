"""Configuration files: round trips, refusals, and the hash."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threetowers.config import ObjectiveConfig, OptimConfig, RunConfig, check
from threetowers.errors import UsageError
from threetowers.recipes import PRESETS
from threetowers.settings import as_plain, config_hash, read_config, replace_nested, write_config


@pytest.mark.parametrize("name", PRESETS)
def test_the_written_file_alone_gives_the_same_run(name: str, tmp_path: Path) -> None:
    config = PRESETS[name]()
    write_config(config, tmp_path / "config.toml")
    assert read_config(tmp_path / "config.toml") == config
    # on top of another base every key still comes from the file
    other = RunConfig(steps=3, objective=ObjectiveConfig(scale="per-row"), optim=OptimConfig(lr=9.0))
    assert read_config(tmp_path / "config.toml", other) == config


@given(
    lr=st.floats(1e-8, 10, allow_nan=False),
    third=st.lists(st.text(min_size=1, max_size=12), max_size=3),
    vision=st.dictionaries(st.sampled_from(["image_size", "a@b", "x.y"]), st.integers() | st.booleans()),
)
def test_round_trip_of_any_values(
    lr: float, third: list[str], vision: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = RunConfig(third=tuple(third), optim=OptimConfig(lr=lr))
    config = replace(config, pair=replace(config.pair, vision=vision))
    path = tmp_path_factory.mktemp("config") / "config.toml"
    write_config(config, path)
    assert read_config(path) == config


def test_replacing_one_nested_field_keeps_its_siblings() -> None:
    base = RunConfig(optim=OptimConfig(lr=0.5, weight_decay=0.7))
    changed = replace_nested(base, {"optim": {"lr": 0.25}})
    assert changed.optim == replace(base.optim, lr=0.25)
    assert changed.optim.weight_decay == 0.7


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optm": {}}, ["optm", "did you mean `optim`"]),
        ({"optim": {"lrr": 1.0}}, ["optim.lrr", "did you mean `lr`"]),
        ({"steps": "ten"}, ["steps", "expected int", "'ten'"]),
        ({"steps": True}, ["steps", "expected int", "True"]),
        ({"steps": 2.0}, ["steps", "expected int"]),
        ({"optim": 3}, ["optim", "section"]),
        ({"method": "clip"}, ["method", "'clip'", "baseline"]),
        ({"optim": {"betas": [0.9]}}, ["optim.betas", "expected 2 values"]),
        ({"third": ["a", 3]}, ["third[1]", "expected str"]),
        ({"pair": {"vision": {"image_size": [1, 2]}}}, ["pair.vision.image_size"]),
    ],
)
def test_refusals_name_the_path_and_the_remedy(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        replace_nested(RunConfig(), values)
    for word in words:
        assert word in str(error.value)


def test_ints_pass_as_floats_and_a_lone_value_as_a_tuple() -> None:
    config = replace_nested(RunConfig(), {"optim": {"lr": 1}, "third": "timm:resnet50"})
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config.third == ("timm:resnet50",)


def test_the_text_none_is_not_given_and_is_written_back() -> None:
    config = replace_nested(RunConfig(data="x", third=("a",)), {"data": "none", "third": "none"})
    assert config.data is None and config.third == ()
    assert replace_nested(config, {"third": ["none"]}).third == ()
    plain = as_plain(config)
    assert plain["data"] == plain["embeddings"] == plain["pair"]["model"] == "none"
    assert replace_nested(RunConfig(), plain) == config
    with pytest.raises(UsageError, match="data: expected str, got 3"):
        replace_nested(RunConfig(), {"data": 3})


def test_a_file_that_is_not_toml_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("steps = \n")
    with pytest.raises(UsageError, match=r"run\.toml.*line 1"):
        read_config(path)


@pytest.mark.parametrize(
    ("third", "views"),
    [
        ((), {}),
        (("timm:a",), {"third": "timm:a"}),
        (("dino=timm:a", "places=hf:b"), {"third_dino": "timm:a", "third_places": "hf:b"}),
        (("timm:a@x=y",), {"third": "timm:a@x=y"}),
    ],
)
def test_third_towers_by_view(third: tuple[str, ...], views: dict[str, str]) -> None:
    assert RunConfig(third=third).thirds() == views


@pytest.mark.parametrize("third", [("timm:a", "timm:b"), ("a=timm:a", "a=timm:b"), ("a-b=timm:a",)])
def test_third_towers_without_distinct_names_are_refused(third: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="third"):
        RunConfig(third=third).thirds()


def test_the_hash_depends_on_every_key() -> None:
    assert config_hash(RunConfig()) != config_hash(RunConfig(seed=1))
    assert config_hash(RunConfig()) != config_hash(RunConfig(optim=OptimConfig(eps=1e-7)))
    assert config_hash(RunConfig()) == config_hash(RunConfig())


@pytest.mark.parametrize(
    "values",
    [{"steps": 0}, {"batch_size": 0}, {"log_every_steps": 0}, {"keep_checkpoints": 0}, {"inputs": {"workers": -1}},
     {"inputs": {"crop_ratio": [0.0, 1.0]}}, {"optim": {"lr": -1.0}}, {"objective": {"init_scale": 0.0}}],
)  # fmt: skip
def test_numbers_that_no_run_can_have_are_refused_by_key(values: dict[str, Any]) -> None:
    key, value = next(iter(values.items()))
    path = f"{key}.{next(iter(value))}" if isinstance(value, dict) else key
    with pytest.raises(UsageError, match=path.replace(".", r"\.")):
        check(replace_nested(RunConfig(), values))
    check(RunConfig())

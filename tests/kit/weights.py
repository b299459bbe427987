"""Weights and towers that do not fit, in the copy of the folder of kit/mistakes.py."""

import contextlib
import io
import shutil
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf


def among_others(folder: Path) -> None:
    """pair.safetensors: the weights of tower/ as the image tower of a whole open_clip model."""
    trunk = load_file(folder / "tower" / "model.safetensors")
    state = {f"visual.trunk.{name}": value for name, value in trunk.items()}
    save_file({**state, "logit_scale": torch.zeros(1)}, folder / "pair.safetensors")


def of_larger_images(folder: Path) -> None:
    """vit.safetensors: a test_vit for images of 96 pixels."""
    model = timm.create_model("test_vit", img_size=96, num_classes=0)
    save_file(model.state_dict(), folder / "vit.safetensors")


def of_four_channels(folder: Path) -> None:
    """four/: a timm network for images with four channels."""
    model = timm.create_model("test_resnet", in_chans=4)
    model.pretrained_cfg.update(input_size=(4, 160, 160))
    save_for_hf(model, str(folder / "four"), model_args={"in_chans": 4}, safe_serialization=True)


def causal_reader(folder: Path) -> None:
    """gpt/: a text model in which no token sees those behind it, with the tokenizer of reader/."""
    from transformers import GPT2Config, GPT2Model

    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of one file
        GPT2Model(GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder / "gpt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "reader" / name, folder / "gpt" / name)


def without_vocabulary(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / "reader" / name).unlink()

"""A timm network and open_clip's text transformer as transformers' VisionTextDualEncoderModel.

transformers' CLIPModel has one architecture of image towers. Its VisionTextDualEncoderModel joins any image model with
any text model by a projection without bias on each side. Here they are timm's own network, in TimmWrapperModel, and
CLIP's text model.
Legend: W width of the timm network, D embedding.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import timm
import torch
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from threetowers.run.finished import FinishedRun
from threetowers.towers.frozen.timm import pool_name

VISION = "vision_model.timm_model."
"""What stands before the names of the timm network's weights."""


def vision_obstacles(finished: FinishedRun) -> Iterator[str]:
    """The reasons for which an open_clip tower around a timm network is not one of VisionTextDualEncoderModel."""
    vision, img = finished.architecture.model_cfg["vision_cfg"], finished.img
    assert isinstance(img, TimmModel)
    name = vision["timm_model_name"]
    if any(key.startswith("pool.") for key in img.head.state_dict()):
        yield f"the image tower {name} has open_clip's attention pooling (vision.timm_pool)"
    elif vision.get("timm_proj", "linear") not in ("linear", "none"):
        yield f"the image tower {name} does not end in a linear projection (vision.timm_proj)"
    elif "proj.bias" in img.head.state_dict():
        yield f"the image tower {name} ends in a projection with a bias (vision.timm_proj_bias)"
    elif network_arguments(finished) is None:
        yield f"the image tower {name} is built by timm.create_model as another network (vision.timm_pool)"


def network_arguments(finished: FinishedRun) -> dict[str, Any] | None:
    """The arguments with which timm.create_model builds the network of the image tower; None when there are none.

    open_clip changes the pooling of the finished network. For some families that is another network than one that is
    built with this pooling, whose last norm then stands behind the pooling.
    """
    trunk: Any = finished.img.trunk
    pool = pool_name(trunk)
    expected = {key: value.shape for key, value in trunk.state_dict().items()}
    side = finished.architecture.image.size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    for arguments in ({}, {"global_pool": pool}, {"global_pool": pool, "fc_norm": False}):
        with contextlib.suppress(TypeError), torch.random.fork_rng(), torch.no_grad():  # no such argument
            name = finished.architecture.model_cfg["vision_cfg"]["timm_model_name"]
            other = timm.create_model(name, pretrained=False, num_classes=0, **arguments).eval()
            if {key: value.shape for key, value in other.state_dict().items()} != expected:
                continue
            other.load_state_dict(trunk.state_dict())
            found, wanted = other(images), trunk(images)
            # another network is off by its whole length; rounding takes up to 1e-5, as its weights lie elsewhere
            if found.shape == wanted.shape and (found - wanted).norm() <= 1e-3 * wanted.norm():
                return arguments
    return None


def dual_encoder(transformers: Any, finished: FinishedRun, clip: dict[str, Any]) -> nn.Module:
    """The network with random weights; call `vision_obstacles` first. clip: the keys of CLIPConfig but for images."""
    trunk: Any = finished.img.trunk
    vision = transformers.TimmWrapperConfig(
        architecture=finished.architecture.model_cfg["vision_cfg"]["timm_model_name"],
        model_args=network_arguments(finished),
        hidden_size=trunk.num_features,
        num_labels=0,
    )
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision,
        transformers.CLIPTextConfig(**clip["text_config"]),
        projection_dim=clip["projection_dim"],
        logit_scale_init_value=clip["logit_scale_init_value"],
    )
    model: nn.Module = transformers.VisionTextDualEncoderModel(config)
    return model


def vision_weights(finished: FinishedRun) -> dict[str, Tensor]:
    """The image tower's weights under the names of VisionTextDualEncoderModel; its projection is [D, W]."""
    img: Any = finished.img
    state = {VISION + key: value for key, value in img.trunk.state_dict().items()}
    projection = img.head.state_dict().get("proj.weight")  # without one, W is D
    state["visual_projection.weight"] = torch.eye(finished.embed_dim) if projection is None else projection
    return state

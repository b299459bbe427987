"""Third towers out of transformers: hf:DIR_OR_ID, a vision model with its image processor.

transformers is an optional dependency (extra `hf`) and is imported when a tower asks for it.
Legend: B images, N tokens, P the tower's width.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from threetowers.data.transforms import ImageSpec
from threetowers.errors import CheckpointError, UsageError
from threetowers.towers.frozen.base import (
    Card,
    Kind,
    Loaded,
    channels_of,
    first_line,
    foreign,
    num_parameters,
    token_mean,
)
from threetowers.towers.weights import no_weights

PROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""Where transformers looks for the settings of an image processor: nested in the first, or in a file of its own."""
REMEDY = "Offline, give a folder that save_pretrained wrote"
# heads that a checkpoint may bring and a tower does not have; leaving them out loses nothing
HEADS = (
    "classifier.",
    "cls.",
    "lm_head.",
    "decoder.",
    "qa_outputs.",
    "visual_projection.",
    "text_projection.",
)
# steps of an image processor that ImageSpec can say; any other `do_…` that is on is refused
KNOWN_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


class HuggingFaceVision(nn.Module):
    """A transformers vision model: images in, features [B, P] out.

    num_prefix: how many tokens (class, registers) stand before the patches.
    """

    def __init__(self, model: nn.Module, features: str, num_prefix: int) -> None:
        super().__init__()
        self.model, self.features, self.num_prefix = model, features, num_prefix

    def forward(self, images: Tensor) -> Tensor:
        found = self.model(pixel_values=images)
        if self.features == "pooled":
            return found.pooler_output.flatten(1)  # type: ignore[no-any-return]
        tokens: Tensor = found.last_hidden_state
        if tokens.ndim == 4:
            return tokens.mean(dim=(2, 3))
        return tokens[:, 0] if self.features == "cls" else token_mean(tokens[:, self.num_prefix :])


def load_hf(name: str, features: str) -> Loaded:
    """A vision model (ViT, DINOv2, the vision tower of CLIP or SigLIP …) and its preprocessing.

    Raises UsageError for features it has not or preprocessing that ImageSpec cannot say, CheckpointError for
    files that are missing or weights that do not fit.
    """
    source = f"hf:{name}"
    folder = local_folder(name, source, PROCESSORS)
    model, no_pooler = load_model(folder, source)
    model = getattr(model, "vision_model", model)  # of an image-text model the image side is meant
    spec = image_spec(processor_settings(folder, source), source, num_channels(model))
    if no_pooler:
        model.pooler = None
    if no_pooler and features == "pooled":
        raise no_pooler_error(
            source, [other for other in ("cls", "mean") if _has(model, other, spec, source)]
        )
    width, num_prefix = probe(model, features, spec, source)
    return Loaded(HuggingFaceVision(model, features, num_prefix), width, spec)


def num_channels(model: Any) -> int:
    """How many channels the images of a transformers model have."""
    return int(getattr(model.config, "num_channels", 3))


def _has(model: Any, features: str, spec: ImageSpec, source: str) -> bool:
    try:
        probe(model, features, spec, source)
    except UsageError:
        return False
    return True


def no_pooler_error(source: str, others: Sequence[str]) -> CheckpointError:
    """For pooled features of a model that was saved without its pooler. others: the features that it has."""
    return CheckpointError(
        f"{source}: this model was saved without its pooler, and a random one would mean nothing; take "
        f"third_features = {' or '.join(others) or 'pooled of another model'}"
    )


def local_folder(name: str, source: str, needs: Sequence[str] = ()) -> str:
    """The name, checked when it is a folder; raises CheckpointError for what is missing in it.

    needs: patterns of file names, of which one is enough.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise CheckpointError(f"{source}: no such folder")
        return name
    for files in (("config.json",), needs):
        if files and not any(path.is_file() for file in files for path in folder.glob(file)):
            raise CheckpointError(
                f"{source}: no {' or '.join(files)} in the folder; save_pretrained writes it"
            )
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{source}: no safetensors weights in the folder; write them with save_pretrained"
        )
    return name


def load_model(name: str, source: str) -> tuple[Any, bool]:
    """transformers' model of that name, every weight accounted for, and whether it came without its pooler.

    Raises CheckpointError that lists the missing, unexpected and misshapen keys, or names a file without weights.
    """
    for path in Path(name).glob("*.safetensors") if Path(name).is_dir() else ():
        if found := no_weights(path):
            raise CheckpointError(f"{source}: {path} {found}")
    transformers = import_transformers(source)
    with quiet(transformers), foreign(source, "the weights", REMEDY, hub=not Path(name).is_dir()):
        model, info = transformers.AutoModel.from_pretrained(
            name,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # listed below like every other misfit
            dtype=torch.float32,
        )
    missing = sorted(info["missing_keys"])
    pooler = [key for key in missing if "pooler" in key.split(".")]
    missing = [key for key in missing if key not in pooler]
    unexpected = [key for key in sorted(info["unexpected_keys"]) if not _is_dropped(key)]
    parts = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("wrong shape", [str(key[0]) for key in info["mismatched_keys"]]),
    )
    if any(keys for _, keys in parts):
        listing = "; ".join(f"{word}: {', '.join(keys[:8])}" for word, keys in parts if keys)
        wrapped = {key.partition(".")[0] for key in info["unexpected_keys"]}
        remedy = ""
        if missing and len(wrapped) == 1:
            remedy = (
                f". If {wrapped.pop() + '.'!r} stands before every name, `threetowers convert` takes it off"
            )
        raise CheckpointError(f"{source}: these weights do not fit the model ({listing}){remedy}")
    return model.eval(), bool(pooler)


def _is_dropped(key: str) -> bool:
    # position_ids is 0, 1, 2 …, which older files kept among the weights
    return key.startswith(HEADS) or key.endswith("position_ids")


def import_transformers(source: str) -> Any:
    """The library; raises UsageError with the command that installs it."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"{source}: needs transformers ({first_line(error)}); pip install 'threetowers[hf]'"
        ) from None
    return transformers


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """transformers' own load reports and bars are off inside: what they say is said here as an error."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def processor_settings(name: str, source: str) -> dict[str, Any]:
    """The image processor's settings, defaults of its class included.

    The Pillow backend is the one that is matched: the one on tensors rounds its resized pixels differently.
    """
    transformers = import_transformers(source)
    with quiet(transformers), foreign(source, "the image processor", REMEDY, hub=not Path(name).is_dir()):
        processor = transformers.AutoImageProcessor.from_pretrained(
            name, backend="pil", trust_remote_code=False
        )
        return dict(processor.to_dict())


def image_spec(settings: dict[str, Any], source: str, channels: int = 3) -> ImageSpec:
    """An image processor's settings as ImageSpec; raises UsageError for what it cannot say."""

    def refuse(what: str) -> UsageError:
        kind = settings.get("image_processor_type", "the image processor")
        return UsageError(
            f"third: {source}: {kind} {what}, which cannot be reproduced here; the same network may exist as timm:NAME"
        )

    for key, value in settings.items():
        if key.startswith("do_") and value and key not in KNOWN_STEPS:
            raise refuse(f"has {key} = {value!r}")
    if settings.get("crop_pct") is not None:
        raise refuse(f"has crop_pct = {settings['crop_pct']!r}")
    if not settings.get("do_resize"):
        raise refuse("does not resize")
    factor = settings.get("rescale_factor") if settings.get("do_rescale") else None
    if factor is None or abs(factor * 255 - 1) > 1e-6 or settings.get("offset"):
        raise refuse(f"does not scale pixels to [0, 1] (rescale_factor {factor!r})")
    size = {key: value for key, value in dict(settings.get("size") or {}).items() if value is not None}
    if set(size) == {"shortest_edge"}:
        resize, resized = "shortest", size["shortest_edge"]
        if not settings.get("do_center_crop"):
            raise refuse("keeps the aspect ratio without a centre crop")
    elif set(size) == {"height", "width"} and size["height"] == size["width"]:
        resize, resized = "squash", size["height"]
    else:
        raise refuse(f"resizes to {size!r}")
    side = resized
    if settings.get("do_center_crop"):
        crop = {
            key: value for key, value in dict(settings.get("crop_size") or {}).items() if value is not None
        }
        if set(crop) != {"height", "width"} or crop["height"] != crop["width"] or crop["height"] > resized:
            raise refuse(f"crops {crop!r} out of {size!r}")
        side = crop["height"]
    normalises = settings.get("do_normalize")
    mean, std = (settings.get("image_mean"), settings.get("image_std")) if normalises else (0.0, 1.0)
    if settings.get("resample") not in list(Image.Resampling):
        raise refuse(f"has resample = {settings.get('resample')!r}")
    return ImageSpec(
        size=side,
        **channels_of(source, mean, std, channels),
        interpolation=Image.Resampling(settings["resample"]).name.lower(),  # type: ignore[arg-type]
        resize=resize,  # type: ignore[arg-type]
        resize_size=resized,
        centre="floor",
    )


@torch.no_grad()
def probe(model: Any, features: str, image: ImageSpec, source: str) -> tuple[int, int]:
    """Width P and number of prefix tokens, from one empty image; raises UsageError for features it has not."""
    size = image.size
    try:
        found = model(pixel_values=torch.zeros(1, len(image.mean), size, size, device=model.device))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"third: {source}: not a model of images at {size} pixels ({first_line(error)})"
        ) from error
    if features == "pooled":
        pooled = getattr(found, "pooler_output", None)
        if pooled is None:
            others = [other for other in ("cls", "mean") if _has(model, other, image, source)]
            raise UsageError(
                f"third_features: {source} has no pooler; take {' or '.join(others) or 'another'}"
            )
        return pooled.flatten(1).shape[1], 0
    pooled = "" if getattr(found, "pooler_output", None) is None else "pooled or "
    tokens: Any = getattr(found, "last_hidden_state", None)
    if tokens is not None and tokens.ndim == 4:
        if features == "mean":
            return tokens.shape[1], 0
        raise UsageError(
            f"third_features: {source} is a convolutional network without class token; take {pooled}mean"
        )
    patch = getattr(model.config, "patch_size", None)
    num_prefix = (
        -1 if tokens is None or not isinstance(patch, int) else tokens.shape[1] - (size // patch) ** 2
    )
    if num_prefix < 0:
        raise UsageError(
            f"third_features: the tokens of {source} are not a class token and patches; take third_features = pooled"
        )
    if features == "cls" and num_prefix == 0:
        raise UsageError(f"third_features: {source} has no class token; take {pooled}mean")
    return tokens.shape[2], num_prefix


def read_config(name: str, source: str) -> Any:
    """transformers' configuration of a folder or a name on the Hub; raises CheckpointError."""
    transformers = import_transformers(source)
    with quiet(transformers), foreign(source, "the configuration", REMEDY, hub=not Path(name).is_dir()):
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)


def skeleton(spec: str, name: str) -> Any:
    """transformers' model of a configuration, without memory and without weights; raises CheckpointError."""
    config = read_config(local_folder(name, spec), spec)
    transformers = import_transformers(spec)
    with quiet(transformers), foreign(spec, "the network", REMEDY), torch.device("meta"):
        return transformers.AutoModel.from_config(config, trust_remote_code=False).eval()


def hf_card(spec: str, name: str) -> Card:
    """The card of a vision model; raises as `load_hf` does."""
    whole = skeleton(spec, name)
    model = getattr(whole, "vision_model", whole)
    image = image_spec(processor_settings(name, spec), spec, num_channels(model))
    width, _ = probe(model, "pooled", image, spec)
    return Card(spec, num_parameters(model), width, image)


HF = Kind(
    prefix="hf",
    reads="images",
    forms=("hf:DIR_OR_ID",),
    help="a transformers vision model (ViT, DINOv2, CLIP, SigLIP …), safetensors only",
    load=load_hf,
    card=hf_card,
)

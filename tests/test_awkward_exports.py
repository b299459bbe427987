"""What open_clip's own transform makes of awkward image files, beside what training makes of them."""

import io
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from kit.pictures import encoded, noise
from kit.runs import Config
from threetowers.data.decode import decode, upright_rgb
from threetowers.data.transforms import ImageSpec, fixed_view, normalise
from threetowers.export import open_clip as export
from threetowers.run.finished import load_run
from threetowers.train.loop import train


@dataclass
class Exported:
    """A finished run, and of its export open_clip's transform and the function out of the card."""

    image: ImageSpec
    transform: Callable[[Image.Image], torch.Tensor]
    to_rgb: Callable[[Image.Image], Image.Image]
    card: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def exported(run: Path, tiny_config: Config) -> Exported:
    if not (run / "exported").exists():
        train(tiny_config(method="baseline", third=(), steps=1), run / "run")
        export.export_open_clip(run / "run", run / "exported")
    card = (run / "exported" / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(re.sub(r"^(model|tokenizer|pixels|image|text)\b.*$", "", code, flags=re.MULTILINE), names)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{run / 'exported'}")
    return Exported(load_run(run / "run").architecture.image, transform, names["to_rgb"], card)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def see_through(mode: str) -> Image.Image:
    image = noise(61, 47).convert(mode)
    image.putalpha(Image.fromarray(np.arange(61 * 47, dtype=np.uint32).reshape(47, 61).astype(np.uint8)))
    return image


def wide() -> Image.Image:
    return Image.fromarray(np.asarray(noise(61, 47).convert("L")).astype(np.uint16) * 250)


def wide_colour() -> bytes:
    """A PNG with 16 bits for each channel, which Pillow does not write."""
    rows = np.random.default_rng(3).integers(0, 65536, (47, 61 * 3)).astype(">u2")
    content = {
        b"IHDR": struct.pack(">IIBBBBB", 61, 47, 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in content.items()
    )


def files() -> dict[str, bytes]:
    image = noise(61, 47)
    palette = image.quantize(19)
    frames: dict[str, Any] = {"save_all": True, "append_images": [noise(61, 47, 1)]}
    return {
        "JPEG": encoded(noise(61, 47), "JPEG"),
        "PNG": encoded(image, "PNG"),
        "large": encoded(noise(301, 150), "PNG"),
        "grey PNG": encoded(image.convert("L"), "PNG"),
        "grey JPEG": encoded(image.convert("L"), "JPEG"),
        "WebP": encoded(image, "WEBP"),
        "BMP": encoded(image, "BMP"),
        "TIFF of two pages": encoded(noise(61, 47), "TIFF", **frames),
        "animated WebP": encoded(noise(61, 47), "WEBP", **frames),
        "16-bit colour": wide_colour(),
        "RGBA": encoded(see_through("RGBA"), "PNG"),
        "LA": encoded(see_through("L"), "PNG"),
        "a transparent colour": encoded(Image.new("RGB", (61, 47), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        "palette with a transparent entry": encoded(palette, "PNG", transparency=3),
        "palette": encoded(palette, "PNG"),
        "GIF": encoded(image.quantize(19), "GIF", **{**frames, "append_images": [noise(61, 47, 1).quantize(19)]}),
        "two colours": encoded(image.convert("1"), "PNG"),
        "rotated JPEG": encoded(noise(61, 47), "JPEG", exif=turned()),
        "rotated PNG": encoded(noise(61, 47), "PNG", exif=turned()),
        "16-bit grey": encoded(wide(), "PNG"),
        "16-bit grey TIFF": encoded(wide(), "TIFF"),
        "CMYK": encoded(Image.merge("CMYK", [noise(61, 47, seed).getchannel(0) for seed in range(4)]), "JPEG"),
    }  # fmt: skip


AGREE = {
    "JPEG", "PNG", "large", "grey PNG", "grey JPEG", "WebP", "BMP", "TIFF of two pages", "animated WebP",
    "16-bit colour",
}  # fmt: skip
"""What open_clip's transform sees as training does, without the card's function."""


@pytest.mark.parametrize("name", files())
def test_an_awkward_file_is_seen_as_in_training_with_the_function_of_the_card(
    name: str, exported: Exported
) -> None:
    data = files()[name]
    ours = normalise(
        torch.from_numpy(fixed_view(decode(data, "id"), exported.image).copy())[None], exported.image
    )[0]
    theirs = exported.transform(exported.to_rgb(Image.open(io.BytesIO(data))))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    try:
        alone = exported.transform(Image.open(io.BytesIO(data)))
        same = torch.allclose(alone, ours, rtol=0, atol=1e-5)
    except (OSError, ValueError):  # it cannot convert the mode
        same = False
    assert same == (name in AGREE)


def test_the_card_and_the_message_name_what_does_not_agree(
    run: Path, exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    export.export_open_clip(run / "run", run / "exported")
    said = capsys.readouterr().err
    for text in (exported.card, said):
        for word in ("to_rgb", "transparency", "EXIF rotation", "palette", "16 bits", "CMYK"):
            assert word in text
    assert "README.md" in said


def test_the_code_of_the_card_runs(run: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    Image.new("RGBA", (50, 40)).save(run / "photo.png")
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", exported.card, re.DOTALL)[0], names)
    with torch.no_grad():
        ours = load_run(run / "run").encode_image([run / "photo.png", Image.open(run / "photo.png")])
    torch.testing.assert_close(names["image"].detach(), ours[:1], rtol=0, atol=1e-5)
    assert torch.equal(ours[0], ours[1]), "an opened image is seen as its file is"


def test_a_readme_of_somebody_else_is_kept(run: Path, exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine")
    export.export_open_clip(run / "run", tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine"
    assert "to_rgb" in (tmp_path / "README-threetowers.md").read_text()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_a_filter_that_open_clip_has_not_is_named(interpolation: Any) -> None:
    image = ImageSpec(32, (0.5,) * 3, (0.5,) * 3, interpolation)
    settings, said = export._preprocess_cfg(image), " ".join(export._differences(image))
    assert settings["interpolation"] in ("bilinear", "bicubic"), "open_clip refuses all others"
    assert (settings["interpolation"] == interpolation) != (interpolation in said)


def test_an_opened_image_is_upright_and_on_white_like_its_file() -> None:
    for name, data in files().items():
        assert upright_rgb(Image.open(io.BytesIO(data))).tobytes() == decode(data, "id").tobytes(), name

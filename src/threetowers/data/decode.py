"""Decodes image files to upright RGB pixels; nothing else in the package decodes images of unknown origin.

Any bytes give an image or a BadSample with a reason from `Reason`.
"""

import contextlib
import importlib.util
import math
import struct
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Literal, get_args

import numpy as np

# Imported to register the formats. If one in FORMATS were not registered, Pillow would load all its decoders.
from PIL import AvifImagePlugin, Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from threetowers.data.avif import as_still, coded_sizes
from threetowers.data.metadata import has_all_scans, without_metadata
from threetowers.errors import BadSample, UsageError

Reason = Literal[
    "empty file",
    "not an image",  # HTML, text, anything without an image's signature
    "unsupported format",  # an image, but none of FORMATS
    "too many pixels",
    "extreme shape",  # one side more than MAX_SIDE_RATIO times the other
    "damaged image",
]
REASONS: tuple[str, ...] = get_args(Reason)

Decoder = Literal["pillow", "simplejpeg"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF")
"""What is read; HEIF too where pillow-heif is installed. Decoders that few files need are not open to foreign bytes."""
MAX_PIXELS = 64_000_000
# Scaling the short side of a 60,000 × 1 image to 224 would take gigabytes, though its own pixels are few.
MAX_SIDE_RATIO = 200

# What Pillow warns about, such as damaged EXIF, is a reason here; a warning for each file would hide other output.
warnings.filterwarnings("ignore", module=r"PIL\.")
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # by default each loader process would start a thread for every core

# libtiff has decoders for many old compressions; these are common and take no more memory than a strip or tile.
_TIFF_COMPRESSIONS = (
    "raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "jpeg",
)  # fmt: skip
_TIFF_MODES = (
    "1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B", "I;16N",
)  # fmt: skip
_TILE_SIDES = (322, 323)

_SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
)  # fmt: skip
_FOREIGN_SIGNATURES = {
    b"\0\0\0\x0cjP  ": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000", b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL", b"8BPS": "a Photoshop file", b"\0\0\1\0": "an icon", b"<svg": "SVG", b"%PDF": "PDF",
    b"qoif": "QOI", b"v/1\x01": "OpenEXR", b"II\xbc\x01": "JPEG XR",
    **{b"P%d%c" % (kind, end): "PNM" for kind in range(1, 8) for end in b"\n\r \t"},
}  # fmt: skip
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
# Behind a whole scan of a JPEG these bits are skipped. In one that is cut, libjpeg makes other pixels of some of them
# than of the zeros that it fills in.
_FILLERS, _JPEG_END = (b"", b"\xaa" * 200, b"\xd6" * 200, b"\x6b" * 200), b"\xff\xd9"
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112


def decode(
    data: bytes,
    id: str,
    *,
    max_pixels: int = MAX_PIXELS,
    decoder: Decoder = "pillow",
    shrink: Callable[[tuple[int, int]], float] | None = None,
) -> Image.Image:
    """The image in an encoded file, in mode RGB, upright by its EXIF orientation; of an animation the first frame.

    Of a file with several pages it is the first. Transparent images are laid on white, and 16-bit grey keeps its high
    byte. Metadata that cannot be read, missing end marks and damage behind the first frame are ignored: the pixels
    are intact. Size and shape are checked by the header before memory is allocated.

    decoder: with `simplejpeg`, colour JPEGs are decoded by it, to the same pixels and faster; Pillow decodes the rest.
    shrink: called with the upright (width, height); returns the factor by which the caller can use both sides
    reduced. A JPEG is then decoded at a scale that keeps at least that size, which is faster and changes pixels
    slightly. A factor below 2 is ignored: the scales between 1 and 2 cost as much as they save.

    Raises BadSample(id, reason, detail) with a reason from `REASONS`, UsageError for a decoder that is not installed,
    and nothing else.
    """
    decoded = _decode(data, id, max_pixels, decoder, shrink)
    if not isinstance(decoded, Image.Image):
        return Image.fromarray(decoded)
    decoded.info.clear()  # its orientation would turn the upright image a second time
    return decoded


def decode_array(
    data: bytes,
    id: str,
    *,
    decoder: Decoder = "pillow",
    shrink: Callable[[tuple[int, int]], float] | None = None,
) -> np.ndarray:
    """The pixels of the image that `decode` returns, uint8 [H, W, 3], which can be read-only; raises as it does."""
    return np.asarray(_decode(data, id, MAX_PIXELS, decoder, shrink))


def _decode(
    data: bytes,
    id: str,
    max_pixels: int,
    decoder: Decoder,
    shrink: Callable[[tuple[int, int]], float] | None,
) -> Image.Image | np.ndarray:
    if not data:
        raise BadSample(id, "empty file")
    try:
        return _read(data, id, max_pixels, decoder, shrink)
    except BadSample as bad:
        if bad.reason != "damaged image":
            raise
        for other in _repaired(data, id, max_pixels):
            with contextlib.suppress(BadSample):
                return _read(other, id, max_pixels, decoder, shrink)
        raise


def _read(
    data: bytes,
    id: str,
    max_pixels: int,
    decoder: Decoder,
    shrink: Callable[[tuple[int, int]], float] | None,
) -> Image.Image | np.ndarray:
    try:
        image: Image.Image = Image.open(BytesIO(as_still(data)), formats=_formats(data))
        _check_shape(id, *image.size, max_pixels)
        if image.format == "AVIF":
            _check_avif(data, id, max_pixels)
        if image.format == "TIFF":
            _check_tiff(image, id, max_pixels)
        if image.format == "JPEG" and (shrink is not None or decoder != "pillow"):
            pixels = _load_jpeg(image, data, decoder, shrink)
            if pixels is not None:
                upright = _UPRIGHT.get(_orientation(image))
                return pixels if upright is None else Image.fromarray(pixels).transpose(upright)
        return upright_rgb(image)
    except (BadSample, UsageError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(id, "too many pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise _unidentified(data, id) from error
    except Exception as error:  # decoders raise nearly everything on damaged input, MemoryError included
        said = " ".join(str(error).split())  # of some decoders several lines
        raise BadSample(id, "damaged image", f"{type(error).__name__}: {said}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image in mode RGB as `decode` returns it: upright, and laid on white where it is transparent."""
    image.load()
    orientation = _orientation(image)
    image = _to_rgb(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _repaired(data: bytes, id: str, max_pixels: int) -> Iterator[bytes]:
    """Files with the pixels of a file that cannot be read, in case that only what surrounds them is damaged."""
    yield from without_metadata(data)
    if has_all_scans(data):
        # libjpeg fills up a scan that is cut, and does not say so
        scan = data.rstrip(b"\xff")  # half of an end mark
        ends = [scan + filler + _JPEG_END for filler in _FILLERS]
        with contextlib.suppress(BadSample):
            first, *others = (np.asarray(_read(end, id, max_pixels, "pillow", None)) for end in ends)
            if all(np.array_equal(first, other) for other in others):
                yield ends[0]


def check_decoder(decoder: Decoder) -> None:
    """Raises UsageError when the decoder is not installed."""
    if decoder == "simplejpeg" and importlib.util.find_spec("simplejpeg") is None:
        raise UsageError(
            "inputs.decoder: simplejpeg is not installed; pip install simplejpeg, or take pillow"
        )


def _load_jpeg(
    image: Image.Image, data: bytes, decoder: Decoder, shrink: Callable[[tuple[int, int]], float] | None
) -> np.ndarray | None:
    """A JPEG's pixels uint8 [H, W, 3], not turned upright; None when Pillow is to decode, at the scale set here."""
    width, height = image.size
    factor = 1.0
    if shrink is not None:
        asked = shrink((height, width) if _orientation(image) >= 5 else (width, height))
        factor = asked if asked >= 2 else 1.0
    least = (math.ceil(width / factor), math.ceil(height / factor))
    if decoder == "simplejpeg" and image.mode == "RGB":
        pixels = _simplejpeg(data, image.size, least)
        if pixels is not None:
            return pixels
    if factor > 1:
        image.draft(None, least)  # type: ignore[arg-type]  # None keeps the mode
    return None


def _simplejpeg(data: bytes, size: tuple[int, int], least: tuple[int, int]) -> np.ndarray | None:
    """uint8 [H, W, 3] at the smallest scale that keeps `least` (width, height); None when Pillow should try."""
    check_decoder("simplejpeg")
    import simplejpeg

    try:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        if (width, height) != size:
            return None  # the two parsers disagree, and only the size that Pillow found has been checked
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", min_width=least[0], min_height=least[1])
    except ValueError:  # it refuses some files that Pillow reads, such as those with bytes between segments
        return None
    return pixels


def _check_shape(id: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSample(id, "too many pixels", f"{width} × {height}, at most {max_pixels:,} are taken")
    if max(width, height) > MAX_SIDE_RATIO * min(width, height):
        raise BadSample(id, "extreme shape", f"{width} × {height}")


def _check_avif(data: bytes, id: str, max_pixels: int) -> None:
    for width, height in coded_sizes(data):
        _check_shape(id, width, height, max_pixels)


def _check_tiff(image: Image.Image, id: str, max_pixels: int) -> None:
    """Raises BadSample for a TIFF that is stored in an unusual way, or in tiles that would take too much memory."""
    compression = image.info.get("compression")
    if compression not in _TIFF_COMPRESSIONS or image.mode not in _TIFF_MODES:
        stored = f"TIFF with compression {compression}, mode {image.mode}"
        raise BadSample(id, "unsupported format", f"{stored}; save it as PNG")
    width, height = (image.tag_v2.get(side, 1) for side in _TILE_SIDES)  # type: ignore[attr-defined]
    if width * height > max_pixels:
        raise BadSample(
            id, "too many pixels", f"tiles of {width} × {height}, at most {max_pixels:,} are taken"
        )


def _brands(data: bytes) -> set[bytes]:
    """What a file of the HEIF family (AVIF, HEIC, video) says it is; empty for any other file."""
    if data[4:8] != b"ftyp":
        return set()
    box = data[8 : min(max(int.from_bytes(data[:4]), 12), 200)]
    return {box[place : place + 4] for place in range(0, len(box), 4)}


def _formats(data: bytes) -> tuple[str, ...]:
    """The formats that a file may have: HEIF only for what says it is, since its decoder comes with a plugin."""
    brands = _brands(data)
    if not brands & _HEIC_BRANDS or b"avif" in brands or importlib.util.find_spec("pillow_heif") is None:
        return FORMATS
    import pillow_heif

    pillow_heif.register_heif_opener()
    return ("HEIF",)


def _unidentified(data: bytes, id: str) -> BadSample:
    """Why Pillow does not recognise a file, by its first bytes."""
    found, brands = f"starts with {data[:12]!r}", _brands(data)
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    if data.startswith(_SIGNATURES) or webp or (b"avif" in brands and AvifImagePlugin.SUPPORTED):
        return BadSample(id, "damaged image", found)
    if b"avif" in brands:
        return BadSample(
            id, "unsupported format", "AVIF, which this Pillow was built without; pip install -U pillow"
        )
    if brands & _HEIC_BRANDS:
        if importlib.util.find_spec("pillow_heif") is not None:
            return BadSample(id, "damaged image", found)
        return BadSample(
            id, "unsupported format", "HEIC; pip install 'threetowers[heif]', or convert it to JPEG"
        )
    names = [name for signature, name in _FOREIGN_SIGNATURES.items() if data.startswith(signature)]
    if names or brands or (data[:1] == b"<" and b"<svg" in data[:1000]):
        name = names[0] if names else "a video" if brands else "SVG"
        return BadSample(id, "unsupported format", f"{name}; convert it to JPEG or PNG")
    return BadSample(id, "not an image", found)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 when there is none or it cannot be read."""
    if "exif" not in image.info and "Raw profile type exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, struct.error):
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _wide_grey_to_rgb(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit grey reduced to its high byte, as Pillow does for 16-bit colour; `convert` would clip at 255."""
    wide = np.asarray(image).astype(np.uint16)
    grey = (wide >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[wide == transparent] = 255
    return Image.fromarray(grey).convert("RGB")

"""Decoding: every kind of image comes out as upright RGB, and every kind of rubbish as a named bad sample."""

import io
import pickle
import resource
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from kit.pictures import encoded
from threetowers.data.decode import REASONS, Decoder, check_decoder, decode, upright_rgb
from threetowers.errors import BadSample, UsageError

WIDTH, HEIGHT = 37, 21
Y, X = np.mgrid[:HEIGHT, :WIDTH]
GREY = (X * 5 + Y * 3).astype(np.uint8)
COLOUR = np.stack([X * 6, Y * 11, X + Y], -1).astype(np.uint8)


def pixels(data: bytes) -> np.ndarray:
    image = decode(data, "id")
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(data: bytes, **options: Any) -> str:
    with pytest.raises(BadSample) as caught:
        decode(data, "some/id", **options)
    assert caught.value.id == "some/id"
    return caught.value.reason


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, raw: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "JPEG"])
def test_colour(format: str) -> None:
    options = (
        {"lossless": True}
        if format == "WEBP"
        else {"quality": 98, "subsampling": 0}
        if format == "JPEG"
        else {}
    )
    found = pixels(encoded(Image.fromarray(COLOUR), format, **options))
    assert np.abs(found.astype(int) - COLOUR).max() <= (6 if format == "JPEG" else 0)


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP"])
def test_grey_and_bilevel(format: str) -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(GREY), format)), np.stack([GREY] * 3, -1))
    bilevel = Image.fromarray(GREY).convert("1")
    assert np.array_equal(pixels(encoded(bilevel, format)), np.asarray(bilevel.convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP"])
def test_palette(format: str) -> None:
    image = Image.fromarray(COLOUR).quantize(17)
    assert np.array_equal(pixels(encoded(image, format)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_transparent_palette_entry_becomes_white(format: str) -> None:
    image = Image.new("P", (4, 3), 1)
    image.putpalette([0, 0, 0, 200, 10, 20])
    image.putpixel((2, 1), 0)
    found = pixels(encoded(image, format, transparency=0))
    assert found[1, 2].tolist() == [255, 255, 255]
    assert found[0, 0].tolist() == [200, 10, 20]


@pytest.mark.parametrize(("format", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA")])
def test_alpha_is_laid_on_white(format: str, mode: str) -> None:
    colour = (100, 100, 100, 128) if mode == "RGBA" else (100, 128)
    image = Image.new(mode, (3, 3), colour)
    image.putpixel((0, 0), (9,) * (len(colour) - 1) + (0,))
    found = pixels(encoded(image, format, **({"lossless": True} if format == "WEBP" else {})))
    assert found[0, 0].tolist() == [255] * 3
    expected = 100 * 128 / 255 + 255 * 127 / 255
    assert np.abs(found[1, 1] - expected).max() <= 1


def test_transparent_colour_of_a_png_without_alpha() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert pixels(encoded(image, "PNG", transparency=(1, 2, 3))).tolist() == [[[255] * 3, [9] * 3]]


def test_cmyk_jpeg() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(pixels(encoded(red, "JPEG")).astype(int) - [255, 0, 0]).max() <= 3


def test_sixteen_bits_keep_the_high_byte() -> None:
    wide = np.array([[0, 255, 256, 1000, 30000, 65535]], dtype=np.uint16)
    grey = pixels(png(6, 1, 16, 0, b"\0" + wide.astype(">u2").tobytes()))
    assert grey[0, :, 0].tolist() == [0, 0, 1, 3, 117, 255]
    colour = np.stack([wide, wide[:, ::-1], wide], -1)
    found = pixels(png(6, 1, 16, 2, b"\0" + colour.astype(">u2").tobytes()))
    assert np.array_equal(found, colour >> 8)
    transparent = Image.fromarray(wide)
    assert pixels(encoded(transparent, "PNG", transparency=30000))[0, :, 1].tolist() == [0, 0, 1, 3, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(COLOUR), format, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert pixels(data).shape == ((HEIGHT, WIDTH, 3) if orientation < 5 else (WIDTH, HEIGHT, 3))
    assert np.array_equal(pixels(data), expected)
    again = upright_rgb(decode(data, "x"))
    assert np.array_equal(np.asarray(again), expected), "what is upright is not turned a second time"


def test_unreadable_exif_counts_as_absent() -> None:
    plain = encoded(Image.fromarray(COLOUR), "JPEG")
    for block in (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0rubbish", b"Exif\0\0"):
        data = encoded(Image.fromarray(COLOUR), "JPEG", exif=block)
        assert np.array_equal(pixels(data), pixels(plain))
    text = chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  4\nno hexadecimal")
    data = encoded(Image.fromarray(COLOUR), "PNG")
    assert np.array_equal(pixels(data[:33] + text + data[33:]), COLOUR)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50)
        assert np.abs(pixels(data).astype(int) - [255, 0, 0]).max() <= 12


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "not an image"),
        (b"\0" * 100, "not an image"),
        (b"\xff", "not an image"),
        (b"\xff\xd8\xff\xe0", "damaged image"),
        (b"\x89PNG\r\n\x1a\n", "damaged image"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "damaged image"),
        (encoded(Image.new("RGB", (9, 9)), "JPEG2000"), "unsupported format"),
        (encoded(Image.new("RGB", (9, 9)), "PPM"), "unsupported format"),
        (png(20_000, 20_000, 8, 2, b""), "too many pixels"),
        (png(10_000, 8_000, 8, 2, b""), "too many pixels"),
        (png(60_000, 1, 8, 2, b""), "extreme shape"),
        (png(0, 5, 8, 2, b""), "damaged image"),
        (png(9, 9, 8, 2, b"\0" * 30), "damaged image"),
    ],
)
def test_reasons(data: bytes, expected: str) -> None:
    assert reason(data) == expected
    assert expected in REASONS


def test_pixel_limit_is_inclusive() -> None:
    data = encoded(Image.new("RGB", (10, 10)), "PNG")
    assert decode(data, "id", max_pixels=100).size == (10, 10)
    assert reason(data, max_pixels=99) == "too many pixels"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_truncated_file_is_refused_unless_all_its_pixels_are_there(format: str) -> None:
    data = encoded(Image.fromarray(COLOUR), format)
    whole = pixels(data)
    for size in range(len(data)):
        try:
            assert np.array_equal(pixels(data[:size]), whole)
        except BadSample as bad:
            assert bad.reason in ("empty file", "not an image", "damaged image")
        else:
            assert size >= len(data) - 24  # only end marks, checksums and padding are missing


def test_bombs_take_no_memory() -> None:
    """Headers that promise 16,383² pixels and more are refused before anything of that size is touched."""
    side = 16_000
    jpeg = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", side, side)
    gif = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    bmp = bytearray(encoded(Image.new("RGB", (8, 8)), "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    webp = bytearray(
        encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "WEBP", exif=b"Exif\0\0", lossless=True)
    )
    webp[24:30] = struct.pack("<I", side - 1)[:3] * 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = [reason(bytes(data)) for data in (png(side, side, 8, 2, b""), jpeg, gif, bmp, webp)]
    assert set(found) <= {"too many pixels", "damaged image"}
    assert found[:4] == ["too many pixels"] * 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, on which decoders and scales can differ."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return Image.fromarray(
        np.clip(np.asarray(coarse) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
    )


JPEGS = {
    "plain": {"quality": 85},
    "4:4:4": {"quality": 90, "subsampling": 0},
    "4:2:2": {"quality": 60, "subsampling": 1},
    "progressive": {"quality": 95, "progressive": True},
    "rgb": {"quality": 90, "keep_rgb": True},
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("size", [(64, 48), (61, 47), (17, 9)])
def test_simplejpeg_gives_the_same_pixels(kind: str, size: tuple[int, int]) -> None:
    for orientation in (1, 3, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(photo(*size), "JPEG", exif=exif, **JPEGS[kind])
        other = np.asarray(decode(data, "id", decoder="simplejpeg"))
        assert np.array_equal(other, pixels(data))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_simplejpeg_leaves_other_colours_to_pillow(mode: str) -> None:
    data = encoded(photo(40, 30).convert(mode), "JPEG")
    assert np.array_equal(np.asarray(decode(data, "id", decoder="simplejpeg")), pixels(data))


def test_simplejpeg_refuses_what_pillow_refuses_and_no_more() -> None:
    data = encoded(photo(40, 30), "JPEG")
    for size in range(0, len(data), 7):
        for decoder in ("pillow", "simplejpeg"):
            with pytest.raises(BadSample):
                decode(data[:size], "id", decoder=decoder)
    stray = data[:-2] + bytes(9) + data[-2:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(stray)
    assert np.array_equal(np.asarray(decode(stray, "id", decoder="simplejpeg")), pixels(stray))
    other = encoded(Image.fromarray(COLOUR), "PNG")
    assert np.array_equal(np.asarray(decode(other, "id", decoder="simplejpeg")), COLOUR)


def test_simplejpeg_takes_no_memory_for_a_size_that_was_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(40, 30), "JPEG")
    monkeypatch.setattr("simplejpeg.decode_jpeg_header", lambda _: (60_000, 60_000, "YCbCr", "420"))
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: pytest.fail("it was asked to decode"))
    assert np.array_equal(np.asarray(decode(data, "id", decoder="simplejpeg")), pixels(data))


def test_a_decoder_that_is_not_installed_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install simplejpeg"):
        decode(encoded(photo(9, 9), "JPEG"), "id", decoder="simplejpeg")
    check_decoder("pillow")


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@given(
    size=st.tuples(st.integers(16, 300), st.integers(16, 300)),
    factor=st.floats(0.1, 9),
    orientation=st.sampled_from([1, 6]),
)
@settings(max_examples=40)
def test_a_shrunk_jpeg_is_never_smaller_than_asked(
    decoder: Decoder, size: tuple[int, int], factor: float, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(*size), "JPEG", exif=exif)
    upright = decode(data, "id").size
    asked: list[tuple[int, int]] = []

    def shrink(size: tuple[int, int]) -> float:
        asked.append(size)
        return factor

    found = decode(data, "id", decoder=decoder, shrink=shrink)
    assert asked == [upright], "the size is that of the upright image"
    assert all(side / max(factor, 1) <= new <= side for side, new in zip(upright, found.size, strict=True))
    if factor < 2:
        assert np.array_equal(np.asarray(found), pixels(data)), "not one bit changes below the first scale"


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_a_shrunk_jpeg_shows_the_same_picture(decoder: Decoder) -> None:
    image = photo(640, 480)
    data = encoded(image, "JPEG", quality=90)
    small = decode(data, "id", decoder=decoder, shrink=lambda size: 2.1)
    assert small.size == (320, 240)
    whole = np.asarray(decode(data, "id").resize((112, 112), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(small.resize((112, 112), Image.Resampling.BICUBIC)) - whole).mean() < 1
    other = encoded(image, "PNG")
    assert decode(other, "id", decoder=decoder, shrink=lambda size: 2.1).size == (640, 480)


@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"]), st.binary(max_size=200)
)
def test_rubbish_is_a_bad_sample(head: bytes, rest: bytes) -> None:
    assert reason(head + rest) in REASONS


def test_a_bad_sample_survives_pickling() -> None:
    with pytest.raises(BadSample) as caught:
        decode(b"hello", "x")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.id, copy.reason, copy.detail) == ("x", "not an image", caught.value.detail)

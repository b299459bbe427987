"""Pictures whose pixels are whole although what surrounds them is odd, and formats that few data sets are made of."""

import resource
import struct
import sys
import time
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from kit.pictures import encoded, noise
from threetowers.data.avif import coded_sizes
from threetowers.data.decode import decode
from threetowers.data.metadata import without_metadata
from threetowers.data.open import open_source
from threetowers.errors import BadSample

PICTURE = noise(37, 21)


def pixels(data: bytes, **options: Any) -> np.ndarray:
    return np.asarray(decode(data, "id", **options))


def refused(data: bytes, **options: Any) -> BadSample:
    with pytest.raises(BadSample) as caught:
        decode(data, "id", **options)
    return caught.value


def turned(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(kind: bytes, content: bytes, wrong: bool = False) -> bytes:
    checksum = zlib.crc32(kind + content) ^ wrong
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


LARGE = b"Comment\0\0" + zlib.compress(b"x" * 3_000_000)
CHUNKS = {
    "a text above 1 MiB": chunk(b"zTXt", LARGE),
    "a text in UTF-8 above 1 MiB": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000)),
    "texts above 64 MiB": chunk(b"tEXt", b"a\0" + b"x" * 1_000_000) * 70,
    "a colour profile above 1 MiB": chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(3_000_000))),
    "a colour profile without a name": chunk(b"iCCP", b"icc"),
    "a text packed in an unknown way": chunk(b"zTXt", b"Comment\0\7x"),
    "a wrong checksum": chunk(b"tEXt", b"a\0b", wrong=True),
    "a gamma of two bytes": chunk(b"gAMA", b"\0\1"),
    "an animation that is none": chunk(b"acTL", b"\0"),
}  # fmt: skip


@pytest.mark.parametrize("place", ["before the pixels", "behind the pixels"])
@pytest.mark.parametrize("what", CHUNKS)
def test_odd_chunks_of_a_png_cost_no_pixel(what: str, place: str) -> None:
    whole = encoded(PICTURE, "PNG", exif=turned())
    at = whole.index(b"IDAT") - 4 if place == "before the pixels" else len(whole) - 12
    data = whole[:at] + CHUNKS[what] + whole[at:]
    assert np.array_equal(pixels(data), pixels(whole)), "the orientation counts too"


def test_a_second_exif_block_with_a_wrong_checksum_does_not_hide_the_first() -> None:
    whole = encoded(PICTURE, "PNG", exif=turned())
    data = whole[:33] + chunk(b"eXIf", b"MM\0*\0\0\0\x08", wrong=True) + whole[33:]
    assert np.array_equal(pixels(data), pixels(whole))


def test_a_text_that_pillow_wrote_itself() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    assert np.array_equal(pixels(encoded(PICTURE, "PNG", pnginfo=info)), np.asarray(PICTURE))


SEGMENTS = {
    "a JFIF head of four bytes": segment(0xE0, b"JFIF"),
    "an Adobe mark that ends early": segment(0xEE, b"Adobe\0"),
    "a colour profile without a number": segment(0xE2, b"ICC_PROFILE\0"),
    "an index of frames that points nowhere": segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\1\xb0\1\0\4\0\0\0\1\0\0\0\2"),
    "EXIF that is rubbish": segment(0xE1, b"Exif\0\0rubbish"),
    "XMP that is rubbish": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"\xff" * 90),
    "Photoshop's block, cut": segment(0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\0\1x"),
}  # fmt: skip


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("what", SEGMENTS)
def test_odd_segments_of_a_jpeg_cost_no_pixel(what: str, decoder: str) -> None:
    whole = encoded(PICTURE, "JPEG")
    data = whole[:2] + SEGMENTS[what] + whole[2:]
    assert np.array_equal(pixels(data, decoder=decoder), pixels(whole))


def test_the_orientation_of_a_jpeg_with_odd_segments_counts() -> None:
    whole = encoded(PICTURE, "JPEG", exif=turned())
    assert np.array_equal(
        pixels(whole[:2] + SEGMENTS["a JFIF head of four bytes"] + whole[2:]), pixels(whole)
    )


def test_damage_behind_the_first_frame_costs_no_pixel() -> None:
    for format, cut in (("MPO", 100), ("GIF", 300), ("WEBP", 300), ("TIFF", 300)):
        options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
        data = encoded(noise(37, 21), format, save_all=True, append_images=[noise(37, 21, 1)], **options)
        assert np.array_equal(pixels(data[:-cut]), pixels(data)), format
        assert np.array_equal(pixels(data + bytes(5_000)), pixels(data)), f"{format} with trailing bytes"


@pytest.mark.parametrize("cut", [1, 8, 40])
def test_metadata_of_a_webp_that_are_cut_cost_no_pixel(cut: int) -> None:
    data = encoded(PICTURE, "WEBP", lossless=True, exif=turned(), xmp=b"<x/>" * 20)
    assert np.array_equal(pixels(data[:-cut]), pixels(data))


def test_a_jpeg_without_its_end_mark_is_whole_and_one_with_a_missing_byte_is_not() -> None:
    for image in (PICTURE, Image.new("RGB", (64, 48), (200, 40, 30)), noise(9, 9).resize((80, 60))):
        for options in (
            {},
            {"quality": 20},
            {"subsampling": 0, "restart_marker_blocks": 1},
            {"restart_marker_rows": 1},
            {"progressive": True},
        ):
            data = encoded(image, "JPEG", **options)
            for size in range(len(data) - 60, len(data)):
                try:
                    found = pixels(data[:size])
                except BadSample as bad:
                    assert bad.reason == "damaged image"
                    assert size < len(data) - 2
                else:
                    assert np.array_equal(found, pixels(data))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG", "AVIF"])
def test_missing_pixels_stay_damage(format: str) -> None:
    data = encoded(noise(64, 48), format, exif=turned())
    for size in range(len(data) // 4, len(data) * 3 // 4, 101):
        assert refused(data[:size]).reason == "damaged image"


def test_metadata_that_unpack_to_hundreds_of_megabytes_take_no_memory() -> None:
    whole = encoded(PICTURE, "PNG")
    packer = zlib.compressobj()
    packed = b"".join([packer.compress(bytes(10_000_000)) for _ in range(20)] + [packer.flush()])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    heads = {
        b"zTXt": (b"a\0\0", b"Raw profile type exif\0\0"),
        b"iTXt": (b"a\0\1\0\0\0",),
        b"iCCP": (b"a\0\0",),
    }
    for kind, head in ((kind, head) for kind, heads in heads.items() for head in heads):
        bomb = whole[:33] + chunk(kind, head + packed) * 3 + whole[33:]
        assert np.array_equal(pixels(bomb), np.asarray(PICTURE))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_files_that_are_long_to_take_apart_are_soon_done() -> None:
    """A JPEG of fill bytes, and an AVIF whose items have all bytes of the file again and again."""
    extents = struct.pack(">HHH", 1, 0, 60_000) + struct.pack(">II", 0, 1_000_000) * 60_000
    table = struct.pack(">IBBH", 0, 0x44, 0, 1) + extents
    box = struct.pack(">I4s", len(table) + 8, b"iloc") + table
    meta = struct.pack(">I4sI", len(box) + 12, b"meta", 0) + box
    with pytest.raises(ValueError, match="share their bytes"):
        coded_sizes(b"\0\0\0\x10ftypavif\0\0\0\0" + meta + bytes(1_000_000))
    begun = time.monotonic()
    assert not list(without_metadata(b"\xff\xd8" + b"\xff" * 20_000_000))
    assert time.monotonic() - begun < 5


COMPRESSIONS = ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_tiff(mode: str, compression: str) -> None:
    image = (
        PICTURE.convert(mode)
        if mode != "I;16"
        else Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) << 8)
    )
    if mode == "RGBA":
        image.putalpha(0)
    expected = {"RGBA": Image.new("RGB", PICTURE.size, "white"), "I;16": PICTURE.convert("L").convert("RGB")}
    found = pixels(encoded(image, "TIFF", compression=compression))
    assert np.array_equal(found, np.asarray(expected[mode] if mode in expected else image.convert("RGB")))


def test_tiff_upright_first_page_and_large_offsets() -> None:
    upright = np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270))
    for compression in COMPRESSIONS:
        assert np.array_equal(
            pixels(encoded(PICTURE, "TIFF", exif=turned(), compression=compression)), upright
        )
    pages = encoded(PICTURE, "TIFF", save_all=True, append_images=[noise(9, 9)])
    for data in (pages, encoded(PICTURE, "TIFF", big_tiff=True)):
        assert np.array_equal(pixels(data), np.asarray(PICTURE))


def test_avif_upright_transparent_and_first_frame() -> None:
    best = {"quality": 100, "subsampling": "4:4:4"}
    plain = encoded(PICTURE, "AVIF", **best)
    assert np.abs(pixels(plain).astype(int) - np.asarray(PICTURE)).max() < 8
    upright = np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(pixels(encoded(PICTURE, "AVIF", exif=turned(), **best)) - upright).max() < 8
    clear = PICTURE.convert("RGBA")
    clear.putalpha(0)
    assert pixels(encoded(clear, "AVIF", **best)).min() == 255
    frames = encoded(PICTURE, "AVIF", save_all=True, append_images=[noise(37, 21, 1)], **best)
    assert np.abs(pixels(frames).astype(int) - np.asarray(PICTURE)).max() < 8
    odd = encoded(PICTURE, "AVIF", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", **best).replace(b"MM\0*", b"zzzz")
    assert np.array_equal(pixels(odd), pixels(plain)), "EXIF that is rubbish"


def test_a_header_never_hides_the_size_of_what_is_decoded() -> None:
    """An AVIF of 3,000² pixels that says 8 × 8, and a TIFF of 8 × 8 whose tile has 2.5 billion."""
    avif = bytearray(encoded(Image.new("L", (3_000, 3_000), 9), "AVIF", speed=10))
    place = avif.index(b"ispe") + 8
    avif[place : place + 8] = struct.pack(">II", 8, 8)
    assert coded_sizes(bytes(avif)) == [(3_000, 3_000)]
    tags = [
        (256, 8),
        (257, 8),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, 50_000),
        (323, 50_000),
        (324, 200),
        (325, 99),
    ]
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    tiff += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (bytes(avif), tiff.ljust(200, b"\0") + zlib.compress(bytes(90))):
        assert refused(data, max_pixels=1_000_000).reason == "too many pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC; pip install 'threetowers[heif]', or convert it"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC; pip install 'threetowers[heif]', or convert it"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "a video; convert it to JPEG or PNG"),
        (encoded(PICTURE, "JPEG2000"), "JPEG 2000; convert it"),
        (b"\xff\x0a\x12", "JPEG XL; convert it"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg">', "SVG; convert it"),
        (encoded(PICTURE, "TIFF", compression="lzma"), "TIFF with compression lzma, mode RGB; save it as PNG"),
        (encoded(PICTURE.convert("F"), "TIFF"), "mode F; save it as PNG"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)  # fmt: skip
def test_formats_that_are_not_read_are_named_with_what_to_do(
    data: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    bad = refused(data)
    assert bad.reason == "unsupported format" and words in bad.detail


def test_heic_is_read_by_the_plugin_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def register() -> None:
        monkeypatch.setitem(
            Image.OPEN, "HEIF", (lambda *_: PICTURE.copy(), lambda head: head[8:12] == b"heic")
        )

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "pillow_heif")
    assert np.array_equal(pixels(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), np.asarray(PICTURE))


def test_endings_of_what_is_read_make_a_sample(tmp_path: Any) -> None:
    formats = {"jfif": "JPEG", "jpe": "JPEG", "tif": "TIFF", "TIFF": "TIFF", "avif": "AVIF", "png": "PNG"}
    for ending, format in formats.items():
        (tmp_path / f"{ending}_.{ending}").write_bytes(encoded(PICTURE, format))
        (tmp_path / f"{ending}_.txt").write_text(f"a picture in {format}")
    source = open_source(str(tmp_path))
    assert len(source) == len(formats) and not source.problems
    for index in range(len(source)):
        assert decode(source.image(index), "id").size == PICTURE.size

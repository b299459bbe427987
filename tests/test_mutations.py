"""Many damaged images, tars and weight files: each is read whole, or gives a named bad sample or an error.

The counts are printed; `pytest -s tests/test_mutations.py` shows them.
"""

import io
import json
import random
import re
import resource
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from kit.pictures import encoded
from threetowers.data.decode import MAX_SIDE_RATIO, REASONS, decode
from threetowers.data.open import open_source
from threetowers.data.source import Source
from threetowers.errors import BadSample, CheckpointError, DataError
from threetowers.towers.weights import read_safetensors

BLOCK = 512
COUNTS = [1_000, pytest.param(100_000, marks=pytest.mark.slow)]


def originals() -> list[bytes]:
    """Every format and the kinds of it that decode along ways of their own."""
    y, x = np.mgrid[:21, :37]
    image = Image.fromarray(np.stack([x * 6, y * 11, x + y], -1).astype(np.uint8))
    alpha, exif = image.convert("RGBA"), Image.Exif()
    exif[0x0112] = 6
    frames = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    return [
        encoded(image, "JPEG", exif=exif),
        encoded(image, "JPEG", progressive=True, subsampling=0),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image.convert("L"), "JPEG"),
        encoded(alpha, "PNG", exif=exif),
        encoded(image.quantize(9), "PNG"),
        encoded(alpha, "WEBP", exif=exif),
        encoded(image, "WEBP", lossless=True),
        encoded(image, "GIF"),
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        encoded(image, "BMP"),
        encoded(alpha, "AVIF", exif=exif),
        encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:]),
        encoded(image, "TIFF", exif=exif),
        encoded(alpha, "TIFF", compression="tiff_adobe_deflate"),
        encoded(image, "TIFF", compression="jpeg"),
        encoded(image.quantize(9), "TIFF", compression="tiff_lzw"),
    ]


def flip(data: bytes, other: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def truncate(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def splice(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """The beginning of one file and the end of another, of the same format or of another one."""
    return data[: draw.randrange(len(data))] + other[draw.randrange(len(other)) :]


def header(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Numbers of the header set to extremes, where sizes, lengths and counts stand."""
    out = bytearray(data)
    place = draw.randrange(min(len(out), 200))
    width = draw.choice((1, 2, 4))
    value = draw.choice((0, 1, 0x7F, 0xFF, draw.randrange(256)))
    out[place : place + width] = bytes([value]) * width
    return bytes(out)


def shift(data: bytes, other: bytes, draw: random.Random) -> bytes:
    place, length = draw.randrange(len(data)), draw.randint(1, 20)
    if draw.random() < 0.5:
        return data[:place] + data[place + length :]
    return data[:place] + draw.randbytes(length) + data[place:]


MUTATIONS: list[Callable[[bytes, bytes, random.Random], bytes]] = [flip, truncate, splice, header, shift]


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_images_are_images_or_bad_samples(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever decoder and scale: upright RGB of a checked size, or BadSample with a reason of the list."""
    whole, draw = originals(), random.Random(count)
    outcomes: Counter[str] = Counter()
    for index in range(count):
        mutate = MUTATIONS[index % len(MUTATIONS)]
        data = mutate(whole[index // len(MUTATIONS) % len(whole)], draw.choice(whole), draw)
        results = set()
        for options in ({}, {"decoder": "simplejpeg"}, {"decoder": "simplejpeg", "shrink": lambda _: 2.5}):
            try:
                image = decode(data, "id", max_pixels=100_000, **options)  # type: ignore[arg-type]
            except BadSample as bad:
                assert bad.reason in REASONS, bad
                results.add(bad.reason)
            else:
                assert image.mode == "RGB"
                assert image.width * image.height <= 100_000
                assert max(image.size) <= MAX_SIDE_RATIO * min(image.size)
                results.add("image")
        assert len(results) == 1, f"{mutate.__name__} {index}: the decoders disagree: {results}"
        outcomes[results.pop()] += 1
    with capsys.disabled():
        print(f"\n{count:,} mutated images: {dict(outcomes.most_common())}")
    assert outcomes["image"] > count / 20
    assert outcomes["damaged image"] > count / 5


def shard(format: int) -> tuple[bytes, list[tuple[int, int]]]:
    """A tar of seven samples, and from where to where each lies in it, its headers and padding included."""
    buffer, extents = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for i in range(7):
            begin = buffer.tell()
            name = f"{i:04d}" + ("x" * 110 if i % 3 == 2 and format != tarfile.USTAR_FORMAT else "")
            image = encoded(Image.new("RGB", (9 + i, 8), (20 * i, 5, 5)), "PNG")
            text = (
                ("json", json.dumps({"caption": f"thing {i}"}).encode())
                if i % 2
                else ("txt", b"thing %d" % i)
            )
            for ending, content in (("png", image), text):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size, member.mtime = len(content), 1700000000.25  # type: ignore[assignment]
                tar.addfile(member, io.BytesIO(content))
            extents.append((begin, buffer.tell()))
    return buffer.getvalue(), extents


def contents(source: Source) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    records = [source.record(index) for index in range(len(source))]
    return {record.id: (source.image(index), record.captions) for index, record in enumerate(records)}


def mutated_tar(data: bytes, draw: random.Random) -> tuple[str, bytes, np.ndarray]:
    """What was done, the damaged tar, and for each of its bytes the place it had before, or -1 when it is new."""
    out, origin = bytearray(data), np.arange(len(data))
    place, length = draw.randrange(len(data)), draw.randint(1, 3_000)
    length += length % BLOCK == 0  # whole blocks taken out or put in make a sound tar of other members
    kind = draw.choice(("flip", "flips", "truncate", "insert", "delete", "splice", "header", "zeros"))
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else draw.randint(2, 40)):
            place = draw.randrange(len(out))
            out[place] ^= 1 << draw.randrange(8)
            origin[place] = -1
    elif kind == "truncate":
        out, origin = out[:place], origin[:place]
    elif kind == "insert":
        out[place:place] = draw.randbytes(length)
        origin = np.insert(origin, place, np.full(length, -1))
    elif kind == "delete":
        del out[place : place + length]
        origin = np.delete(origin, slice(place, place + length))
    elif kind == "splice":  # some blocks are overwritten by others of the same tar
        source, target = (draw.randrange(len(out) // BLOCK) * BLOCK for _ in range(2))
        size = min(draw.randint(1, 4) * BLOCK, len(out) - max(source, target))
        out[target : target + size] = data[source : source + size]
        origin[target : target + size] = origin[source : source + size].copy()
    elif kind == "zeros":
        block = place // BLOCK * BLOCK
        out[block : block + BLOCK] = bytes(BLOCK)
        origin[block : block + BLOCK] = -1
    else:
        start = draw.choice(
            [at - 257 for at in range(257, len(data), BLOCK) if data[at : at + 5] == b"ustar"]
        )
        field = draw.choice((range(100), range(100, 108), range(124, 136), range(156, 157), range(257, 265)))
        at = start + draw.choice(field)
        out[at] = draw.choice(b"0123456789xgLKS \0\xff")
        if draw.random() < 0.5:  # a header that is wrong and says that it is right
            total = sum(out[start : start + BLOCK]) - sum(out[start + 148 : start + 156]) + 8 * 32
            out[start + 148 : start + 156] = b"%06o\0 " % total
        origin[start : start + BLOCK] = -1
    return kind, bytes(out), origin


def is_intact(origin: np.ndarray, begin: int, end: int) -> bool:
    """Whether a sample's bytes still stand together and at a block's start."""
    starts = np.flatnonzero(origin == begin)
    wanted = np.arange(begin, end)
    return any(
        start % BLOCK == 0 and np.array_equal(origin[start : start + end - begin], wanted) for start in starts
    )


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_tars_give_every_intact_sample_or_an_error(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No other exception, and no sample lost without a word; whole blocks show in the count of `_stats.json`."""
    path, stats = tmp_path / "s.tar", tmp_path / "s_stats.json"
    cases = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data, extents = shard(format)
        path.write_bytes(data)
        expected = contents(open_source(str(path)))
        assert len(expected) == len(extents)
        cases.append((data, extents, expected))
    draw = random.Random(count)
    outcomes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for index in range(count):
        data, extents, expected = cases[index % len(cases)]
        kind, damaged, origin = mutated_tar(data, draw)
        path.write_bytes(damaged)
        try:
            source = open_source(str(path))
        except DataError:
            outcomes["error"] += 1
            kinds[kind] += 1
            continue
        found = contents(source)
        named = {problem.id for problem in source.problems}
        lost = [
            id
            for (begin, end), (id, content) in zip(extents, expected.items(), strict=True)
            if is_intact(origin, begin, end) and found.get(id) != content and id not in named
        ]
        # a header forged with its checksum may swallow the members behind it
        assert not lost or kind == "header", f"{index}: {kind}: {lost} were lost without a word"
        missing = len(expected) - len(found)
        if lost or (missing > 0 and not source.problems):
            # whole blocks changed so that what is left is a sound tar of fewer members: only the count can tell
            assert kind in ("header", "splice", "zeros"), (
                f"{index}: {kind}: {missing} are missing without a word"
            )
            stats.write_text(json.dumps({"successes": len(expected)}), encoding="utf-8")
            with pytest.raises(DataError, match=r"expected 7 images by s_stats.json, found"):
                open_source(str(path))
            stats.unlink()
            outcomes["error by the count beside it"] += 1
            continue
        outcomes["opened, whole" if not missing else "opened, each lost sample named"] += 1
    with capsys.disabled():
        print(f"\n{count:,} mutated tars: {dict(outcomes.most_common())}, errors by damage {dict(kinds)}")
    assert min(outcomes["error"], outcomes["opened, whole"]) > count / 10


def weights_file() -> bytes:
    tensors = {
        "trunk.weight": torch.arange(600, dtype=torch.float32).reshape(6, 100),
        "trunk.bias": torch.arange(6, dtype=torch.float16),
        "position": torch.arange(7),
        "empty": torch.zeros(0, 3),
    }
    return safetensors.torch.save(tensors, {"format": "pt"})


def mutated_weights(data: bytes, draw: random.Random) -> bytes:
    """Damage anywhere, or where it hurts: the header's length, and numbers and words of the header."""
    kind = draw.choice((flip, flip, truncate, splice, "length", "number", "word"))
    if not isinstance(kind, str):
        return kind(data, data, draw)
    if kind == "length":
        length = draw.choice((0, 1, len(data), 2**31, 2**63, 2**64 - 1, draw.randrange(len(data))))
        return length.to_bytes(8, "little") + data[8:]
    size = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + size]
    old, new = (
        (rb"\d+", draw.choice((b"0", b"1", b"-1", b"99999999999999999999", b"2e9", b"4294967296")))
        if kind == "number"
        else (rb"F32|F16|I64|shape|dtype|data_offsets|trunk", draw.choice((b"F64", b"BOOL", b"x", b"shape", b"\xff")))
    )  # fmt: skip
    found = draw.choice(list(re.finditer(old, head)))
    head = head[: found.start()] + new + head[found.end() :]
    return len(head).to_bytes(8, "little") + head + data[8 + size :]


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_safetensors_give_whole_tensors_or_an_error(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every byte behind the header is in a tensor that is given, or the file is refused by name."""
    path, whole = tmp_path / "w.safetensors", weights_file()
    draw = random.Random(count)
    outcomes: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        data = mutated_weights(whole, draw)
        path.write_bytes(data)
        try:
            tensors = read_safetensors(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            outcomes["error"] += 1
            continue
        size = int.from_bytes(data[:8], "little")
        assert sum(value.nbytes for value in tensors.values()) == len(data) - 8 - size
        outcomes["whole" if data == whole else "readable, other content"] += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    with capsys.disabled():
        print(f"\n{count:,} mutated safetensors: {dict(outcomes.most_common())}")
    assert min(outcomes["error"], outcomes["readable, other content"]) > count / 10

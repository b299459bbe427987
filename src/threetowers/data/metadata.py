"""Image files without their metadata, for files whose pixels are whole although what stands beside them is odd.

Nothing here decodes pixels. What is taken out: texts, colour profiles, thumbnails, further frames and trailing bytes.
"""

import re
import struct
import zlib
from collections.abc import Iterator

_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"ANMF")
_WEBP_ALPHA_AND_ANIMATION, _WEBP_EXIF = 0x12, 0x08  # flags of VP8X
_AVIF_ITEM = re.compile(rb"(infe\x02.{7})(?:Exif|mime)", re.DOTALL)


def without_metadata(data: bytes) -> Iterator[bytes]:
    """The file without metadata: first with its EXIF block, which holds the orientation, then without.

    Nothing for formats that are not taken apart here, and for files whose parts cannot be told.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        take = _png
    elif data.startswith(b"\xff\xd8"):
        take = _jpeg
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        take = _webp
    elif data[4:8] == b"ftyp":
        take = _avif
    else:
        return
    for exif in (True, False):
        found = take(data, exif)
        if found:
            yield found


def has_one_scan(jpeg: bytes) -> bool:
    """Whether all pixels of a JPEG are in one sequential scan without restarts."""
    components = 0
    for marker, start, _ in _segments(jpeg) if jpeg.startswith(b"\xff\xd8") else ():
        if marker == 0xDD:  # a restart interval, at whose markers a scan can be cut
            return False
        if marker in (0xC0, 0xC1):
            components = int.from_bytes(jpeg[start + 9 : start + 10])
        if marker == 0xDA:
            return components == int.from_bytes(jpeg[start + 4 : start + 5]) > 0
    return False


def _png(data: bytes, exif: bool) -> bytes:
    kept, start = [data[:8]], 8
    while start + 8 <= len(data):
        kind = data[start + 4 : start + 8]
        end = start + 12 + int.from_bytes(data[start : start + 4])
        sound = zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
        has_exif = kind == b"eXIf" or data[start + 8 : start + 29] == b"Raw profile type exif"
        if kind in _PNG_PIXELS or (exif and has_exif and sound):
            kept.append(data[start:end])
        if kind == b"IEND":
            break
        start = end
    return b"".join(kept)


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of every segment up to the first scan, whose end is the file's."""
    start = 2
    while jpeg[start : start + 1] == b"\xff" and start + 4 <= len(jpeg):
        marker = jpeg[start + 1]
        if marker in (0x01, 0xFF, *range(0xD0, 0xD9)):  # fill bytes, and markers without content
            start += 1 if marker == 0xFF else 2
            continue
        end = len(jpeg) if marker == 0xDA else start + 2 + int.from_bytes(jpeg[start + 2 : start + 4])
        yield marker, start, end
        start = max(end, start + 2)


def _jpeg(data: bytes, exif: bool) -> bytes:
    """Of the segments for applications those stay that say which colours the pixels are in."""
    kept = [data[:2]]
    for marker, start, end in _segments(data):
        head = data[start + 4 : start + 10]
        colours = (marker == 0xE0 and head[:5] == b"JFIF\0" and end - start >= 16) or (
            marker == 0xEE and head[:5] == b"Adobe" and end - start >= 16
        )
        if (
            colours
            or (exif and marker == 0xE1 and head == b"Exif\0\0")
            or not (0xE0 <= marker <= 0xEF or marker == 0xFE)
        ):
            kept.append(data[start:end])
    return b"".join(kept)


def _webp(data: bytes, exif: bool) -> bytes:
    """The first frame alone."""
    chunks: dict[bytes, bytes] = {}
    start = 12
    while start + 8 <= len(data):
        kind, size = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        content = data[start + 8 : start + 8 + size]
        whole = len(content) == size
        if whole and kind in (*_WEBP_PIXELS, b"VP8X", b"ANIM", b"ALPH", b"EXIF") and kind not in chunks:
            chunks[kind] = content
        start += 8 + size + size % 2
    if not exif:
        chunks.pop(b"EXIF", None)
    if b"VP8X" in chunks:
        flags = chunks[b"VP8X"][:1] or b"\0"
        keep = _WEBP_ALPHA_AND_ANIMATION | (_WEBP_EXIF if b"EXIF" in chunks else 0)
        chunks[b"VP8X"] = bytes([flags[0] & keep]) + chunks[b"VP8X"][1:]
    body = b"".join(
        kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
        for kind, content in chunks.items()
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _avif(data: bytes, exif: bool) -> bytes:
    """The items of metadata keep their place and get a type that no reader knows; a rotation is no such item."""
    return b"" if exif else _AVIF_ITEM.sub(rb"\1free", data)

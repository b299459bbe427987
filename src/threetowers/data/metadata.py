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
_FILL, _MARKER, _RESTART = (
    re.compile(rb"\xff+"),
    re.compile(rb"\xff[^\x00\xff\xd0-\xd7]"),
    re.compile(rb"\xff[\xd0-\xd7]"),
)
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


def has_all_scans(jpeg: bytes) -> bool:
    """Whether a JPEG has all scans and restart markers that its pixels need; its last interval may be cut.

    A progressive one has several scans for each component, until every coefficient is there to its last bit.
    """
    missing: dict[int, list[int]] = {}  # by component: of every coefficient the bits that no scan has brought
    sampling: dict[int, tuple[int, int]] = {}
    width = height = interval = markers = needed = 0
    try:
        for marker, start, end in _segments(jpeg) if jpeg.startswith(b"\xff\xd8") else ():
            if marker in (0xC0, 0xC1, 0xC2):
                height, width, count = struct.unpack(">HHB", jpeg[start + 5 : start + 10])
                for place in range(start + 10, start + 10 + 3 * count, 3):
                    sampling[jpeg[place]] = divmod(jpeg[place + 1], 16)
                    missing[jpeg[place]] = [16] * 64
            elif marker == 0xDD:
                interval = int.from_bytes(jpeg[start + 4 : start + 6])
            elif marker == 0xDA:
                count = jpeg[start + 4]
                components = list(jpeg[start + 5 : start + 5 + 2 * count : 2])
                first, last, bits = jpeg[start + 5 + 2 * count : start + 8 + 2 * count]
                for component in components:
                    missing[component][first : last + 1] = [bits & 15] * (last + 1 - first)
                across, down = (max(sides) for sides in zip(*sampling.values(), strict=True))
                if len(components) == 1:  # blocks of its own, instead of units of all components
                    own = sampling[components[0]]
                    blocks = -(-width * own[0] // (8 * across)) * -(-height * own[1] // (8 * down))
                else:
                    blocks = -(-width // (8 * across)) * -(-height // (8 * down))
                needed = (blocks - 1) // interval if interval else 0
                markers = len(_RESTART.findall(jpeg, start, end))
    except (IndexError, KeyError, ValueError, struct.error, ZeroDivisionError):
        return False
    return bool(missing) and not any(map(any, missing.values())) and markers >= needed


def _png(data: bytes, exif: bool) -> bytes:
    kept, start = [data[:8]], 8
    while start + 8 <= len(data):
        kind = data[start + 4 : start + 8]
        end = start + 12 + int.from_bytes(data[start : start + 4])
        has_exif = kind == b"eXIf" or data[start + 8 : start + 29] == b"Raw profile type exif"
        if exif and has_exif:  # another one may be sound
            has_exif = zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
        if kind in _PNG_PIXELS or (exif and has_exif):
            kept.append(data[start:end])
        if kind == b"IEND":
            break
        start = end
    return b"".join(kept)


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of every segment; that of a scan ends behind its pixels."""
    start = 2
    while jpeg[start : start + 1] == b"\xff" and start + 4 <= len(jpeg):
        marker = jpeg[start + 1]
        if marker == 0xFF:  # fill bytes
            start = _FILL.match(jpeg, start).end() - 1  # type: ignore[union-attr]
            continue
        if marker in (0x01, *range(0xD0, 0xD9)):  # without content
            start += 2
            continue
        end = max(start + 2 + int.from_bytes(jpeg[start + 2 : start + 4]), start + 4)
        if marker == 0xDA:
            after = _MARKER.search(jpeg, end)
            end = after.start() if after else len(jpeg)
        yield marker, start, end
        start = end


def _jpeg(data: bytes, exif: bool) -> bytes:
    """Of the segments for applications those stay that say which colours the pixels are in."""
    kept = [data[:2]]
    for marker, start, end in _segments(data):
        if marker == 0xDA:
            return b"".join([*kept, data[start:]])
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
    return b""


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

"""The size of the AV1 frames in an AVIF file, which can be larger than its header says.

libavif decodes frames of up to 16,384 × 16,384 pixels whatever size the header states. The layout is that of ISO/IEC
14496-12 (boxes, `iloc`) and of the AV1 specification, sections 5.3 to 5.5 (open bitstream units, sequence header).
"""

from collections.abc import Iterator


def as_still(avif: bytes) -> bytes:
    """An animation as the still picture that it holds beside its frames; any other file as it is."""
    return avif[:8] + b"avif" + avif[12:] if avif[4:12] == b"ftypavis" else avif


def coded_sizes(avif: bytes) -> list[tuple[int, int]]:
    """Width and height of every sequence of frames in the items of an AVIF file; raises ValueError for odd items."""
    sizes = [_sequence_size(unit) for item in _items(avif) for kind, unit in _units(item) if kind == 1]
    if not sizes:
        raise ValueError("an AVIF without a sequence header")
    return sizes


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    start = 0
    while start + 8 <= len(data):
        size, header = int.from_bytes(data[start : start + 4]), 8
        if size == 1:
            size, header = int.from_bytes(data[start + 8 : start + 16]), 16
        end = start + size if size else len(data)
        yield data[start + 4 : start + 8], data[start + header : end]
        start = max(end, start + header)


def _items(avif: bytes) -> Iterator[bytes]:
    """The content of every item, in the file or in the box `idat`."""
    boxes = dict(_boxes(next((content[4:] for kind, content in _boxes(avif) if kind == b"meta"), b"")))
    table = boxes.get(b"iloc", b"")
    place = taken = 0

    def number(size: int) -> int:
        nonlocal place
        place += size
        return int.from_bytes(table[place - size : place])

    version = number(4) >> 24
    sizes = number(2)
    offset_size, length_size, base_size, index_size = (
        sizes >> 12,
        sizes >> 8 & 15,
        sizes >> 4 & 15,
        sizes & 15,
    )
    for _ in range(number(4 if version == 2 else 2)):
        if place >= len(table):
            return
        number(4 if version == 2 else 2)
        method = number(2) & 15 if version else 0
        if method > 1:
            raise ValueError("an item of AVIF that is made of other items")
        number(2)
        base, parts = number(base_size), []
        for _ in range(min(number(2), len(table))):
            number(index_size if version else 0)
            start, length = base + number(offset_size), number(length_size)
            taken += min(length or len(avif), len(avif))
            if taken > 2 * len(avif):
                raise ValueError("items of AVIF that share their bytes")
            parts.append(
                (boxes.get(b"idat", b"") if method else avif)[start : start + length if length else None]
            )
        yield b"".join(parts)


def _units(item: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of the open bitstream units; an item of another kind has one without a size, or none."""
    start = 0
    while start < len(item):
        head, size, shift = item[start], 0, 0
        start += 2 if head & 4 else 1
        if not head & 2:
            yield head >> 3 & 15, item[start:]
            return
        while start < len(item) and shift < 56:
            byte = item[start]
            size, shift, start = size | (byte & 127) << shift, shift + 7, start + 1
            if byte < 128:
                break
        yield head >> 3 & 15, item[start : start + size]
        start += size


def _sequence_size(header: bytes) -> tuple[int, int]:
    bits, place = "".join(f"{byte:08b}" for byte in header[:64]).ljust(512, "0"), 3

    def take(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    take(1)
    if take(1):  # a still picture with the reduced header
        take(5)
    else:
        if take(1):
            raise ValueError("an AV1 frame with timing information")
        delays = take(1)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if delays and take(1):
                take(4)
    width_bits, height_bits = take(4) + 1, take(4) + 1
    return take(width_bits) + 1, take(height_bits) + 1

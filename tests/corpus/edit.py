"""Make pictures that no tool of `make.sh` makes: `python -m tests.corpus.edit COMMAND ARGUMENTS`."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

Box = tuple[bytes, bytes]


def without_adobe(source: str, target: str) -> None:
    """Remove the APP14 segment of a JPEG, which says how its colours are stored."""
    _write(target, _without_segments(_read(source), 0xEE))


def without_huffman_tables(source: str, target: str) -> None:
    """Remove the tables that motion JPEG leaves out: those of ISO/IEC 10918-1, K.3, are meant."""
    _write(target, _without_segments(_read(source), 0xC4))


def _without_segments(jpeg: bytes, marker: int) -> bytes:
    result, at = jpeg[:2], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        if jpeg[at + 1] != marker:
            result += jpeg[at:end]
        at = end
    return result + jpeg[at:]


def mpf(source: str, second: str, target: str) -> None:
    """Append a second image, listed in the first one's MPF segment (CIPA DC-007), as phones do."""
    first, other = _read(source), _read(second)
    # Entries: size, offset from the MPF header; the first has offset 0.
    entries = 8 + 2 + 3 * 12 + 4
    header = b"MM\0*" + struct.pack(">IH", 8, 3)
    header += struct.pack(">HHI4s", 0xB000, 7, 4, b"0100")
    header += struct.pack(">HHII", 0xB001, 4, 1, 2)
    header += struct.pack(">HHII", 0xB002, 7, 32, entries) + bytes(4)
    length = 2 + 4 + len(header) + 32
    size = len(first) + 2 + length
    start = 20 + 2 + 2 + 4
    table = struct.pack(">IIIHH", 0x20030000, size, 0, 0, 0)
    table += struct.pack(">IIIHH", 0, len(other), size - start, 0, 0)
    segment = b"\xff\xe2" + struct.pack(">H", length) + b"MPF\0" + header + table
    # After JFIF's segment of 18 bytes.
    _write(target, first[:20] + segment + first[20:] + other)


def exif_last(source: str, target: str) -> None:
    """Move the eXIf chunk of a PNG after the pixels."""
    png, at = _read(source), 8
    chunks = []
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        chunks.append(png[at:end])
        at = end
    moved = [chunk for chunk in chunks if chunk[4:8] == b"eXIf"]
    kept = [chunk for chunk in chunks if chunk not in moved]
    _write(target, png[:8] + b"".join([*kept[:-1], *moved, kept[-1]]))


def top_down(source: str, target: str) -> None:
    """Store the rows of a BMP of 24 bits from the top: the height is negative then."""
    bmp = _read(source)
    start, height = int.from_bytes(bmp[10:14], "little"), int.from_bytes(bmp[22:26], "little")
    row = (len(bmp) - start) // height
    rows = [bmp[start + row * number : start + row * (number + 1)] for number in range(height)]
    _write(target, bmp[:22] + struct.pack("<i", -height) + bmp[26:start] + b"".join(reversed(rows)))


def dng(source: str, target: str) -> None:
    """Write a raw file as cameras do: a thumbnail, and the sensor's values in a sub-directory (DNG 1.4)."""
    thumbnail = Image.open(source).convert("RGB")
    (width, height), pixels = thumbnail.size, thumbnail.tobytes()
    raw = struct.pack("<H", 0x2000) * width * height
    sensor = _directory([
        (254, 4, 1, 0), (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 16), (259, 3, 1, 1),
        (262, 3, 1, 32803), (273, 4, 1, 8 + len(pixels)), (277, 3, 1, 1), (278, 4, 1, height),
        (279, 4, 1, len(raw)), (33421, 3, 2, 0x00020002), (33422, 1, 4, 0x02010100),
    ])  # fmt: skip
    start = 8 + len(pixels) + len(raw)
    preview = _directory([
        (254, 4, 1, 1), (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1),
        (262, 3, 1, 2), (273, 4, 1, 8), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, len(pixels)),
        (330, 4, 1, start), (50706, 1, 4, 0x00000401),
    ])  # fmt: skip
    _write(target, b"II*\0" + struct.pack("<I", start + len(sensor)) + pixels + raw + sensor + preview)


def _directory(entries: list[tuple[int, int, int, int]]) -> bytes:
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<H", len(entries)) + packed + bytes(4)


def heif_transform(source: str, target: str, kind: str, value: str) -> None:
    """Add a rotation or mirroring (ISO/IEC 23008-12, 6.5.10 and 6.5.12) to the only image of a HEIF file."""
    boxes = _boxes(_read(source))
    properties = [(kind.encode(), bytes([int(value)]))]
    _write(target, _edited(boxes, lambda meta, _: _with_properties(meta, [(1, it) for it in properties])))


def heif_grid(source: str, target: str) -> None:
    """Make one image of two that are 128 × 128 pixels: a grid of one row (ISO/IEC 23008-12, 6.6.2.3)."""
    boxes = _boxes(_read(source))
    payload = struct.pack(">BBBBHH", 0, 0, 0, 1, 256, 128)
    boxes.append((b"mdat", payload))

    def edited(meta: list[Box], size: int) -> list[Box]:
        contents = dict(meta)
        contents[b"pitm"] = bytes(4) + struct.pack(">H", 3)
        iinf = contents[b"iinf"]
        item = _box(b"infe", b"\2\0\0\0" + struct.pack(">HH4sB", 3, 0, b"grid", 0))
        # The parts are hidden.
        contents[b"iinf"] = (
            iinf[:4] + struct.pack(">H", 3) + iinf[6:].replace(b"infe\2\0\0\0", b"infe\2\0\0\1")
        )
        contents[b"iinf"] += item
        iloc = contents[b"iloc"]
        entry = struct.pack(">HHIHII", 3, 0, 0, 1, size - len(payload), len(payload))
        contents[b"iloc"] = iloc[:6] + struct.pack(">H", 3) + iloc[8:] + entry
        contents[b"iref"] = bytes(4) + _box(b"dimg", struct.pack(">HHHH", 3, 2, 1, 2))
        return _with_properties(
            list(contents.items()), [(3, (b"ispe", bytes(4) + struct.pack(">II", 256, 128)))]
        )

    _write(target, _edited(boxes, edited))


def _edited(boxes: list[Box], edit: Callable[[list[Box], int], list[Box]]) -> bytes:
    """Return a HEIF file with another `meta` box; `edit` gets its boxes and the size of the source."""
    old = dict(boxes)[b"meta"]
    size = sum(8 + len(content) for _, content in boxes)
    meta = edit(_boxes(old[4:]), size)
    grown = 4 + sum(8 + len(content) for _, content in meta) - len(old)
    meta = [(kind, _moved(content, grown) if kind == b"iloc" else content) for kind, content in meta]
    new = old[:4] + b"".join(_box(*it) for it in meta)
    return b"".join(_box(kind, new if kind == b"meta" else content) for kind, content in boxes)


def _moved(iloc: bytes, grown: int) -> bytes:
    """Return the locations of the items (version 0, 4 bytes each, one extent), which have moved."""
    result = iloc[:8]
    for at in range(8, len(iloc), 18):
        head, start, length = struct.unpack(">10sII", iloc[at : at + 18])
        result += struct.pack(">10sII", head, start + grown, length)
    return result


def _with_properties(meta: list[Box], properties: list[tuple[int, Box]]) -> list[Box]:
    contents = dict(meta)
    iprp = dict(_boxes(contents[b"iprp"]))
    ipma = iprp[b"ipma"]
    associations, at = {}, 8
    for _ in range(int.from_bytes(ipma[4:8])):
        item, count = struct.unpack(">HB", ipma[at : at + 3])
        associations[item] = ipma[at + 3 : at + 3 + count]
        at += 3 + count
    for item, box in properties:
        iprp[b"ipco"] += _box(*box)
        number = len(_boxes(iprp[b"ipco"]))
        associations[item] = associations.get(item, b"") + bytes([0x80 | number])
    packed = b"".join(
        struct.pack(">HB", item, len(numbers)) + numbers for item, numbers in associations.items()
    )
    iprp[b"ipma"] = ipma[:4] + struct.pack(">I", len(associations)) + packed
    contents[b"iprp"] = b"".join(_box(*it) for it in iprp.items())
    return list(contents.items())


def _boxes(content: bytes) -> list[Box]:
    boxes, at = [], 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 4])
        boxes.append((content[at + 4 : at + 8], content[at + 8 : at + size]))
        at += size
    return boxes


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def pdf_form(source: str, target: str) -> None:
    """Add a text field without an appearance, whose value a viewer draws, to a PDF in QDF form."""
    pdf = _read(source)
    root = pdf.index(b"/Type /Catalog")
    font = b"/Helv <</Type /Font /Subtype /Type1 /BaseFont /Helvetica>>"
    form = b"/AcroForm <</Fields [%b] /DA (/Helv 8 Tf 0 g) /DR <</Font <<%b>>>> /NeedAppearances true>>\n  "
    field = (
        b"<</Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (.) /Rect [18 12 40 27] /F 4"
        b" /DA (/Helv 12 Tf 0 g) /MK <</BG [1 1 1]>>>>"
    )
    number = pdf.count(b" 0 obj") + 1
    reference = b"%d 0 R" % number
    pdf = pdf[:root] + form % (reference, font) + pdf[root:]
    page = pdf.index(b"/MediaBox")
    pdf = pdf[:page] + b"/Annots [%b]\n  " % reference + pdf[page:]
    end = pdf.index(b"xref\n")
    added = b"%%%% Original object ID: %d 0\n%d 0 obj\n%b\nendobj\n\n" % (number, number, field)
    _write(target, pdf[:end] + added + pdf[end:])


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _write(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)


COMMANDS: dict[str, Callable[..., None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        without_adobe, without_huffman_tables, mpf, exif_last, top_down, dng, heif_transform, heif_grid,
        pdf_form,
    )
}  # fmt: skip

if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    COMMANDS[command](*arguments)

"""What masks mean: numbers at any depth, palettes, colors; what changes numbers or contradicts meta.json is refused."""

import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from allspark_fast.data.images import read_label
from allspark_fast.data.info import VOC_PALETTE, DatasetInfo, hex_palette
from allspark_fast.errors import DataError
from tests.helpers.images import write_image

MASK = np.kron(np.array([[0, 1], [2, 3]], np.uint8), np.ones((8, 8), np.uint8))
COLORS = np.stack([MASK * 60, MASK, MASK], -1)
ABC = DatasetInfo("toy", ("a", "b", "c", "d"), hex_palette("000000 ff0000 00ff00 0000ff"))


def png(rows, bits, color=0):
    """The bytes of a PNG of packed rows, 16 pixels wide, in depths that Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 16, len(rows), bits, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def packed(bits):
    unpacked = (MASK[..., None] >> np.arange(bits)[::-1]) & 1
    return [np.packbits(row).tobytes() for row in unpacked]


@pytest.mark.parametrize(
    "content",
    [
        png(packed(2), 2),
        png(packed(4), 4),
        png([row.astype(">u2").tobytes() for row in MASK], 16),
        b"P5 16 16 3\n" + MASK.tobytes(),
        b"P5 16 16 1000\n" + MASK.astype(">u2").tobytes(),
        b"P2 16 16 7\n" + " ".join(map(str, MASK.ravel())).encode(),
    ],
    ids=["2-bit PNG", "4-bit PNG", "16-bit PNG", "2-bit PGM", "10-bit PGM", "plain PGM"],
)
def test_numbers_are_those_in_the_file(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    for info in (None, ABC):
        np.testing.assert_array_equal(np.asarray(read_label(tmp_path / "a.png", info)), MASK)


def test_numbers_of_palettes_and_of_one_bit(tmp_path):
    image = Image.fromarray(MASK)
    image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(tmp_path / "palette.png", bits=2)
    np.testing.assert_array_equal(np.asarray(read_label(tmp_path / "palette.png")), MASK)
    write_image(tmp_path / "bits.png", (MASK > 0).astype(np.uint8) * 255, "1")
    np.testing.assert_array_equal(np.asarray(read_label(tmp_path / "bits.png")), MASK > 0)


LOSSY = {
    "JPEG": {"format": "JPEG"},
    "MPO": {"format": "MPO", "save_all": True, "append_images": [Image.new("L", (16, 16))]},
    "jpeg": {"format": "TIFF", "compression": "jpeg"},
    "WEBP": {"format": "WEBP", "quality": 90},
}


@pytest.mark.parametrize(("name", "mode"), [*itertools.product(LOSSY, ["L", "RGB"]), ("WEBP", "RGBA")])
def test_lossy_compression_is_refused_in_any_container(tmp_path, name, mode):
    """WebP with alpha keeps its pixels behind other chunks."""
    image = Image.fromarray(COLORS).convert(mode)
    if mode == "RGBA":
        image.putalpha(9)
    image.save(tmp_path / "a.png", **LOSSY[name])
    with pytest.raises(DataError, match=rf"a\.png: {name} compression changes class indices; save labels as PNG"):
        read_label(tmp_path / "a.png", ABC)


def test_lossless_webp_is_read(tmp_path):
    colors = np.array(ABC.palette, np.uint8)[MASK]
    for options in ({}, {"exif": Image.Exif().tobytes()}):
        write_image(tmp_path / "a.webp", colors, lossless=True, **options)
        np.testing.assert_array_equal(np.asarray(read_label(tmp_path / "a.webp", ABC)), MASK)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP"])
def test_several_pages_are_refused(tmp_path, kind):
    pages = [Image.fromarray(MASK), Image.fromarray(3 - MASK)]
    options = {"lossless": True} if kind == "WEBP" else {}
    pages[0].save(tmp_path / "a.png", kind, save_all=True, append_images=pages[1:], **options)
    with pytest.raises(DataError, match=r"a\.png: holds 2 pages, but a label is one"):
        read_label(tmp_path / "a.png", ABC)


def test_labels_that_are_refused(tmp_path):
    write_image(tmp_path / "a.tiff", MASK.astype(np.float32))
    (tmp_path / "a.png").write_bytes(png([bytes(96)] * 16, 16, color=2))
    for name, message in (("a.tiff", "mode F; convert it to class indices"), ("a.png", "16 bits per channel")):
        with pytest.raises(DataError, match=rf"{name}: .*{message}"):
            read_label(tmp_path / name, ABC)


def test_a_palette_that_contradicts_the_description_is_refused(tmp_path):
    def read(palette, info=ABC):
        image = Image.fromarray(MASK)
        image.putpalette(bytes.fromhex(palette))
        image.save(tmp_path / "a.png")
        return np.asarray(read_label(tmp_path / "a.png", info))

    with pytest.raises(DataError, match=r"gives the color .*to 3, but .* 0"):
        read("0909090a0a0a0b0b0b000000")
    for agreeing in ("000000ff000000ff000000ff", "000000ff000000ff00aabbcc", "010101020202030303040404"):
        np.testing.assert_array_equal(read(agreeing), MASK)
    # The colors of VOC are only those of pictures, unless meta.json gives colors.
    voc = DatasetInfo("toy", tuple("abcd"), VOC_PALETTE)
    np.testing.assert_array_equal(read("ff0000000000010101020202", voc), MASK)


@pytest.mark.parametrize(
    ("values", "ignore_index", "expected"),
    [
        ([[0, 1, 2, 255]], -1, [[0, 1, 1, 1]]),
        ([[0, 1, 2, 255]], 255, [[0, 1, 1, 255]]),
        ([[0, 300, 70, 65535]], 70, [[0, 1, 255, 1]]),
        ([[[0, 0, 0], [0, 0, 9], [255, 200, 0], [0, 0, 0]]], -1, [[0, 1, 1, 0]]),
    ],
)
def test_masks_that_number_their_objects(tmp_path, values, ignore_index, expected):
    array = np.array(values)
    write_image(tmp_path / "a.png", array.astype(np.uint16 if array.max() > 255 else np.uint8))
    info = DatasetInfo("toy", ("ground", "cell"), VOC_PALETTE, ignore_index, "nonzero")
    assert np.asarray(read_label(tmp_path / "a.png", info)).tolist() == expected

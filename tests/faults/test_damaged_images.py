"""Images as they come from cameras, editors and broken downloads: read correctly or refused by name."""

import io
import random
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from allspark_fast.data.images import decode, mean_color, read_image, read_label
from allspark_fast.errors import DataError
from tests.helpers.images import exif

TRIALS = 20
_PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
# Modes that a format can hold.
KINDS = [
    *((mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *((mode, "JPEG") for mode in ("L", "RGB", "CMYK", "YCbCr")),
    *((mode, "TIFF") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I", "I;16", "F")),
    *(("RGB", kind) for kind in ("BMP", "WEBP", "PPM")),
    ("P", "GIF"),
]


def encoded(mode: str, kind: str) -> bytes:
    if mode == "I;16":
        image = Image.fromarray(_PIXELS[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(_PIXELS).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"exif": exif(6)} if kind in ("PNG", "JPEG", "WEBP") else {}))
    return buffer.getvalue()


def harm(content: bytes, kind: str, source: random.Random) -> bytes:
    harmed, place = bytearray(content), source.randrange(len(content))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        harmed[place] ^= 1 << source.randrange(8)
    else:
        harmed[place : place + source.randrange(20)] = source.randbytes(source.randrange(20))
    return bytes(harmed)


@pytest.mark.parametrize(("mode", "kind"), KINDS)
def test_an_image_is_read_upright_and_a_damaged_one_is_named(tmp_path, mode, kind):
    path, whole, source = tmp_path / "a.img", encoded(mode, kind), random.Random(0)
    path.write_bytes(whole)
    if mode not in ("F", "I"):
        assert read_image(path).size == ((20, 24) if kind in ("PNG", "JPEG", "WEBP") else (24, 20))
    assert decode(path, mean_color).shape == (3,)
    for trial in range(TRIALS):
        path.write_bytes(harm(whole, ("cut", "flip", "splice")[trial % 3], source))
        for read, result in ((read_image, "RGB"), (read_label, "L")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert read(path).mode == result
                except DataError as error:
                    assert str(path) in str(error)  # noqa: PT017 both outcomes are right


def test_what_the_system_refuses_is_not_called_damaged(tmp_path, monkeypatch):
    """Permissions, which do not bind a superuser."""
    monkeypatch.setattr(Image, "open", Mock(side_effect=PermissionError(13, "Permission denied")))
    (tmp_path / "a.png").write_text("there")
    with pytest.raises(DataError, match=r"a\.png: .*Permission denied\); check its permissions and the disk"):
        read_image(tmp_path / "a.png")


def test_a_decompression_bomb_is_refused_without_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    assert path.stat().st_size < 100_000
    for read in (read_image, read_label):
        with pytest.raises(DataError, match=r"bomb\.png: .*decompression bomb.*cut it into tiles"):
            read(path)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA"])
def test_other_formats_are_refused_whatever_their_suffix(tmp_path, kind):
    """For EPS, Pillow starts Ghostscript."""
    Image.new("L", (8, 8)).save(tmp_path / "a.png", kind)
    assert Image.open(tmp_path / "a.png").format == kind
    for read in (read_image, read_label):
        with pytest.raises(DataError, match=r"a\.png: not an image in a supported format \(BMP, GIF.*convert it"):
            read(tmp_path / "a.png")

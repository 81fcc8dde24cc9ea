import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from allspark_fast.data.images import read_image, read_label, read_orientation, resolve_path
from allspark_fast.errors import DataError

GRADIENT = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def save(path: Path, values: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def test_grey_becomes_three_equal_channels(tmp_path):
    pixels = np.asarray(read_image(save(tmp_path / "a.png", GRADIENT)))
    np.testing.assert_array_equal(pixels, np.repeat(GRADIENT[..., None], 3, axis=2))


def test_alpha_is_dropped(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (6, 8, 4), np.uint8)
    image = read_image(save(tmp_path / "a.png", rgba))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), rgba[..., :3])


@pytest.mark.filterwarnings("error")
def test_palette_image_gives_its_colours(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png", transparency=b"\x00\xff\x80")
    expected = [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), expected)


def test_16_bit_grey_keeps_its_relative_brightness(tmp_path):
    wide = GRADIENT.astype(np.uint16) * 257
    assert Image.open(save(tmp_path / "a.png", wide)).mode.startswith("I")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png"))[..., 1], GRADIENT)


def test_16_bit_grey_is_rounded_to_the_nearest_level(tmp_path):
    wide = np.array([[0, 128, 129, 32767, 65406, 65407, 65535]], np.uint16)
    pixels = np.asarray(read_image(save(tmp_path / "a.png", wide)))[0, :, 0]
    np.testing.assert_array_equal(pixels, [0, 0, 1, 127, 254, 255, 255])


def test_cmyk_is_converted(tmp_path):
    red = np.tile(np.array([250, 10, 10], np.uint8), (16, 16, 1))
    image = read_image(save(tmp_path / "a.jpg", red, "CMYK", quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - red).max() < 12


def test_one_bit_image(tmp_path):
    image = read_image(save(tmp_path / "a.png", (GRADIENT > 100).astype(np.uint8) * 255, "1"))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], (GRADIENT > 100) * 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = save(tmp_path / "a.png", np.stack([GRADIENT] * 3, -1), exif=exif)
    image = read_image(path)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(ImageOps.exif_transpose(Image.open(path))))
    assert image.size == ((6, 8) if orientation >= 5 else (8, 6))


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_label_that_viewers_turn_is_refused(tmp_path, kind, orientation):
    """Pillow turns TIFF by itself."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    colored = np.stack([GRADIENT] * 3, -1)
    colors = {(x, x, x): x // 5 for x in GRADIENT.ravel().tolist()}
    path = save(tmp_path / f"a.{kind}", colored, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    assert read_orientation(path) == orientation
    if orientation == 1:
        np.testing.assert_array_equal(np.asarray(read_label(path, colors)), GRADIENT // 5)
        return
    with pytest.raises(DataError, match=rf"a\.{kind}: its EXIF orientation is {orientation}.*save it without that tag"):
        read_label(path, colors)
    assert read_image(path).size == ((6, 8) if orientation >= 5 else (8, 6))


def test_floating_point_image_is_refused(tmp_path):
    Image.fromarray(GRADIENT.astype(np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a\.tiff: floating point"):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("read", [read_image, read_label])
def test_unreadable_files_are_named(tmp_path, read):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(whole, "PNG")
    files = {"cut.png": whole.getvalue()[:2000], "text.png": b"not an image", "empty.png": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)
    with pytest.raises(DataError, match=r"absent\.png: no such file"):
        read(tmp_path / "absent.png")


def test_palette_label_gives_indices(tmp_path):
    indices = np.array([[0, 7], [255, 3]], np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(list(range(255, -1, -1)) * 3)
    image.putdata(indices.ravel().tolist())
    image.save(tmp_path / "a.png")
    label = read_label(tmp_path / "a.png")
    assert label.mode == "L"
    np.testing.assert_array_equal(np.asarray(label), indices)


def test_16_bit_label(tmp_path):
    np.testing.assert_array_equal(
        np.asarray(read_label(save(tmp_path / "a.png", GRADIENT.astype(np.uint16)))), GRADIENT
    )
    with pytest.raises(DataError, match=r"b\.png.*0\.\.255, found 0\.\.940"):
        read_label(save(tmp_path / "b.png", GRADIENT.astype(np.uint16) * 4))


def test_colour_label_is_refused_with_advice(tmp_path):
    with pytest.raises(DataError, match=r"mode RGB; convert it to class indices.*'palette'"):
        read_label(save(tmp_path / "a.png", np.stack([GRADIENT] * 3, -1)))


def test_jpeg_label_is_refused(tmp_path):
    with pytest.raises(DataError, match="save labels as PNG"):
        read_label(save(tmp_path / "a.jpg", GRADIENT))


@pytest.mark.parametrize("relative", ["/etc/a.png", "../a.png", "x/../../a.png", "x/../..", ".."])
def test_paths_that_leave_the_root(tmp_path, relative):
    with pytest.raises(DataError, match="leaves the data root"):
        resolve_path(tmp_path, relative)
    assert resolve_path(tmp_path, relative, allow_outside=True) == tmp_path / os.path.normpath(relative)


def test_paths_inside_the_root(tmp_path):
    for relative, expected in (("a.png", "a.png"), ("x/../a.png", "a.png"), ("./x/..a.png", "x/..a.png")):
        assert resolve_path(tmp_path, relative) == tmp_path / expected


def test_links_lead_out_but_dots_behind_them_do_not(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    save(tmp_path / "elsewhere" / "deep" / "a.png", GRADIENT)
    save(tmp_path / "elsewhere" / "secret.png", GRADIENT)
    assert read_image(resolve_path(tmp_path / "root", "link/a.png")).size == (8, 6)
    assert not resolve_path(tmp_path / "root", "link/../secret.png").exists()

import numpy as np
import pytest
from PIL import Image, ImageOps

from allspark_fast.data.datasets import list_files, resolve_path
from allspark_fast.data.images import decode, orientation_of, read_image, read_label
from allspark_fast.data.info import DatasetInfo
from allspark_fast.errors import DataError
from tests.helpers.images import exif, write_image

GRADIENT = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
GRAY = np.stack([GRADIENT] * 3, -1)
RGBA = np.random.default_rng(0).integers(0, 256, (6, 8, 4), np.uint8)
WIDE = np.array([[0, 128, 129, 32767, 65406, 65407, 65535]], np.uint16)


def in_gray(*rows):
    return np.repeat(np.array(rows)[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("values", "mode", "expected"),
    [
        (GRADIENT, None, GRAY),
        (RGBA, None, RGBA[..., :3]),
        (GRADIENT.astype(np.uint16) * 257, None, GRAY),
        (GRADIENT[1:2, :1], None, in_gray([40])),
        (WIDE, None, in_gray([0, 0, 1, 127, 254, 255, 255])),  # rounded to the nearest level
        ((GRADIENT > 100).astype(np.uint8) * 255, "1", in_gray(*(GRADIENT > 100) * 255)),
    ],
    ids=["gray", "alpha", "16 bits", "one pixel", "rounding", "1 bit"],
)
def test_every_mode_becomes_rgb(tmp_path, values, mode, expected):
    image = read_image(write_image(tmp_path / "a.png", values, mode))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.filterwarnings("error")
def test_palette_image_gives_its_colors(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png", transparency=b"\x00\xff\x80")
    expected = [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), expected)


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, kind, orientation):
    """Images are turned, which Pillow does for TIFF by itself; labels that viewers would turn are refused."""
    options = {"lossless": True} if kind == "webp" else {}
    path = write_image(tmp_path / f"a.{kind}", GRAY, exif=exif(orientation), **options)
    info = DatasetInfo("gray", tuple(map(str, range(48))), tuple((5 * x,) * 3 for x in range(48)) + ((9,) * 3,) * 208)
    assert decode(path, orientation_of) == orientation
    image = read_image(path)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(ImageOps.exif_transpose(Image.open(path))))
    assert image.size == ((6, 8) if orientation >= 5 else (8, 6))
    if orientation == 1:
        np.testing.assert_array_equal(np.asarray(read_label(path, info)), GRADIENT // 5)
        return
    with pytest.raises(DataError, match=rf"a\.{kind}: its EXIF orientation is {orientation}.*save it upright"):
        read_label(path, info)


@pytest.mark.parametrize(
    ("values", "pixel_range", "expected"),
    [
        (np.array([[0, 2048, 4095]], np.uint16), ("0", "4095"), [0, 128, 255]),  # 12 bits in 16
        (np.array([[0, 100, 255]], np.int32), ("0", "255"), [0, 100, 255]),  # 8 bits in 32
        (np.array([[-1000, 0, 3000]], np.int32), ("-1000", "1000"), [0, 128, 255]),  # clipped
        (np.array([[0.0, 0.5, 1.0]], np.float32), ("0%", "100%"), [0, 128, 255]),
        (np.array([[7.0, 7.0, 7.0]], np.float32), ("1%", "99%"), [0, 0, 0]),
        (np.array([[0, 20, 40]], np.uint8), ("0", "40"), [0, 128, 255]),
    ],
)
def test_a_range_of_values_becomes_black_to_white(tmp_path, values, pixel_range, expected):
    image = read_image(write_image(tmp_path / "a.tiff", values), pixel_range)
    np.testing.assert_array_equal(np.asarray(image), in_gray(expected))


@pytest.mark.parametrize("relative", ["/etc/a.png", "../a.png", "x/../../a.png", "x/../..", ".."])
def test_paths_that_leave_the_root(tmp_path, relative):
    with pytest.raises(DataError, match="leaves the data root"):
        resolve_path(tmp_path, relative)
    for inside, expected in (("a.png", "a.png"), ("x/../a.png", "a.png"), ("./x/..a.png", "x/..a.png")):
        assert resolve_path(tmp_path, inside) == tmp_path / expected


def test_links_lead_out_but_dots_behind_them_do_not(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    write_image(tmp_path / "elsewhere" / "deep" / "a.png", GRADIENT)
    write_image(tmp_path / "elsewhere" / "secret.png", GRADIENT)
    assert read_image(resolve_path(tmp_path / "root", "link/a.png")).size == (8, 6)
    assert not resolve_path(tmp_path / "root", "link/../secret.png").exists()


def test_images_of_a_folder_are_found_once_and_without_hidden_ones(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in ("b", "tiles.tif", ".ipynb_checkpoints", "b/.cache/deep"):
        (root / folder).mkdir(parents=True)
        write_image(root / folder / "x.png", GRADIENT)
    elsewhere.mkdir()
    write_image(elsewhere / "y.PNG", GRADIENT)
    write_image(root / ".z.png", GRADIENT)
    (root / "notes.txt").write_text("no image")
    for link, target in {
        "a": root / "b",  # comes before b, whose own path is the one to take
        "b/self": root / "b",
        "b/up": tmp_path,
        "../elsewhere/back": tmp_path,
        "linked": elsewhere,
        "linked_again": elsewhere,
        "z.png": root / "b/x.png",
    }.items():
        (root / link).symlink_to(target)
    found = [path.relative_to(root).as_posix() for path in list_files(root) if path.suffix != ".txt"]
    assert found == ["b/x.png", "linked/y.PNG", "tiles.tif/x.png", "z.png"]
    assert list_files(tmp_path / "nowhere") == []

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from allspark_fast.data.images import read_image
from allspark_fast.inference.evaluate import predict_labels
from allspark_fast.inference.predict import MAX_WHOLE_PIXELS, Prediction, Predictor, find_images
from allspark_fast.weights.spec import load_model
from tests.helpers.images import exif


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = torch.randint(256, (height // 8 + 1, width // 8 + 1, 3), dtype=torch.uint8).numpy()
    return Image.fromarray(noise).resize((width, height)).convert(mode)


@pytest.fixture
def photos(tmp_path):
    """Images of every mode, three of one size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "b", "c"):
        picture(90, 70).save(folder / f"{name}.png")
    picture(70, 90, "L").save(folder / "gray.png")
    picture(64, 64, "RGBA").save(folder / "alpha.png")
    picture(65, 64, "P").save(folder / "palette.png")
    picture(20, 5).save(folder / "tiny.png")
    picture(80, 40).save(folder / "turned.jpg", exif=exif(6))
    (folder / "notes.txt").write_text("no image")
    return folder


def predict_small(_: Predictor, image: Image.Image) -> Prediction:
    """A label for every pixel, for images that fit into memory."""
    if image.width == 200:
        raise MemoryError
    return Prediction(np.zeros(image.size[::-1], np.uint8), np.ones(image.size[::-1], np.float32))


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.*")}


@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_predicts_what_evaluation_scores(weights, mode):
    model, spec = load_model(weights)
    image = picture(100, 150)
    labels, confidence = Predictor(model, spec, mode=mode).predict(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    normalized = (pixels - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    expected, probability = predict_labels(model, normalized, mode=mode, crop=64)
    assert (torch.from_numpy(labels) == expected[0]).float().mean() > 0.999  # ties to rounding
    torch.testing.assert_close(torch.from_numpy(confidence), probability[0], rtol=1e-4, atol=1e-5)
    assert len(np.unique(labels)) > 1
    assert 1 / 3 < confidence.min() < confidence.max() < 1


def test_large_images_go_through_windows_unless_told(weights, monkeypatch):
    modes = []

    def spy(_: object, images: torch.Tensor, *, mode: str, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
        modes.append(mode)
        assert crop == 64
        return images[:, 0], images[:, 0]

    monkeypatch.setattr("allspark_fast.inference.predict.predict_labels", spy)
    model, spec = load_model(weights)
    for mode in (None, "whole"):
        for width in (MAX_WHOLE_PIXELS // 1024, MAX_WHOLE_PIXELS // 1024 + 1):
            Predictor(model, spec, mode=mode).predict(Image.new("RGB", (width, 1024)))
    assert modes == ["whole", "sliding", "whole", "whole"]


@pytest.mark.slow
def test_a_large_photo_takes_less_than_4_gib():
    """The resident memory of a whole process; windows and classes decide it, not the encoder."""
    code = """
from pathlib import Path
from PIL import Image
from allspark_fast.data.info import DATASETS
from allspark_fast.inference.predict import Predictor
from allspark_fast.weights.spec import ModelSpec
spec = ModelSpec(backbone="mit_tiny", allspark=True, embedding_dim=64, num_heads=2, memory_init="randn", crop=513,
                 mode="whole", mean=(0, 0, 0), std=(1, 1, 1), info=DATASETS["coco"])
labels, _ = Predictor(spec.build(), spec).predict(Image.effect_noise((4000, 3000), 50))
assert labels.shape == (3000, 4000)
print(Path("/proc/self/status").read_text())
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc: ru_maxrss would count the parent's memory too")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert int(peak) * 1024 < 4 * 2**30


def test_every_kind_of_image(weights, photos, tmp_path, command):
    out = tmp_path / "out"
    command("predict", weights, photos, "--confidence", "--out", out)
    images = {path.stem: path for path in photos.iterdir() if path.suffix != ".txt"}
    for kind, suffix in (("labels", "png"), ("overlays", "jpg"), ("confidence", "png")):
        assert {path.name for path in (out / kind).iterdir()} == {f"{name}.{suffix}" for name in images}
    for name, path in images.items():
        label = Image.open(out / "labels" / f"{name}.png")
        assert (label.mode, label.size) == ("P", read_image(path).size)
        assert label.getpalette()[:9] == [255, 0, 0, 0, 255, 0, 0, 0, 255]
        assert np.asarray(label).max() < 3
    assert Image.open(out / "labels" / "turned.png").size == (40, 80)
    assert Image.open(out / "confidence" / "a.png").mode == "L"


def test_files_that_cannot_be_read_or_written_are_named_and_the_rest_done(
    weights, photos, tmp_path, command, monkeypatch
):
    out = tmp_path / "out"
    long_name = "é" * 123 + "abc"  # 249 bytes; 255 are allowed
    picture(70, 80).save(photos / f"{long_name}.png")
    too_long = photos / ("x" * 252)  # with .png, one byte too long
    picture(64, 64).save(too_long, "PNG")
    (out / "labels/a.png").mkdir(parents=True)
    (photos / "site").mkdir()
    picture(64, 64).save(photos / "site/d.png")
    (out / "labels/site").write_text("a file, where a folder is needed")
    picture(200, 64).save(photos / "huge.png")
    for name in ("b", "c"):
        picture(110, 70).save(photos / f"{name}.png")
    (photos / "gray.png").write_bytes((photos / "gray.png").read_bytes()[:100])
    monkeypatch.setattr("allspark_fast.inference.predict.MAX_OVERLAY_SIDE", 105)
    monkeypatch.setattr(Predictor, "predict", predict_small)
    printed = command("predict", weights, photos, too_long, "--out", out, "--overwrite", status=1)
    for message in (
        "5 images labeled, 7 failed",
        "gray.png: cannot be read", "labels/a.png was not written (", "labels/site: expected a folder",
        "File name too long", "huge.png: out of memory: pass --window",
        "overlays/b.jpg was not written: the image is 110x70 pixels", "overlays/c.jpg was not written",
    ):  # fmt: skip
        assert message in printed
    assert names_in(out / "labels") == names_in(photos) - {"notes", "site/d", "gray", "huge"}
    assert long_name in names_in(out / "overlays")


def test_files_folders_and_patterns(photos, tmp_path):
    def find(*arguments: Path) -> list[str]:
        return [path.name for path in find_images(map(str, arguments), skip=tmp_path / "predictions")[0]]

    assert find(photos / "c.png", photos / "[ab].png") == ["c.png", "a.png", "b.png"]
    assert len(find(photos, photos / "a.png")) == 8
    for name, target in (("self", "."), ("up", ".."), ("again", "../photos")):
        (photos / name).symlink_to(target)
    everything = sorted(path.name for path in photos.glob("*.*g"))
    for path in (photos, photos / "**", photos / "**" / "*.*", tmp_path / "**" / "**" / "*.[jp]*g"):
        assert sorted(find(path)) == everything
    assert len(find(tmp_path / "**" / "*.png")) == 7
    (photos / "c_gone.png").symlink_to("nowhere")  # named when it is read
    assert find(photos / "c*.png") == ["c.png", "c_gone.png"]
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        find(photos, photos / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="'': no image"):  # of a shell variable that is not set, say
        find_images([""], skip=tmp_path)


def test_folders_in_a_folder_are_mirrored(weights, photos, command):
    for folder in ("site_a/deep", "site_b", ".hidden"):
        (photos / folder).mkdir(parents=True)
        picture(64, 64).save(photos / folder / "a.png")
    out = photos / "predictions"
    for _ in range(2):  # the second time, the first predictions are there too
        command("predict", weights, photos, "--out", out, "--overwrite")
        assert len(names_in(out / "labels")) == 10
        assert {"a", "site_a/deep/a", "site_b/a"} < names_in(out / "labels") & names_in(out / "overlays")
    by_pattern, _ = find_images([str(photos / "site_*" / "**" / "a.png")], skip=out)
    assert set(by_pattern.values()) == {Path("site_a/deep/a"), Path("site_b/a")}

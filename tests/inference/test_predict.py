"""Predictions for images of every kind."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from allspark_fast.__main__ import main
from allspark_fast.data.images import read_image, read_label
from allspark_fast.errors import InputError
from allspark_fast.inference.evaluate import predict_labels
from allspark_fast.inference.predict import MAX_WHOLE_PIXELS, Predictor, find_images
from allspark_fast.weights.spec import load_model


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = torch.randint(256, (height // 8 + 1, width // 8 + 1, 3), dtype=torch.uint8).numpy()
    return Image.fromarray(noise).resize((width, height)).convert(mode)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of every mode, three of one size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "b", "c"):
        picture(90, 70).save(folder / f"{name}.png")
    picture(70, 90, "L").save(folder / "gray.png")
    picture(64, 64, "RGBA").save(folder / "alpha.png")
    picture(65, 64, "P").save(folder / "palette.png")
    picture(20, 5).save(folder / "tiny.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(80, 40).save(folder / "turned.jpg", exif=exif)
    (folder / "notes.txt").write_text("no image")
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.*")}


@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_alone_and_in_a_batch_are_equal(weights: Path, mode: str) -> None:
    predictor = Predictor(*load_model(weights), mode=mode)
    images = [picture(90, 70) for _ in range(3)]
    together = predictor(images)
    for image, prediction in zip(images, together, strict=True):
        [alone] = predictor([image])
        assert np.array_equal(alone.labels, prediction.labels)
        np.testing.assert_allclose(alone.confidence, prediction.confidence, rtol=1e-5)
        assert (alone.labels.shape, alone.labels.dtype) == ((70, 90), np.uint8)
    # Beside other mates in a batch of the same size, nothing changes, not even by rounding.
    [other, *_] = predictor([images[0], picture(90, 70), picture(90, 70)])
    assert np.array_equal(other.confidence, together[0].confidence)


@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_predicts_what_evaluation_scores(weights: Path, mode: str) -> None:
    model, spec = load_model(weights)
    image = picture(100, 150)
    [(labels, confidence)] = Predictor(model, spec, mode=mode)([image])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    normalized = (pixels - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    expected, probability = predict_labels(model, normalized, mode=mode, crop=64)
    assert (torch.from_numpy(labels) == expected[0]).float().mean() > 0.999  # ties to rounding
    torch.testing.assert_close(torch.from_numpy(confidence), probability[0], rtol=1e-4, atol=1e-5)
    assert len(np.unique(labels)) > 1
    assert 1 / 3 < confidence.min() < confidence.max() < 1


def test_large_images_go_through_windows_unless_told(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def spy(_: object, images: torch.Tensor, *, mode: str, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
        modes.append(mode)
        assert crop == 64
        return images[:, 0], images[:, 0]

    monkeypatch.setattr("allspark_fast.inference.predict.predict_labels", spy)
    model, spec = load_model(weights)
    for mode in (None, "whole"):
        for width in (MAX_WHOLE_PIXELS // 1024, MAX_WHOLE_PIXELS // 1024 + 1):
            Predictor(model, spec, mode=mode)([Image.new("RGB", (width, 1024))])
    assert modes == ["whole", "sliding", "whole", "whole"]


@pytest.mark.parametrize(
    ("options", "images", "error", "message"),
    [
        ({}, [np.zeros((64, 64, 3), np.uint8)], TypeError, "expected Pillow images, got ndarray"),
        ({}, ["photo.jpg"], TypeError, "expected Pillow images, got str"),
        ({}, [Image.new("RGBA", (64, 64))], ValueError, "got mode RGBA"),
        ({}, [Image.new("RGB", (64, 80)), Image.new("RGB", (64, 70))], ValueError, r"one size, got \[\(64, 70\), "),
        ({"mode": "slide"}, [Image.new("RGB", (64, 64))], ValueError, "mode must be one of"),
        ({"device": "tpu"}, [], ValueError, "device must be one of"),
        ({"device": "cpu", "half": True}, [], InputError, "needs a GPU"),
    ],
)
def test_what_is_wrong_is_named(
    weights: Path, options: dict, images: list, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Predictor(*load_model(weights), **options)(images)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_half_on_a_gpu(weights: Path, mode: str) -> None:
    image = picture(100, 150)
    [exact] = Predictor(*load_model(weights), mode=mode)([image])
    [half] = Predictor(*load_model(weights), mode=mode, half=True)([image])
    assert (exact.labels == half.labels).mean() > 0.95
    assert not np.array_equal(exact.confidence, half.confidence)


@pytest.mark.slow
def test_a_large_photo_takes_less_than_4_gib() -> None:
    """The resident memory of a whole process; windows and classes decide it, not the encoder."""
    code = """
from pathlib import Path
from PIL import Image
from allspark_fast.data.info import DATASETS
from allspark_fast.inference.predict import Predictor
from allspark_fast.weights.spec import ModelSpec
spec = ModelSpec(backbone="mit_tiny", allspark=True, embedding_dim=64, num_heads=2, memory_init="randn", crop=513,
                 mode="whole", mean=(0, 0, 0), std=(1, 1, 1), info=DATASETS["coco"])
[(labels, _)] = Predictor(spec.build(), spec)([Image.effect_noise((4000, 3000), 50).convert("RGB")])
assert labels.shape == (3000, 4000)
print(Path("/proc/self/status").read_text())
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc: ru_maxrss would count the parent's memory too")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert int(peak) * 1024 < 4 * 2**30


def test_every_kind_of_image_alone_and_in_batches(weights: Path, photos: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    command = ["predict", str(weights), str(photos), "--confidence", "--out"]
    assert main([*command, str(one)]) == 0
    assert main([*command, str(many), "--batch", "2"]) == 0
    images = {path.stem: path for path in photos.iterdir() if path.suffix != ".txt"}
    for kind, suffix in (("labels", "png"), ("overlays", "jpg"), ("confidence", "png")):
        for folder in (one, many):
            assert {path.name for path in (folder / kind).iterdir()} == {f"{name}.{suffix}" for name in images}
    for name, path in images.items():
        file = one / "labels" / f"{name}.png"
        assert file.read_bytes() == (many / "labels" / f"{name}.png").read_bytes()
        label = Image.open(file)
        assert (label.mode, label.size) == ("P", read_image(path).size)
        assert label.getpalette()[:9] == [255, 0, 0, 0, 255, 0, 0, 0, 255]
        assert np.asarray(read_label(file)).max() < 3
    assert Image.open(one / "labels" / "turned.png").size == (40, 80)
    assert Image.open(one / "confidence" / "a.png").mode == "L"


def test_a_corrupt_image_is_named_and_the_rest_done(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:100])
    assert main(["predict", str(weights), str(photos), "--out", str(tmp_path / "out"), "--batch", "4"]) == 1
    printed = capsys.readouterr()
    assert "b.png" in printed.err
    assert "7 images labeled, 1 failed" in printed.out
    assert len(names_in(tmp_path / "out" / "labels")) == 7


def test_a_prediction_that_cannot_be_written_is_named_and_the_rest_done(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    long_name = "é" * 123 + "abc"  # 249 bytes; 255 are allowed
    picture(70, 80).save(photos / f"{long_name}.png")
    (out / "labels/a.png").mkdir(parents=True)
    monkeypatch.setattr("allspark_fast.inference.predict.MAX_OVERLAY_SIDE", 89)
    assert main(["predict", str(weights), str(photos), "--out", str(out), "--overwrite"]) == 1
    printed = capsys.readouterr()
    assert "5 images labeled, 4 failed" in printed.out
    assert "labels/a.png was not written (" in printed.err
    for name in ("b", "c"):
        assert f"overlays/{name}.jpg was not written: the image is 90x70 pixels" in printed.err
    assert names_in(out / "labels") == names_in(photos) - {"notes"}
    assert long_name in names_in(out / "overlays")


def test_nothing_is_overwritten_unless_asked_for(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(64, 64).save(photos / "a.jpg")
    assert main(["predict", str(weights), str(photos), "--out", str(tmp_path / "out")]) == 1
    assert "would share one file a.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    command = ["predict", str(weights), str(photos / "a.png"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    label = tmp_path / "out" / "labels" / "a.png"
    label.write_bytes(b"mine")
    assert main(command) == 1
    assert "a.png exists" in capsys.readouterr().err
    assert label.read_bytes() == b"mine"
    assert main([*command, "--overwrite"]) == 0
    assert Image.open(label).size == (90, 70)


def test_files_folders_and_patterns(photos: Path, tmp_path: Path) -> None:
    def find(*arguments: Path) -> list[str]:
        return [path.name for path in find_images(map(str, arguments), skip=tmp_path / "predictions")]

    assert find(photos / "c.png", photos / "[ab].png") == ["c.png", "a.png", "b.png"]
    assert len(find(photos, photos / "a.png")) == 8
    assert len(find(tmp_path / "**" / "*.png")) == 7
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        find(photos, photos / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="'': no image"):  # of a shell variable that is not set, say
        find_images([""], skip=tmp_path)


def test_folders_in_a_folder_are_mirrored(weights: Path, photos: Path) -> None:
    for folder in ("site_a/deep", "site_b", ".hidden"):
        (photos / folder).mkdir(parents=True)
        picture(64, 64).save(photos / folder / "a.png")
    out = photos / "predictions"
    for _ in range(2):  # the second time, the first predictions are there too
        assert main(["predict", str(weights), str(photos), "--out", str(out), "--overwrite"]) == 0
        assert len(names_in(out / "labels")) == 10
        assert {"a", "site_a/deep/a", "site_b/a"} < names_in(out / "labels") & names_in(out / "overlays")
    by_pattern = find_images([str(photos / "site_*" / "**" / "a.png")], skip=out)
    assert set(by_pattern.values()) == {Path("site_a/deep/a"), Path("site_b/a")}

import numpy as np
import pytest
import torch
from PIL import Image

from allspark_fast.data.info import DATASETS, VOC_PALETTE, DatasetInfo, hex_palette
from allspark_fast.data.loader import EvalSample
from allspark_fast.inference.pictures import comparison, draw_panel, overlay, palette_of

PLAIN = DatasetInfo("plain", ("ground", "_ball", "$x$"), VOC_PALETTE)


def test_colors_are_those_of_the_data_set_or_distinct_ones():
    assert palette_of(DATASETS["camvid"])[0].tolist() == [128, 128, 128]
    assert palette_of(DATASETS["pascal"])[:21].tolist() == [list(color) for color in VOC_PALETTE[:21]]
    assert palette_of(PLAIN)[:3].tolist() == [[0, 0, 0], [230, 159, 0], [86, 180, 233]]
    assert palette_of(PLAIN)[255].tolist() == [255, 255, 255]
    many = DatasetInfo("many", tuple(map(str, range(15))), VOC_PALETTE)
    assert len({*map(tuple, palette_of(many)[:15].tolist())}) == 15


@pytest.mark.parametrize(("palette", "left_alone"), [(VOC_PALETTE, 0), (hex_palette("ff0000 00ff00 0000ff"), 2)])
def test_an_overlay_leaves_the_background_and_outlines_the_rest(palette, left_alone):
    """Black, or named background."""
    info = DatasetInfo("any", ("a", "b", "Background"), palette)
    labels = np.full((60, 80), left_alone, np.uint8)
    labels[20:40, 20:60] = 1
    image = Image.effect_noise((80, 60), 50).convert("RGB")
    picture = overlay(image, labels, info)
    assert picture.width >= 80
    assert picture.height > 60  # a legend
    before, after = np.asarray(image), np.asarray(picture)[:60, :80]
    np.testing.assert_array_equal(after[labels == left_alone], before[labels == left_alone])
    assert (after[20, 20:60] == 255).all()
    assert (after[21:23, 22:58] == palette_of(info)[1]).all()
    inside = after[30, 30].astype(int)
    assert abs(inside - (0.55 * before[30, 30] + 0.45 * palette_of(info)[1])).max() <= 1


def test_a_panel_of_images_of_any_size_shows_where_they_are_wrong(tmp_path, tiny_spec):
    rows = []
    for height, width in ((40, 700), (33, 20)):
        truth, prediction = torch.zeros(1, height, width, dtype=torch.uint8), torch.zeros(height, width)
        truth[0, :, :10], prediction[:20] = 255, 1
        sample = EvalSample(torch.randn(1, 3, height, width), truth)
        pictures = comparison(sample, prediction.long(), tiny_spec)
        assert list(pictures) == ["image", "truth", "prediction", "errors"]
        wrong = (np.asarray(pictures["errors"]) == (200, 0, 0)).all(2)
        assert wrong[:20, 10:].all()
        assert wrong.sum() == 20 * (width - 10)
        rows.append((f"{width} x {height}", pictures))
    draw_panel(tmp_path / "panel.png", rows, PLAIN)
    panel = Image.open(tmp_path / "panel.png")
    assert panel.width == 4 * 310 + 10
    assert 300 < panel.height < 700

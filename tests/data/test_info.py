import json

import pytest

from allspark_fast.data.info import DATASETS, VOC_PALETTE, read_info
from allspark_fast.errors import DataError


def test_known_datasets():
    """Their classes have names and colors of their own; VOC's colors are those of its development kit."""
    counts = {name: len(set(info.palette[: len(info.classes)])) for name, info in DATASETS.items()}
    assert counts == {"pascal": 21, "cityscapes": 19, "coco": 81, "camvid": 11}
    city = DATASETS["cityscapes"]
    assert city.palette[city.classes.index("bicycle")] == (119, 11, 32)
    expected = {0: (0, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {index: VOC_PALETTE[index] for index in expected} == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])  # with marks, as of Windows
@pytest.mark.parametrize("palette", [[[1, 2, 3], [4, 5, 6]], [1, 2, 3, 4, 5, 6], None])
def test_meta_file(tmp_path, palette, encoding):
    meta = {"classes": ["sea", "land"]}
    if palette is not None:
        meta |= {"ignore_index": 9, "palette": palette}
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding=encoding)
    info = read_info(tmp_path)
    assert (info.name, info.classes) == (tmp_path.name, ("sea", "land"))
    assert info.ignore_index == (255 if palette is None else 9)
    assert info.palette[:3] == (VOC_PALETTE[:3] if palette is None else ((1, 2, 3), (4, 5, 6), (0, 0, 0)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("{}", "'classes' must be a list of names"),
        ('{"classes": ["a"], "palete": []}', "unknown keys \\['palete'\\]"),
        ('{"classes": ["a"], "ignore_index": 256}', "integer in 0..255, found 256"),
        ('{"classes": ["a"], "palette": [[1, 2, 300]]}', "three integers"),
        ('{"classes": ["a", "b"], "palette": [[1, 2, 3]]}', "each of 2 classes, found 1"),
        ('{"classes": ["a", "b"], "palette": {"a": [0, 0, 0]}}', "list of colors"),
        ('{"classes": ["caf\u00e9", "cafe\u0301"]}', "equal names: caf\u00e9"),
        ('{"classes": ["a", "b"], "classes": ["c", "d"]}', "a key is there more than once: \\['classes', 'classes'\\]"),
        ('{"classes": ["a", "b"], "values": [false, true]}', "list of 2 different integers"),
        ('{"classes": ["a", "b", "c"], "values": "nonzero"}', "needs two classes"),
    ],
)
def test_faulty_meta_file_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=r'no meta\.json; write .*"classes".*"values": \[0, 255\]'):
        read_info(tmp_path)
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(DataError, match=rf"meta\.json: .*{message}"):
        read_info(tmp_path)


@pytest.mark.parametrize(("more", "ignored"), [({}, -1), ({"ignore_index": 255}, 255), ({"ignore_index": 7}, 7)])
def test_nonzero_ignores_only_what_is_named(tmp_path, more, ignored):
    (tmp_path / "meta.json").write_text(json.dumps({"classes": ["sea", "land"], "values": "nonzero", **more}))
    assert read_info(tmp_path).ignore_index == ignored

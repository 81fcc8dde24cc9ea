"""Files that people write: split files, meta.json, and the settings that a run or a file of weights holds."""

import codecs
import json
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allspark_fast.config import Config
from allspark_fast.data.datasets import read_split, split_line
from allspark_fast.data.info import read_info
from allspark_fast.weights.spec import ModelSpec

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def with_one_change(draw: st.DrawFn, right: dict) -> object:
    """JSON that is right but for one value or key, at any depth."""
    changed = dict(right)
    key = draw(st.sampled_from(sorted(right)))
    if isinstance(right[key], dict) and draw(st.booleans()):
        changed[key] = draw(with_one_change(right[key]))
    elif draw(st.booleans()):
        changed[key] = draw(JSON)
    else:
        changed[draw(st.text(max_size=3))] = changed.pop(key)
    return changed


def assert_read_or_named(read, named):
    """Return what a file holds, or None if an error names it."""
    try:
        return read()
    except ValueError as error:
        assert named in str(error)  # noqa: PT017 both outcomes are right
        return None


@settings(max_examples=100, deadline=None)
@given(
    st.booleans(),
    st.lists(st.sampled_from([b"a.png", b"b.JPG", b" ", b"\n", b"\r\n", b"\t", b"/", b".."]) | st.binary(max_size=2)),
)
def test_any_split_file(marked, parts):
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(marked * codecs.BOM_UTF8 + b"".join(parts))
        entries = assert_read_or_named(lambda: read_split(Path(file.name)), file.name)
        if entries is not None:
            Path(file.name).write_text("\n".join(map(split_line, entries)), encoding="utf-8")
            assert read_split(Path(file.name)) == entries


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        JSON, with_one_change({"classes": ["a", "b"], "values": [0, 255], "ignore_index": 9, "palette": [[0] * 3] * 2})
    )
)
def test_any_meta(meta):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "meta.json").write_text(json.dumps(meta))
        info = assert_read_or_named(lambda: read_info(folder), "meta.json")
    assert info is None or len(info.classes) == len(meta["classes"])


@settings(max_examples=100, deadline=None)
@given(with_one_change(json.loads(Config().to_json())))
def test_any_settings_of_a_run(fields):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(fields))
        config = assert_read_or_named(lambda: Config.read(path), "config.json holds no settings")
        if config is not None:
            path.write_text(config.to_json())
            assert Config.read(path) == config


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_description_of_a_model(tiny_spec, data):
    text = json.dumps(data.draw(st.one_of(JSON, with_one_change(json.loads(tiny_spec.to_json())))))
    spec = assert_read_or_named(lambda: ModelSpec.from_json(text, Path("a")), "a: damaged description of the model")
    assert spec is None or ModelSpec.from_json(spec.to_json(), Path("a")).to_json() == spec.to_json()

"""The package as such: what importing it costs and needs, and under which name."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    """Run code in a fresh interpreter at the root and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_imports_and_trains_without_triton_and_xformers(tmp_path):
    code = f"""
import sys
sys.modules["triton"] = sys.modules["xformers"] = None
import importlib, pkgutil, torch, allspark_fast
for module in pkgutil.walk_packages(allspark_fast.__path__, "allspark_fast."):
    leaf = module.name.rpartition(".")[2]
    if leaf not in ("kernel", "row_kernels", "__main__"):  # need triton by definition
        importlib.import_module(module.name)
from allspark_fast.kernels.channel_attention import channel_attention
try:
    channel_attention(*[torch.ones(1, 1, 4, 8)] * 3, backend="triton")
except ValueError as error:
    print(error)
from allspark_fast.__main__ import main
options = "--data.scenes 3 4 1 --data.crop 64 --data.workers 0 --train.epochs 1 --train.batch-size 2".split()
sys.exit(main(["train", *options, "--run.output-dir", {str(tmp_path)!r}]))
"""
    printed = python(code)
    assert "pip install triton" in printed
    assert "mIoU" in printed


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "import allspark_fast.model, allspark_fast.weights.files",
            "triton matplotlib tyro torchvision tensorboard PIL",
        ),
        ("from allspark_fast.__main__ import main; main(['--help'])", "torch numpy matplotlib tyro PIL"),
    ],
)
def test_nothing_is_imported_that_is_not_used(code, absent):
    printed = python(f"import sys; {code}; print([name for name in {absent.split()} if name in sys.modules])")
    assert printed.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_hugging_face_model_at_the_root_does_not_load_our_kernels_under_another_name():
    pytest.importorskip("transformers", reason="needs Hugging Face transformers")
    code = """
import sys, transformers
config = transformers.SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, num_attention_heads=[1] * 4)
transformers.SegformerModel(config)
print([name for name in sys.modules if name.startswith("kernels.")])
"""
    assert python(code).splitlines()[-1] == "[]"

import pytest
import torch
from hypothesis import settings

from allspark_fast.__main__ import main
from allspark_fast.data.info import DatasetInfo, hex_palette
from allspark_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from allspark_fast.training import trainer
from allspark_fast.weights.spec import ModelSpec, save_model

# The same examples in every run: what fails can be repeated.
settings.register_profile("alike", derandomize=True)
settings.load_profile("alike")


@pytest.fixture(autouse=True)
def _alike():
    """Every test starts from the same seed, with one thread: more only wait for each other on small tensors."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs in this process draw nothing: most of the time of a tiny run goes there."""
    monkeypatch.setattr(trainer, "draw_pictures", lambda *_: None)


@pytest.fixture
def command(capsys):
    """Run a command in this process, check its exit status, and return what it printed; errors too if it fails."""

    def run(*words: object, status: int = 0) -> str:
        capsys.readouterr()
        assert main([*map(str, words)]) == status
        out, err = capsys.readouterr()
        return out + err if status else out

    return run


@pytest.fixture
def tiny_spec():
    """A model of three classes, small enough for any test."""
    return ModelSpec(
        backbone="mit_tiny",
        allspark=True,
        embedding_dim=16,
        num_heads=2,
        memory_init="empty",
        crop=64,
        mode="whole",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        info=DatasetInfo("fruit", ("apple", "pear", "plum"), hex_palette("ff0000 00ff00 0000ff")),
    )


@pytest.fixture
def weights(tmp_path, tiny_spec):
    """The file of weights of such a model."""
    save_model(tiny_spec.build(), tiny_spec, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"

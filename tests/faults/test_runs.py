"""Faults of a whole run: full and read-only disks, too little memory, lost workers, kills, files that go bad."""

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allspark_fast.__main__ import main
from allspark_fast.data.datasets import Entry, SegmentationDataset
from allspark_fast.data.info import read_info
from allspark_fast.data.loader import SemiBatch, SemiLoader
from allspark_fast.data.transforms import CropTransform
from allspark_fast.errors import DataError
from allspark_fast.training import trainer
from allspark_fast.training.step import Losses, TrainState, train_step
from allspark_fast.training.trainer import Trainer
from tests.faults.kill_and_resume import kill_and_resume
from tests.helpers.ranks import Run
from tests.helpers.runs import assert_same_run, changed, tiny_config

ROOT = Path(__file__).parents[2]
TINY = {
    "data.crop": 64, "data.workers": 0, "model.backbone": "mit_tiny", "model.embedding-dim": 16,
    "train.batch-size": 2, "train.epochs": 1, "run.save-every": 1, "run.device": "cpu",
}  # fmt: skip


def arguments(folder: Path, **options: object) -> list[str]:
    settings = {**TINY, **{name.replace("__", "."): value for name, value in options.items()}}
    pairs = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
    return ["train", "scenes", "--data.scenes", "3", "8", "2", *pairs, "--run.output-dir", str(folder)]


# A tmpfs is read-only; has too little room for two checkpoints of 13 MB; and is filled after the first step.
ON_DISKS = """
import subprocess, sys
from contextlib import suppress
from pathlib import Path
from allspark_fast.__main__ import main
from allspark_fast.training import trainer

folder, arguments, take_step = Path(sys.argv[1]), sys.argv[2:], trainer.train_step

def train(options):
    if options:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    print("status", main(arguments), flush=True)

def fill(state, *args, **options):
    if state.step == 1:
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    return take_step(state, *args, **options)

train("ro")
train("size=15m")
trainer.train_step = fill
train("size=60m")
print(sorted(path.name for path in (folder / "run/checkpoints").iterdir()))
trainer.train_step = take_step
(folder / "filler").unlink()
train("")
"""


@pytest.mark.slow
def test_disks_that_are_read_only_too_small_or_fill_up(tmp_path: Path) -> None:
    """The first two are told before work starts; a full one loses nothing, and the run goes on once there is room."""
    mounted = ["unshare", "-rm"]
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], check=False).returncode:
        pytest.skip("needs unshare and the right to make namespaces")
    command = [*mounted, sys.executable, "-c", ON_DISKS, tmp_path, *arguments(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = done.stderr
    assert done.returncode == 0, errors
    assert [line for line in done.stdout.splitlines() if line.startswith("status")] == ["status 1"] * 3 + ["status 0"]
    assert f"error: [Errno 30] Read-only file system: '{tmp_path}/run'" in errors
    assert "more checkpoints take at least" in errors[: errors.index("step/s")]
    assert "was not written" in errors or "No space left on device" in errors
    assert "['step_00000001.pt']" in done.stdout
    assert "resumed at step 1 of 4" in errors
    assert "mIoU" in done.stdout
    assert "Traceback" not in errors


def test_a_limit_on_the_size_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))
    try:
        assert main(arguments(tmp_path)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step_00000001.pt was not written" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").iterdir())


def train_in(more: int, command: list[str]) -> int:
    # Imports first: what a library says that cannot be mapped is another matter.
    import torch.utils.tensorboard  # noqa: F401, PLC0415

    import allspark_fast.cli.train  # noqa: F401, PLC0415

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
    return main(command)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see how much memory is used")
@pytest.mark.parametrize("more_mb", [300, 600])
def test_out_of_memory_names_settings_that_take_less(tmp_path: Path, more_mb: int) -> None:
    """Batches of 8 crops of 800 pixels: with less NumPy has no room for a crop, with more torch none for a step."""
    printed = Run(train_in, more_mb * 10**6, arguments(tmp_path, data__crop=800, train__batch_size=4)).finish(1)
    assert "error: " in printed
    assert "out of memory; what takes less: the same run goes on with --model.activation-checkpointing True" in printed
    assert "Traceback" not in printed


@pytest.mark.usefixtures("no_pictures")
def test_a_run_whose_worker_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(tiny_config(), data={"workers": 1})
    Trainer(config, tmp_path / "whole").run()

    def step(state: TrainState, batch: SemiBatch, **options: bool) -> Losses:
        if state.step == 4:
            (worker,) = multiprocessing.active_children()
            worker.kill()
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        return train_step(state, batch, **options)

    with monkeypatch.context() as killing:
        killing.setattr(trainer, "train_step", step)
        with pytest.raises(RuntimeError):
            Trainer(config, tmp_path / "broken").run()
    resumed = Trainer(config, tmp_path / "broken")
    assert 3 <= resumed.step < 12
    resumed.run()
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def kill_four(folder: Path) -> int:
    killed, compared = kill_and_resume(4, seed=1, folder=folder)
    return int(killed.total() != 4 or compared < 1)


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path) -> None:
    """Four of the kills of ``python -m tests.faults.kill_and_resume``; it forks, which no process that trained may."""
    Run(kill_four, tmp_path).finish()


def make_folder(root: Path, images: int) -> list[Entry]:
    entries = [Entry(f"images/{i}.png", f"labels/{i}.png") for i in range(images)]
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for i, entry in enumerate(entries):
        Image.fromarray(np.full((50, 60, 3), 40 * i, np.uint8)).save(root / entry.image)
        Image.fromarray(np.full((50, 60), i % 2, np.uint8)).save(root / entry.label)
    (root / "meta.json").write_text(json.dumps({"classes": ["even", "odd"]}))
    return entries


def loader(root: Path, labeled: list[Entry], unlabeled: list[Entry], **options: object) -> SemiLoader:
    sources = [SegmentationDataset(root, entries, info=read_info(root)) for entries in (labeled, unlabeled)]
    crops = [CropTransform(32, photometric=False)] * 2
    return SemiLoader(*sources, *crops, batch_size=2, seed=0, **options)


@pytest.mark.parametrize(
    ("harm", "workers", "message"),
    [
        ("deleted", 0, "no such file"),
        ("cut", 0, "cannot be read as an image"),
        ("cut", 1, "cannot be read as an image"),
        ("emptied", 0, "the file is empty"),
        ("outside the classes", 0, r"holds \[7\], but the 2 classes of .* have the indices 0\.\.1"),
        ("of another size", 0, "is 9x9; the sizes must be equal"),
    ],
)
def test_a_file_that_goes_bad_during_the_run_is_named(tmp_path: Path, harm: str, workers: int, message: str) -> None:
    entries = make_folder(tmp_path, 6)
    batches = loader(tmp_path, entries, entries, num_workers=workers).iterate(0, 60)
    next(batches)
    for entry in entries:
        label = tmp_path / entry.label
        harmed = tmp_path / "harmed.png"  # a worker reads meanwhile
        if harm == "deleted":
            label.unlink()
            continue
        if harm in ("cut", "emptied"):
            harmed.write_bytes(label.read_bytes()[: 50 if harm == "cut" else 0])
        else:
            size, value = ((60, 50), 7) if harm == "outside the classes" else ((9, 9), 0)
            Image.new("L", size, value).save(harmed)
        harmed.replace(label)
    with pytest.raises(DataError, match=rf"labels/\d\.png.*{message}"):
        list(batches)


def test_hidden_labels_that_are_not_there_are_told_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lists of the public code name a label for every unlabeled image; training needs none of them."""
    entries = make_folder(tmp_path, 4)
    absent = [Entry(entry.image, f"absent/{i}.png") for i, entry in enumerate(entries)]
    batch = next(loader(tmp_path, entries, absent, hidden_labels=True).iterate(0, 1))
    assert (batch.unlabeled_label == 255).all()
    assert (batch.label != 255).any()
    assert "absent/" in caplog.text


HOLDS_BATCHES = """
from allspark_fast.data.loader import SemiLoader
from allspark_fast.data.scenes import ScenesDataset
from allspark_fast.data.transforms import CropTransform
scenes, crops = ScenesDataset(range(4), 40, 0), CropTransform(32, photometric=False)
batches = SemiLoader(scenes, scenes, crops, crops, batch_size=2, seed=0, num_workers=1).iterate(0, 60)
next(batches)
"""


def test_workers_end_with_the_process_that_holds_them() -> None:
    """They ignore SIGTERM, with which Python ends children at exit, and for which it then waits without a limit."""
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_BATCHES], cwd=ROOT, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr

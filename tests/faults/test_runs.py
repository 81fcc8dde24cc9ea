"""Faults of a whole run, each in its own process: full and read-only disks, lost workers, files that go bad."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allspark_fast.data.datasets import Entry, SegmentationDataset
from allspark_fast.data.info import read_info
from allspark_fast.data.loader import SemiLoader
from allspark_fast.data.transforms import CropTransform
from allspark_fast.errors import DataError
from allspark_fast.training.checkpoint import load_latest_checkpoint
from tests.faults.kill_and_resume import kill_and_resume

ROOT = Path(__file__).parents[2]
TINY = {
    "data.crop": 64, "data.workers": 0, "model.backbone": "mit_tiny", "model.embedding-dim": 16,
    "train.batch-size": 2, "train.epochs": 2, "run.save-every": 1, "run.log-every": 1, "run.device": "cpu",
}  # fmt: skip


def command(folder: Path | str, *more: object, scenes: int = 8, **options: object) -> list[str]:
    settings = {**TINY, **{name.replace("__", "."): value for name, value in options.items()}}
    pairs = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
    train = [sys.executable, "-m", "allspark_fast", "train", "scenes", "--data.scenes", "3", str(scenes), "2"]
    return [*train, *pairs, "--run.output-dir", str(folder), *map(str, more)]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)


def with_mount(script: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell script that may mount file systems, which only it sees."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs unshare and the right to make namespaces")
    return run(["unshare", "-rm", "sh", "-ec", script])


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A tmpfs that has room for one checkpoint of 13 MB beside what fills it meanwhile; then room is made."""
    train = " ".join(command(tmp_path / "run", scenes=4))
    done = with_mount(
        f"mount -t tmpfs -o size=60m tmpfs {tmp_path}; "
        f"(while ! test -e {tmp_path}/run/checkpoints/step_00000001.pt; do sleep 0.01; done; "
        f"head -c 60m /dev/zero > {tmp_path}/filler 2> /dev/null || true) & "
        f"if {train}; then exit 9; fi; wait; ls -A {tmp_path}/run/checkpoints; rm {tmp_path}/filler; {train}"
    )
    assert done.returncode == 0, done.stderr
    assert "was not written" in done.stderr or "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "step_00000001.pt" in done.stdout
    assert ".tmp" not in done.stdout
    assert "resumed at step" in done.stderr
    assert "mIoU" in done.stdout


@pytest.mark.slow
def test_too_little_room_and_a_read_only_folder_are_told_before_work_starts(tmp_path: Path) -> None:
    train = " ".join(command(tmp_path / "run"))
    done = with_mount(f"mount -t tmpfs -o size=15m tmpfs {tmp_path}; {train}")
    assert "more checkpoints take at least" in done.stderr
    assert "step/s" not in done.stderr
    done = with_mount(f"mount -t tmpfs -o ro tmpfs {tmp_path}; {train}")
    assert done.stderr.splitlines()[-1] == f"error: [Errno 30] Read-only file system: '{tmp_path}/run'"


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    done = run(["sh", "-c", f"ulimit -f 8000; {' '.join(command(tmp_path / 'run'))}"])
    assert done.returncode == 1
    assert "step_00000001.pt was not written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


# Imports first: what a library says that cannot be mapped is another matter.
LIMITED = """
import resource, sys
from pathlib import Path
import allspark_fast.cli.train
import torch.utils.tensorboard
from allspark_fast.__main__ import main
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {more}, used + {more}))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see how much memory is used")
@pytest.mark.parametrize("more_mb", [300, 600])
def test_out_of_memory_names_settings_that_take_less(tmp_path: Path, more_mb: int) -> None:
    """Batches of 8 crops of 800 pixels: with less NumPy has no room for a crop, with more torch none for a step."""
    train = command(tmp_path / "run", data__crop=800, train__batch_size=4)[3:]
    done = run([sys.executable, "-c", LIMITED.format(more=more_mb * 10**6), *train])
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert (
        "out of memory; what takes less: the same run goes on with --model.activation-checkpointing True" in done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_killed_worker_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    arguments = command(tmp_path / "run", data__workers=1, train__epochs=50, eval__every=50)
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("run/checkpoints/step_*.pt")):
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs /proc to find the worker")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "DataLoader worker" in errors
    assert "Traceback" not in errors
    state = load_latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert state["step"] >= 1
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("resumed at step"):
            break
    process.kill()
    process.communicate()
    assert line.startswith("resumed at step")


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path) -> None:
    """Three of the kills of ``python -m tests.faults.kill_and_resume``."""
    killed = kill_and_resume(3, seed=1, folder=tmp_path)
    assert killed["runs compared"] >= 1
    assert killed.total() >= 4


def make_folder(root: Path, images: int) -> list[Entry]:
    entries = [Entry(f"images/{i}.png", f"labels/{i}.png") for i in range(images)]
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for i, entry in enumerate(entries):
        Image.fromarray(np.full((50, 60, 3), 40 * i, np.uint8)).save(root / entry.image)
        Image.fromarray(np.full((50, 60), i % 2, np.uint8)).save(root / entry.label)
    (root / "meta.json").write_text(json.dumps({"classes": ["even", "odd"]}))
    return entries


def loader(root: Path, entries: list[Entry], **options: object) -> SemiLoader:
    source = SegmentationDataset(root, entries, info=read_info(root))
    crops = [CropTransform(32, photometric=False)] * 2
    return SemiLoader(source, source, *crops, batch_size=2, seed=0, **options)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("harm", ["deleted", "cut", "emptied", "outside the classes", "of another size"])
def test_a_file_that_goes_bad_during_the_run_is_named(tmp_path: Path, workers: int, harm: str) -> None:
    entries = make_folder(tmp_path, 6)
    batches = loader(tmp_path, entries, num_workers=workers).iterate(0, 60)
    next(batches)
    for entry in entries:
        label = tmp_path / entry.label
        harmed = tmp_path / "harmed.png"  # a loading process reads meanwhile
        if harm == "deleted":
            label.unlink()
            continue
        if harm == "cut":
            harmed.write_bytes(label.read_bytes()[:50])
        elif harm == "emptied":
            harmed.write_bytes(b"")
        else:
            size, value = ((60, 50), 7) if harm == "outside the classes" else ((9, 9), 0)
            Image.new("L", size, value).save(harmed)
        harmed.replace(label)
    messages = {
        "deleted": "no such file",
        "cut": "cannot be read as an image",
        "emptied": "the file is empty",
        "outside the classes": r"holds \[7\], but the 2 classes of .* have the indices 0\.\.1",
        "of another size": "is 9x9; they must be equal",
    }
    with pytest.raises(DataError, match=rf"labels/\d\.png.*{messages[harm]}"):
        list(batches)


def test_hidden_labels_that_are_not_there_are_told_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lists of the public code name a label for every unlabeled image; training needs none of them."""
    entries = make_folder(tmp_path, 4)
    absent = [Entry(entry.image, f"absent/{i}.png") for i, entry in enumerate(entries)]
    labeled, unlabeled = (SegmentationDataset(tmp_path, x, info=read_info(tmp_path)) for x in (entries, absent))
    crops = [CropTransform(32, photometric=False)] * 2
    batches = SemiLoader(labeled, unlabeled, *crops, batch_size=2, seed=0, hidden_labels=True)
    batch = next(batches.iterate(0, 1))
    assert (batch.unlabeled_label == 255).all()
    assert (batch.label != 255).any()
    assert "absent/" in caplog.text


HOLDS_BATCHES = """
from pathlib import Path
from tests.faults.test_runs import loader, make_folder
folder = Path({folder!r})
batches = loader(folder, make_folder(folder, 6), num_workers=1).iterate(0, 60)
next(batches)
"""


def test_loading_processes_end_with_the_process_that_holds_them(tmp_path: Path) -> None:
    """They ignore SIGTERM, with which Python ends children at exit, and for which it then waits without a limit."""
    command = [sys.executable, "-c", HOLDS_BATCHES.format(folder=str(tmp_path))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from allspark_fast.__main__ import main
from tests.helpers.runs import tiny_arguments

ROOT = Path(__file__).parents[2]
EVERY_STEP = {"train.epochs": 1, "run.save-every": 1}


def run_python(*arguments: str) -> None:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
def test_disks_that_are_read_only_too_small_or_fill_up(tmp_path):
    """The first two are told before work starts; a full one loses nothing, and the run goes on once there is room."""
    mounted = ["unshare", "-rm"]
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], check=False).returncode:
        pytest.skip("needs unshare and the right to make namespaces")
    command = [*mounted, sys.executable, "-c", ON_DISKS, tmp_path, "train"]
    arguments = tiny_arguments(tmp_path / "run", EVERY_STEP)
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    errors = done.stderr
    assert done.returncode == 0, errors
    assert [line for line in done.stdout.splitlines() if line.startswith("status")] == ["status 1"] * 3 + ["status 0"]
    assert f"error: [Errno 30] Read-only file system: '{tmp_path}/run'" in errors
    assert "more checkpoints take at least" in errors[: errors.index("the first step took")]
    assert "was not written" in errors or "No space left on device" in errors
    assert "['step_00000001.pt']" in done.stdout
    assert "resumed at step 1 of 4" in errors
    assert "mIoU" in done.stdout
    assert "Traceback" not in errors


def test_a_limit_on_the_size_of_files(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, limits[1]))
    try:
        assert main(["train", *tiny_arguments(tmp_path, EVERY_STEP)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step_00000001.pt was not written" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_at_random_moments():
    """Four of the kills of ``python -m tests.faults.kill_and_resume``."""
    run_python("-m", "tests.faults.kill_and_resume", "--kills", "4", "--seed", "1")


HOLDS_BATCHES = """
from allspark_fast.data.loader import SemiLoader
from allspark_fast.data.scenes import ScenesDataset
from allspark_fast.data.transforms import CropTransform
scenes, crops = ScenesDataset(range(4), 40, 0), CropTransform(32, photometric=False)
batches = SemiLoader(scenes, scenes, crops, crops, batch_size=2, seed=0, num_workers=1).iterate(0, 60)
next(batches)
"""


@pytest.mark.slow
def test_workers_end_with_the_process_that_holds_them():
    """They ignore SIGTERM, with which Python ends children at exit, and for which it then waits without a limit."""
    run_python("-c", HOLDS_BATCHES)

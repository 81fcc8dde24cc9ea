import pytest
import torch

from allspark_fast.device import choose_device, limit_threads
from allspark_fast.errors import InputError


@pytest.mark.parametrize(("processes", "workers", "threads"), [(1, 0, 4), (1, 3, 3), (2, 1, 2), (8, 1, 1)])
def test_threads_leave_cpus_to_workers_and_other_processes(processes, workers, threads, monkeypatch):
    """Of six CPUs, where four threads were asked for."""
    monkeypatch.setattr("allspark_fast.device.available_cpus", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    torch.set_num_threads(4)
    limit_threads(workers)
    assert torch.get_num_threads() == threads


def test_devices(monkeypatch):
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto") == torch.device(device)
    with pytest.raises(InputError, match="device='cuda' requested, but no CUDA device is available"):
        choose_device("cuda")
    with pytest.raises(InputError, match="device must be one of auto, cpu, cuda, got 'gpu'"):
        choose_device("gpu")

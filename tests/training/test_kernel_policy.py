"""Which kernels a run uses: broken ones are named and replaced, results are remembered."""

from pathlib import Path

import pytest
import torch

from allspark_fast.__main__ import main
from allspark_fast.cli.recipe import parse_config
from allspark_fast.kernels import selftest, triton_support
from allspark_fast.kernels.channel_attention import channel_attention
from allspark_fast.training import kernel_policy
from allspark_fast.training.kernel_policy import select_kernels
from allspark_fast.training.log import read_metrics
from allspark_fast.training.trainer import Trainer
from tests.training.test_trainer import tiny_config

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("these tests interpret kernels", allow_module_level=True)

# isort: split
from allspark_fast.kernels.channel_attention import kernel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One case, a cache of its own, and nothing disabled before or after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[:1])
    monkeypatch.setattr(triton_support, "_disabled", set())


def break_forward(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    forward = kernel.forward

    def broken(*args: object) -> object:
        if how == "raises":
            raise RuntimeError("PassManager::run failed")
        output, lse = forward(*args)
        return output * 1.5, lse

    monkeypatch.setattr(kernel, "forward", broken)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Grows by one with each run of the self-test."""
    devices: list[torch.device] = []

    def counted(device: torch.device) -> list[selftest.Result]:
        devices.append(device)
        return selftest.check_kernels(device)

    monkeypatch.setattr(kernel_policy, "check_kernels", counted)
    return devices


@pytest.mark.parametrize(("how", "reason"), [("wrong", "wrong by"), ("raises", "PassManager::run failed")])
def test_a_broken_kernel_is_named_and_replaced(
    how: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_forward(monkeypatch, how)
    monkeypatch.setattr(triton_support, "_is_fast_on", lambda _: True)
    tensors = torch.randn(1, 1, 9, 16), torch.randn(1, 1, 9, 48), torch.randn(1, 1, 9, 48)
    expected = channel_attention(*tensors, backend="chunked")
    if how == "wrong":
        assert not torch.allclose(channel_attention(*tensors), expected)
    failures = select_kernels("auto", CPU)
    assert reason in failures["channel_attention"]
    assert "the Triton kernel of channel_attention fails here" in caplog.text
    assert reason in caplog.text
    torch.testing.assert_close(channel_attention(*tensors), expected)
    if how == "raises":
        with pytest.raises(RuntimeError, match="PassManager"):
            channel_attention(*tensors, backend="triton")


def test_strict_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_kernels("strict", CPU) == {}
    break_forward(monkeypatch, "raises")
    kernel_policy.check_and_remember(CPU)
    with pytest.raises(RuntimeError, match=r"strict, but these fail .*channel_attention \(.*PassManager::run failed"):
        select_kernels("strict", CPU)


def test_strict_needs_kernels_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "_INTERPRETED", False)
    assert select_kernels("auto", CPU) == {}
    with pytest.raises(RuntimeError, match="none can run: the device is cpu"):
        select_kernels("strict", CPU)


def test_torch_uses_no_kernel(monkeypatch: pytest.MonkeyPatch, runs: list[torch.device]) -> None:
    monkeypatch.setattr(triton_support, "_is_fast_on", lambda _: True)
    assert triton_support.prefers_triton("channel_attention", torch.ones(1))
    assert select_kernels("torch", CPU) == {}
    assert not any(triton_support.prefers_triton(op, torch.ones(1)) for op in triton_support.TRITON_OPS)
    assert not runs


def test_unknown_operator_is_refused() -> None:
    with pytest.raises(ValueError, match="'gram' has no Triton kernels; channel_attention"):
        triton_support.disable_triton("gram")


class TestCache:
    """Once for each machine and version."""

    def test_results_are_remembered(self, runs: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
        break_forward(monkeypatch, "wrong")
        first = select_kernels("auto", CPU)
        assert select_kernels("auto", CPU) == first != {}
        assert len(runs) == 1

    def test_another_version_is_checked(self, runs: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
        select_kernels("auto", CPU)
        monkeypatch.setattr(torch, "__version__", "99.0")
        select_kernels("auto", CPU)
        assert len(runs) == 2

    @pytest.mark.parametrize("text", ["", "[{}]", "nonsense", '["a"]'])
    def test_a_damaged_cache_is_named_and_ignored(
        self, text: str, runs: list[torch.device], caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        select_kernels("auto", CPU)
        (path,) = (tmp_path / "cache" / "allspark_fast").iterdir()
        path.write_text(text)
        assert select_kernels("auto", CPU) == {}
        assert f"{path} cannot be read" in caplog.text
        assert len(runs) == 2
        assert select_kernels("auto", CPU) == {}
        assert len(runs) == 2

    def test_a_cache_that_cannot_be_written_is_no_error(
        self, runs: list[torch.device], caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        (tmp_path / "cache").write_text("a file where the folder should be")
        assert select_kernels("auto", CPU) == {}
        assert "cannot be written" in caplog.text


def test_a_gpu_left_unusable_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    break_forward(monkeypatch, "raises")
    results = selftest.check_kernels(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(kernel_policy, "check_kernels", lambda _: results)
        patch.setattr(torch, "zeros", unusable)
        with pytest.raises(RuntimeError, match="channel_attention made the GPU unusable"):
            select_kernels("auto", CPU)
    assert "channel_attention" in select_kernels("auto", CPU)  # remembered


class TestCommandLine:
    """selftest, and the setting of a run."""

    def test_selftest(self, capsys: pytest.CaptureFixture[str], runs: list[torch.device]) -> None:
        for _ in range(2):
            assert main(["selftest"]) == 0
        printed = capsys.readouterr().out
        assert "channel_attention" in printed
        assert "Triton's interpreter ran the kernels" in printed
        assert len(runs) == 2  # never from the cache

    def test_a_failure_is_in_the_table_and_the_status(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        break_forward(monkeypatch, "raises")
        assert main(["selftest"]) == 1
        assert "PassManager::run failed" in capsys.readouterr().out

    def test_where_no_kernel_runs_the_reason_is_told(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(triton_support, "_INTERPRETED", False)
        assert main(["selftest"]) == 0
        assert "No Triton kernel ran: the device is cpu" in capsys.readouterr().out

    def test_setting(self) -> None:
        assert parse_config(["scenes", "--run.kernels", "torch"], "train")[1].run.kernels == "torch"


def test_a_run_records_what_was_replaced(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config("supervised"), tmp_path)
    trainer.replaced_kernels = {"channel_attention": "wrong"}
    trainer.total_steps = 0
    trainer.run()
    assert read_metrics(tmp_path)[0] == {"step": 0, "replaced_kernels": {"channel_attention": "wrong"}}

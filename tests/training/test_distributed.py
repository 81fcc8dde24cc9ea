"""Steps, collectives and evaluation on several gloo ranks, against one process that sees the same images."""

import copy
import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from allspark_fast.config import TrainConfig
from allspark_fast.data.loader import SemiBatch
from allspark_fast.distributed import failing_together, process_group, rank, world_size
from allspark_fast.errors import InputError, RunError
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy
from allspark_fast.model import build_segmentor
from allspark_fast.model.mit import compile_blocks
from allspark_fast.model.options import AllSparkOptions
from allspark_fast.training import cuda_graph
from allspark_fast.training.log import Record
from allspark_fast.training.pseudo_labels import pseudo_pass
from allspark_fast.training.setup import build_state, check_batch
from allspark_fast.training.sharding import gather_state
from allspark_fast.training.step import Losses, TrainState, train_step
from bench.bench_train_step import without_dropout
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import differences
from tests.helpers.steplog import logged_steps
from tests.helpers.steps import BEYOND

assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
STEPS = 3
TIMM = "timm/regnetx_002"


def make_state(memory_sync: str = "all", backbone: str = "mit_tiny", **options: Any) -> TrainState:
    """A tiny model without dropout, whose pseudo labels and memory treat each image alone."""
    torch.manual_seed(0)
    bottleneck = AllSparkOptions(memory_init="empty", memory_sync=memory_sync)
    model = build_segmentor(backbone, 3, (64, 64), allspark=bottleneck, embedding_dim=16)
    config = TrainConfig(**{"lr": 0.01, "kv_source": "image", "pseudo_padding": False, "ema": 0.9, **options})
    if config.compile == "on":
        compile_blocks(model, "aot_eager")
    return build_state(without_dropout(model), config, total_steps=10)


def make_batch(step: int, size: int, part: slice = slice(None), *, mixing: bool = False) -> SemiBatch:
    """Images of one step, of which very different numbers of pixels count; mixed at random if asked for."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(2, size, 3, 64, 64, generator=generator)
    label = torch.randint(3, (size, 64, 64), generator=generator)
    valid = torch.ones(size, 64, 64, dtype=torch.bool)
    for i in range(size):
        label[i, 10 + 40 * i // size :] = 255
        valid[i, :, 60 - 50 * i // size :] = False
    mixed, pasted = torch.rand(2, size, 64, 64, generator=generator) < 0.3
    masks = (mixed[part], (pasted & (label < 255))[part]) if mixing else ()
    return SemiBatch(*(x[part] for x in (images[0], label, images[1], valid)), None, None, *masks)


def own_part(size: int) -> slice:
    share = size // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def gathered(state: TrainState) -> dict[str, Any]:
    """A copy of all that a checkpoint holds; whole tensors on rank 0."""
    return copy.deepcopy(gather_state(state.state_dict()))


def train_steps(size: int, state: TrainState, take: Callable[..., Losses] | None = None) -> dict[str, Any]:
    """What some steps on this rank's part of the same images leave, and their losses."""
    take = take or functools.partial(train_step, state)
    mixing = state.config.cutmix > 0
    batches = [make_batch(step, size, own_part(size), mixing=mixing) for step in range(STEPS)]
    losses = [torch.stack(take(batch, use_memory=True)).clone() for batch in batches]
    return {**gathered(state), "losses": torch.stack(losses)}


def train_recorded_steps(size: int, report: Callable[[Record], object] | None = None, **options: Any) -> dict:
    """The same, but only the first step is ordinary."""
    state = make_state(**options)
    with patch.object(cuda_graph, "WARMUP_STEPS", 1):
        return train_steps(size, state, logged_steps(state, report=report))


def on_two_ranks() -> dict[str, Any]:
    """All that is looked at on two ranks, in one go, since processes are slow to start."""
    results: dict[str, Any] = {}
    for sharding in ("fsdp", "replicate"):
        results[sharding] = train_steps(2, state := make_state(sharding=sharding))
        results[f"{sharding} memory"] = dict(state.model.decoder.allspark.attn.named_buffers())
        results[f"{sharding} evaluated"] = dict(state.evaluated_model().state_dict())
        results[f"recorded {sharding}"] = train_recorded_steps(2, sharding=sharding)
    found: list[Record] = []
    for memory_sync in ("rank0", "all"):
        train_recorded_steps(2, found.append, memory_sync=memory_sync)
    results["errors of replays"] = [x["recorded_step"]["error"] for x in found]
    results["compiled"] = train_steps(2, make_state(sharding="fsdp", compile="on"))
    results["beyond"] = train_steps(4, make_state(sharding="fsdp", **BEYOND))
    results["mean per rank"] = train_steps(2, make_state(loss_mean="rank"))["losses"]
    results[TIMM] = train_steps(2, make_state(backbone=TIMM))
    results["skipped"] = skip_a_step()
    results["saved"] = save_before_and_after_an_evaluation()
    results["error"] = fail_on_rank0()
    return results


def skip_a_step() -> bool:
    """Whether all is as it was after a step in which one rank's images were not finite."""
    state = make_state(sharding="fsdp")
    before = {name: x.clone() for name, x in state.model.named_parameters()}
    batch = make_batch(0, 2, own_part(2))
    if rank() == 1:
        batch.image.fill_(float("nan"))
    train_step(state, batch, use_memory=True)
    unchanged = all(torch.equal(x.to_local(), before[name].to_local()) for name, x in state.model.named_parameters())
    return unchanged and state.skipped == 1


def save_before_and_after_an_evaluation() -> list[dict[str, Any]]:
    """What a checkpoint holds; a forward pass without backward, as pseudo labels take, leaves parameters gathered."""
    state, batch = make_state(sharding="fsdp"), make_batch(0, 2, own_part(2))
    train_step(state, batch, use_memory=True)
    before = gathered(state)
    pseudo_pass(state.model, batch, state.config)
    return [before, gathered(state)]


def fail_on_rank0() -> str:
    try:
        with failing_together():
            if rank() == 0:
                raise OSError("no room")
    except (OSError, RunError) as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_on_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestTwoRanks:
    """Two ranks with an image each, and one process with both."""

    @pytest.mark.parametrize("sharding", ["fsdp", "replicate"])
    def test_steps_equal_those_of_one_process(self, results, sharding):
        state = make_state()
        expected = train_steps(2, state)
        assert_close(results[0][sharding], expected)
        assert_close(results[0]["compiled"], expected)
        assert torch.equal(results[0][sharding]["losses"], results[1][sharding]["losses"])
        for result in results:
            assert_close(result[f"{sharding} evaluated"], dict(state.evaluated_model().state_dict()))
        # The memory has the same bits everywhere.
        memory, other = (result[f"{sharding} memory"] for result in results)
        assert memory.keys() >= {"kv_queue", "queue_ptr", "queue_filled"}
        assert all(torch.equal(x, other[name]) for name, x in memory.items())
        assert torch.equal(memory["queue_ptr"], state.model.decoder.allspark.attn.queue_ptr)

    def test_an_averaged_teacher_and_thresholds_of_classes(self, results):
        assert_close(results[0]["beyond"], train_steps(4, make_state(**BEYOND)))

    @pytest.mark.parametrize("sharding", ["fsdp", "replicate"])
    def test_recorded_steps_with_their_collectives(self, results, sharding):
        for result in results:
            assert differences(result[f"recorded {sharding}"], result[sharding]) == []
            assert result["errors of replays"] == [0, 0]

    def test_means_over_pixels_of_each_rank(self, results):
        """The public code's: pixels count more on the rank that has fewer."""

        def mean_of_images(logits: Tensor, label: Tensor, **options: Any) -> Tensor:
            pairs = zip(logits.split(1), label.split(1), strict=True)
            return torch.stack([upsample_cross_entropy(*pair, **options) for pair in pairs]).mean()

        with patch("allspark_fast.training.step.upsample_cross_entropy", mean_of_images):
            expected = train_steps(2, make_state())["losses"]
        means = torch.stack([result["mean per rank"] for result in results]).mean(0)
        assert_close(means, expected)
        assert (means - results[0]["replicate"]["losses"]).abs().max() > 1e-4

    def test_batch_norm_of_an_encoder_is_synchronized(self, results):
        assert_close(results[0][TIMM], train_steps(2, make_state(backbone=TIMM)))

    def test_an_evaluation_changes_nothing_that_is_saved(self, results):
        assert differences(*results[0]["saved"]) == []

    def test_all_skip_a_step_or_fail_where_one_does(self, results):
        assert all(result["skipped"] for result in results)
        assert [result["error"] for result in results] == ["no room", "another rank has failed, its message tells why"]


def on_four_ranks() -> list[dict[str, Any]]:
    recorded = [train_recorded_steps(4, sharding=sharding) for sharding in ("fsdp", "replicate")]
    return [train_steps(4, make_state(sharding="fsdp")), *recorded]


@pytest.mark.slow
def test_four_ranks_equal_one_process(tmp_path):
    """One of them has no part of what has a row for each of the three classes."""
    expected = train_steps(4, make_state())
    for actual in run_on_ranks(on_four_ranks, 4, tmp_path)[0]:
        assert_close(actual, expected)


def test_restarts_that_would_hang_are_refused(monkeypatch):
    """Those on one host are in tests/training/test_distributed_runs.py."""
    places = {"RANK": "0", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "1"}
    for name, value in {**places, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    group = process_group("cpu", 1)
    with pytest.raises(InputError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"), group:
        pass


def test_a_batch_that_ranks_cannot_share(monkeypatch):
    monkeypatch.setattr("allspark_fast.training.setup.world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"train.batch_size 8 .* by 3 processes with 2 .* multiple of 6"):
        check_batch(TrainConfig(batch_size=8, gradient_accumulation_steps=2))

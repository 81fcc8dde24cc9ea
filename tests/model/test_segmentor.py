"""The whole model: encoder and head against plain forms, what is kept for backward, sizes, precision, compilation."""

import copy
import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from allspark_fast.model import MIT_CONFIGS, MixTransformer, SegFormerHead, build_segmentor
from allspark_fast.model.mit import MixFFN
from bench.harness import saved_bytes
from bench.step_cost import FORMULAS
from tests.helpers.forbid_sync import forbid_sync


def features(channels: tuple[int, ...] = (4, 6, 8, 10)) -> list[Tensor]:
    sizes = [(12, 18), (6, 9), (3, 5), (2, 3)]
    return [torch.randn(2, c, *size) for c, size in zip(channels, sizes, strict=True)]


class TestHead:
    """The multiplied-out head is the official one."""

    def uncollapsed(self, head: SegFormerHead, maps: list[Tensor]) -> Tensor:
        layers = (head.linear_c1, head.linear_c2, head.linear_c3, head.linear_c4)
        projected = []
        for layer, x in zip(layers, maps, strict=True):
            low = layer.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            projected.append(F.interpolate(low, maps[0].shape[2:], mode="bilinear", align_corners=False))
        fused = head.linear_fuse.conv(torch.cat(projected[::-1], 1))
        return head.linear_pred(head.dropout(F.relu(head.linear_fuse.bn(fused))))

    def test_deterministic_upsampling_is_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        head = SegFormerHead((4, 6, 8, 10), 5, 16, dropout=0.0)
        sizes = [(4, 33, 29), (6, 17, 15), (8, 9, 8), (10, 5, 4)]
        maps = [torch.randn(2, *size, requires_grad=True) for size in sizes]
        results = []
        for deterministic in (False, True):
            monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda x=deterministic: x)
            with patch("torch.nn.functional.interpolate", wraps=torch.nn.functional.interpolate) as interpolate:
                logits = head(maps)
            assert interpolate.called is not deterministic
            results.append([logits, *torch.autograd.grad(logits.square().sum(), maps)])
        for x, expected in zip(*results, strict=True):
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("train", [True, False])
    def test_equals_the_uncollapsed_head(self, train: bool) -> None:
        head = SegFormerHead((4, 6, 8, 10), 5, 16, dropout=0.0).double().train(train)
        norm = head.linear_fuse.bn
        for statistic in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            statistic.uniform_(0.5, 1.5)
        maps = [x.double().requires_grad_() for x in features()]
        results = []
        for forward in (head, lambda x: self.uncollapsed(head, x)):
            output = forward(maps)
            leaves = [*maps, *head.parameters()]
            grads = torch.autograd.grad(output.square().sum(), leaves)
            results.append((output, *grads))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)

    def test_dropout_drops_whole_channels_of_each_sample(self) -> None:
        head = SegFormerHead((4, 6, 8, 10), 5, 16, dropout=0.5)
        maps = features()
        torch.manual_seed(1)
        actual = head(maps)
        torch.manual_seed(1)
        kept = F.dropout(torch.ones(2, 16), 0.5)[..., None, None]
        assert 0 < (kept == 0).sum() < kept.numel()
        fused = F.relu(head.linear_fuse.bn(head._fuse(maps)))
        expected = head.linear_pred(fused * kept)
        torch.testing.assert_close(actual, expected)
        # Backward computes the fused map again, but has to drop the same channels.
        grads = [torch.autograd.grad(x.square().sum(), head.parameters()) for x in (actual, expected)]
        torch.testing.assert_close(*grads)

    def test_keeps_one_map_and_updates_statistics_once(self) -> None:
        head = SegFormerHead((4, 6, 8, 10), 5, 512)
        maps = features()
        own = [*head.parameters(), *head.buffers(), *maps]
        fused = head._fuse(maps)
        mean, var = fused.mean((0, 2, 3)), fused.var((0, 2, 3))
        # Beyond it weights of each sample, and the products of weights.
        assert saved_bytes(lambda: head(maps), beyond=own) < 1.3 * 4 * fused.numel()
        head.linear_fuse.bn.reset_running_stats()
        head(maps).sum().backward()
        assert head.linear_fuse.bn.num_batches_tracked == 1
        torch.testing.assert_close(head.linear_fuse.bn.running_mean, 0.1 * mean)
        torch.testing.assert_close(head.linear_fuse.bn.running_var, 0.9 + 0.1 * var)

    def test_frozen_statistics_stay(self) -> None:
        head = SegFormerHead((4, 6, 8, 10), 5, 16, dropout=0.0)
        maps = features()
        head.linear_fuse.bn.eval()
        before = {name: x.clone() for name, x in head.state_dict().items()}
        torch.testing.assert_close(head(maps), self.uncollapsed(head, maps))
        torch.testing.assert_close(head.state_dict(), before)

    def test_autocast_stays_close_to_float32(self) -> None:
        head = SegFormerHead((4, 6, 8, 10), 5, 64).eval()
        maps = features()
        expected = head(maps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = head(maps)
        assert (actual - expected).abs().max() < 0.03 * expected.abs().max()


class TestMixFFN:
    """Backward computes convolution and GELU again."""

    def test_is_the_plain_formula(self) -> None:
        ffn = MixFFN(4, 16).double()
        tokens = torch.randn(2, 15, 4, dtype=torch.float64, requires_grad=True)
        hidden = ffn.fc1(tokens).transpose(1, 2).reshape(2, 16, 3, 5)
        expected = ffn.fc2(F.gelu(ffn.dwconv.dwconv(hidden)).flatten(2).transpose(1, 2))
        actual = ffn(tokens, (3, 5))
        torch.testing.assert_close(actual, expected)
        leaves = [tokens, *ffn.parameters()]
        grads = [torch.autograd.grad(x.square().sum(), leaves) for x in (actual, expected)]
        torch.testing.assert_close(*grads)
        assert torch.autograd.gradcheck(lambda x: ffn(x, (3, 5)), tokens)

    def test_keeps_the_hidden_layer_once_and_multiplies_once(self) -> None:
        ffn, tokens = MixFFN(8, 32), torch.randn(2, 15, 8, requires_grad=True)
        assert saved_bytes(lambda: ffn(tokens, (3, 5)), beyond=[tokens, *ffn.parameters()]) == 4 * 2 * 15 * 32
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            ffn(tokens, (3, 5)).sum().backward()
        counts = counter.get_flop_counts()["Global"]
        linears, convolution = 2 * 2 * (2 * 15 * 8 * 32), 2 * (2 * 15 * 32 * 9)
        assert counts[torch.ops.aten.addmm] == linears
        assert counts[torch.ops.aten.convolution] == 2 * convolution


class TestEncoder:
    """Mix Transformers."""

    def test_too_small_images_are_named(self) -> None:
        with pytest.raises(ValueError, match="images are 28 x 64 pixels, expected at least 29"):
            MixTransformer(MIT_CONFIGS["mit_b0"])(torch.randn(1, 3, 28, 64))

    # Parameters of the released encoders without classification head, in millions (SegFormer, table 6).
    @pytest.mark.parametrize(
        ("name", "millions"),
        [("mit_b0", 3.3), ("mit_b1", 13.2), ("mit_b2", 24.2), ("mit_b3", 44.1), ("mit_b4", 60.8), ("mit_b5", 81.4)],
    )
    def test_parameter_counts(self, name: str, millions: float) -> None:
        with torch.device("meta"):
            encoder = MixTransformer(MIT_CONFIGS[name])
        assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)

    @pytest.mark.parametrize("size", [(65, 65), (64, 96), (33, 130), (29, 257)])
    def test_sizes(self, size: tuple[int, int]) -> None:
        encoder = MixTransformer(MIT_CONFIGS["mit_b0"]).eval()
        with torch.no_grad():
            maps = encoder(torch.randn(1, 3, *size))
        expected = [tuple(math.ceil(side / stride) for side in size) for stride in (4, 8, 16, 32)]
        assert [tuple(x.shape[2:]) for x in maps] == expected
        assert encoder.deepest_size(size) == expected[-1]

    @pytest.mark.parametrize(("crop", "side"), [(513, 17), (801, 26)])
    def test_official_crops_give_the_official_memory(self, crop: int, side: int) -> None:
        with torch.device("meta"):
            model = build_segmentor("mit_b0", 21, (crop, crop))
        assert model.decoder.allspark.attn.kv_queue.shape == (21, 256, side * side)

    def test_drop_path_grows_and_keeps_the_mean(self) -> None:
        encoder = MixTransformer(MIT_CONFIGS["mit_b0"])
        rates = [block.drop_path for stage in range(1, 5) for block in getattr(encoder, f"block{stage}")]
        torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.1, 8))
        block = encoder.block4[1].train()
        scale = block._branch_scale(torch.ones(20000, 1, 1))
        assert scale.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
        assert scale.mean().item() == pytest.approx(1, abs=0.02)

    def test_checkpointed_blocks_change_no_number_and_keep_less(self) -> None:
        plain = MixTransformer(MIT_CONFIGS["mit_tiny"])
        for block in (getattr(plain, f"block{stage}")[0] for stage in range(1, 5)):
            block.drop_path = 0.5
        checkpointed = copy.deepcopy(plain)
        checkpointed.checkpoint_blocks = True
        images = torch.randn(4, 3, 64, 64)
        for encoder in (plain, checkpointed):
            torch.manual_seed(1)
            sum(x.square().sum() for x in encoder(images)).backward()
        for expected, actual in zip(plain.parameters(), checkpointed.parameters(), strict=True):
            assert torch.equal(actual.grad, expected.grad)
        kept = [saved_bytes(lambda x=x: x(images)[-1], beyond=x.parameters()) for x in (plain, checkpointed)]
        assert kept[1] < kept[0] / 2


def training_step(model: torch.nn.Module, crop: tuple[int, int]) -> Tensor:
    unlabeled = torch.randn(2, 3, *crop)
    with torch.no_grad():
        class_logits = model.eval()(unlabeled, attend="batch")
    return model.train()(torch.cat([torch.randn(2, 3, *crop), unlabeled]), class_logits, use_memory=True)


def test_rectangular_crops_train() -> None:
    model = build_segmentor("mit_b0", 3, (64, 97), embedding_dim=16)
    logits = training_step(model, (64, 97))
    assert logits.shape == (4, 3, 16, 25)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_without_allspark_it_is_segformer() -> None:
    model = build_segmentor("mit_b0", 3, (64, 64), allspark=False, embedding_dim=16)
    assert not any("allspark" in name for name in model.state_dict())
    assert model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 3, 16, 16)


def test_bfloat16_autocast_trains_and_keeps_the_memory_in_float32() -> None:
    model = build_segmentor("mit_b0", 3, (64, 64), embedding_dim=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = training_step(model, (64, 64))
    logits.float().square().mean().backward()
    assert model.decoder.allspark.attn.kv_queue.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_no_host_sync_in_forward_and_backward() -> None:
    model = build_segmentor("mit_b0", 3, (64, 64), embedding_dim=16)
    with forbid_sync():
        training_step(model, (64, 64)).sum().backward()


@pytest.mark.parametrize("checkpoint_blocks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_compiles_as_one_graph(checkpoint_blocks: bool) -> None:
    model = build_segmentor("mit_tiny", 3, (64, 64), embedding_dim=16, checkpoint_blocks=checkpoint_blocks)
    for module in model.modules():  # random choices are drawn in another order when compiled
        for name in ("dropout", "drop_path"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.decoder.decoder.dropout.p = 0.0
    compiled = copy.deepcopy(model)
    images, class_logits = torch.randn(4, 3, 64, 64), torch.randn(2, 3, 16, 16)
    outputs = [
        run(images, class_logits, use_memory=True)
        for run in (torch.compile(compiled, fullgraph=True, backend="aot_eager"), model)
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    for name, x in model.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name).grad, x.grad, rtol=1e-3, atol=1e-6, msg=name)
    torch.testing.assert_close(compiled.state_dict(), model.state_dict())


def test_unknown_backbone() -> None:
    with pytest.raises(ValueError, match=r"mit_b0, .*mit_b5, or timm/NAME, got 'resnet50'"):
        build_segmentor("resnet50", 3, (64, 64))

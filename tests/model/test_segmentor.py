"""The whole model: head and encoder against plain forms, what is kept for backward, sizes, precision, compilation."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from allspark_fast.errors import InputError
from allspark_fast.model import AllSpark, AllSparkOptions
from allspark_fast.model.mit import MIT_CONFIGS, Block, MixFFN, MixTransformer
from allspark_fast.model.segformer_head import SegFormerHead
from bench.harness import saved_bytes
from tests.helpers.models import tiny_segmentor, training_logits

CHANNELS = (4, 6, 8, 10)


def random_maps() -> list[Tensor]:
    sizes = [(12, 18), (6, 9), (3, 5), (2, 3)]
    return [torch.randn(2, c, *size, requires_grad=True) for c, size in zip(CHANNELS, sizes, strict=True)]


def fuse(head: SegFormerHead, maps: list[Tensor]) -> Tensor:
    """The input of the head's BatchNorm, as the reference implementation computes it."""
    layers = (head.linear_c1, head.linear_c2, head.linear_c3, head.linear_c4)
    projected = []
    for layer, x in zip(layers, maps, strict=True):
        low = layer.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        projected.append(F.interpolate(low, maps[0].shape[2:], mode="bilinear", align_corners=False))
    return head.linear_fuse.conv(torch.cat(projected[::-1], 1))


class TestHead:
    def test_frozen_statistics(self):
        """Training and eval mode: tests/test_golden.py."""
        head = SegFormerHead(CHANNELS, 5, 16, dropout=0.0).double()
        norm = head.linear_fuse.bn.eval()
        for statistic in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            statistic.uniform_(0.5, 1.5)
        before = copy.deepcopy(head.state_dict())
        maps = [x.detach().double().requires_grad_() for x in random_maps()]
        leaves = [*maps, *head.parameters()]
        expected = head.linear_pred(F.relu(norm(fuse(head, maps))))
        actual = head(maps)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), leaves) for x in (actual, expected)))
        torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)

    def test_dropout_drops_whole_channels_of_each_sample(self):
        head = SegFormerHead(CHANNELS, 5, 16, dropout=0.5)
        maps = random_maps()
        torch.manual_seed(1)
        actual = head(maps)
        torch.manual_seed(1)
        kept = F.dropout(torch.ones(2, 16), 0.5)[..., None, None]
        assert 0 < (kept == 0).sum() < kept.numel()
        expected = head.linear_pred(F.relu(head.linear_fuse.bn(fuse(head, maps))) * kept)
        torch.testing.assert_close(actual, expected)
        # Backward computes the fused map again, but has to drop the same channels.
        grads = [torch.autograd.grad(x.square().sum(), head.parameters()) for x in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)

    def test_keeps_one_map(self):
        head, maps = SegFormerHead(CHANNELS, 5, 512), random_maps()
        # Beyond it weights of each sample, and the products of weights.
        own = [*head.parameters(), *head.buffers(), *maps]
        assert saved_bytes(lambda: head(maps), beyond=own) < 1.3 * 4 * fuse(head, maps).numel()

    def test_autocast_stays_close_to_float32(self):
        head = SegFormerHead(CHANNELS, 5, 64).eval()
        maps = random_maps()
        expected = head(maps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = head(maps)
        assert (actual - expected).abs().max() < 0.03 * expected.abs().max()


def test_mix_ffn_keeps_the_hidden_layer_once_and_multiplies_once():
    ffn, tokens = MixFFN(8, 32), torch.randn(2, 15, 8, requires_grad=True)
    assert saved_bytes(lambda: ffn(tokens, (3, 5)), beyond=[tokens, *ffn.parameters()]) == 4 * 2 * 15 * 32
    with FlopCounterMode(display=False) as counter:
        ffn(tokens, (3, 5)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    linears, convolution = 2 * 2 * (2 * 15 * 8 * 32), 2 * (2 * 15 * 32 * 9)
    assert counts[torch.ops.aten.addmm] == linears
    assert counts[torch.ops.aten.convolution] == 2 * convolution


class TestEncoder:
    # Parameters of the released encoders without classification head, in millions (SegFormer, table 6).
    @pytest.mark.parametrize(
        ("name", "millions"),
        [("mit_b0", 3.3), ("mit_b1", 13.2), ("mit_b2", 24.2), ("mit_b3", 44.1), ("mit_b4", 60.8), ("mit_b5", 81.4)],
    )
    def test_parameter_counts(self, name, millions):
        with torch.device("meta"):
            encoder = MixTransformer(MIT_CONFIGS[name])
        assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)

    @pytest.mark.parametrize("size", [(65, 65), (29, 257)])
    def test_sizes(self, size):
        encoder = MixTransformer(MIT_CONFIGS["mit_tiny"])
        expected = [tuple(math.ceil(side / stride) for side in size) for stride in (4, 8, 16, 32)]
        assert [tuple(x.shape[2:]) for x in encoder(torch.randn(1, 3, *size))] == expected
        assert encoder.deepest_size(size) == expected[-1]
        assert encoder.min_size == 29
        with pytest.raises(ValueError, match="images are 28 x 64 pixels, expected at least 29"):
            encoder(torch.randn(1, 3, 28, 64))
        with pytest.raises(InputError, match=r"crop_size is \(64, 28\), expected at least 29 pixels a side"):
            tiny_segmentor(crop=(64, 28))

    def test_drop_path_grows_and_keeps_the_mean(self):
        encoder, images = MixTransformer(MIT_CONFIGS["mit_b0"]), torch.empty(20000, 3, 1, 1)
        scales = encoder.draw_scales(images)
        assert [x.shape for x in scales] == 8 * [(2, 20000, 1, 1)]
        for scale, rate in zip(scales, torch.linspace(0, 0.1, 8).tolist(), strict=True):
            assert scale.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)] if rate else [1.0])
            torch.testing.assert_close(scale.mean((1, 2, 3)), torch.ones(2), rtol=0, atol=0.02)
        assert encoder.eval().draw_scales(images) == 8 * [None]

    def test_scales_drop_a_branch_of_a_sample(self):
        block, tokens = Block(8, 2, 1), torch.randn(3, 6, 8)
        scales = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0]])[..., None, None]
        attended = tokens + scales[0] * block.attn(block.norm1(tokens), (2, 3))
        expected = attended + scales[1] * block.mlp(block.norm2(attended), (2, 3))
        torch.testing.assert_close(block(tokens, (2, 3), scales), expected)

    def test_checkpointed_blocks_change_no_number_and_keep_less(self):
        plain = MixTransformer(MIT_CONFIGS["mit_tiny"])
        plain.drop_path = 0.5
        checkpointed = copy.deepcopy(plain)
        checkpointed.activation_checkpointing = True
        images = torch.randn(4, 3, 64, 64)
        for encoder in (plain, checkpointed):
            torch.manual_seed(1)
            sum(x.square().sum() for x in encoder(images)).backward()
        for expected, actual in zip(plain.parameters(), checkpointed.parameters(), strict=True):
            assert torch.equal(actual.grad, expected.grad)
        kept = [saved_bytes(lambda x=x: x(images)[-1], beyond=x.parameters()) for x in (plain, checkpointed)]
        assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("use_memory", [False, True])
def test_a_training_step_on_a_rectangular_crop_reaches_every_parameter(use_memory):
    model = tiny_segmentor(crop=(64, 97))
    logits = training_logits(model, (64, 97), use_memory=use_memory)
    assert logits.shape == (4, 3, 16, 25)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.slow
def test_the_bottleneck_compiles_with_inductor():
    """The operators keep the strides that they promise: generated code relies on them."""
    torch._dynamo.reset()
    module = AllSpark(8, 3, 9, AllSparkOptions(dropout=0.0, memory_init="empty"))
    compiled = copy.deepcopy(module)
    compiled.compile(fullgraph=True, backend="inductor")
    inputs = torch.randn(4, 8, 3, 3), torch.randn(2, 3, 16, 16)
    outputs = [x(*inputs, use_memory=True) for x in (compiled, module)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    grads = [
        torch.autograd.grad(y.square().mean(), x.parameters()) for x, y in zip((compiled, module), outputs, strict=True)
    ]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(compiled.state_dict(), module.state_dict())

"""Parity with the reference implementation on every golden file, as close as float32 itself allows.

Each test computes the values of a file twice, in float32 and in float64. A float32 value must agree with the file to
1e-5 of the tensor's largest entry, or to ten times the float32 noise of that tensor. The noise is what the file's meta
records, or the difference between our two runs. That is large where a gradient is zero up to rounding (a bias before
BatchNorm), and cannot hide an error of ours, since it does not involve the file's value.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from allspark_fast.config import TrainConfig
from allspark_fast.data.loader import SemiBatch
from allspark_fast.inference.metrics import ConfusionMatrix
from allspark_fast.kernels.semantic_memory import channel_semantic_grouping
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy
from allspark_fast.model import AllSpark, Segmentor
from allspark_fast.model.cross_attention import CrossAttention
from allspark_fast.model.mit import MiTConfig, MixTransformer
from allspark_fast.model.options import AllSparkOptions
from allspark_fast.model.segformer_head import SegFormerHead
from allspark_fast.model.segmentor import Decoder
from allspark_fast.model.semantic_memory import token_class_map
from allspark_fast.training.step import TrainState, poly_lr, train_step

FOLDERS = [Path(__file__).parent / "golden", *map(Path, filter(None, [os.environ.get("ALLSPARK_GOLDEN_DIR")]))]
FILES = {path.name: path for folder in FOLDERS for path in sorted(folder.glob("*.npz"))}
Results = dict[str, Tensor]


class Golden:
    """One golden file, its float tensors in the dtype asked for."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        with np.load(FILES[name], allow_pickle=False) as file:
            self.meta = json.loads(str(file["meta"]))
            tensors = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        self.tensors = {key: x.to(dtype) if x.is_floating_point() else x for key, x in tensors.items()}
        self.dtype = dtype

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key].clone()

    def load(self, module: nn.Module, prefix: str = "w/", **buffers: Tensor) -> None:
        state = {key.removeprefix(prefix): self[key] for key in self.tensors if key.startswith(prefix)}
        state = {key: x[0] if key.endswith("num_batches_tracked") else x for key, x in state.items()}
        module.to(self.dtype).load_state_dict({**state, **buffers})

    def gradients(self, prefix: str, inputs: Results, module: nn.Module) -> Results:
        """Return the gradients of every tensor for which the file holds one."""
        # Eval mode skips the unlabeled branch, whose gradients the file holds as zeros.
        leaves = [*inputs.items(), *module.named_parameters()]
        grads = {key: torch.zeros_like(x) if x.grad is None else x.grad for key, x in leaves}
        names = [key for key in self.tensors if key.startswith(f"{prefix}g/")]
        assert names
        return {key: grads[key.removeprefix(f"{prefix}g/")][: len(self.tensors[key])] for key in names}

    def noise(self, key: str) -> float:
        mode, _, name = key.rpartition("/g/") if "/g/" in key else key.partition("/")
        recorded = self.meta.get("noise", {})
        return recorded.get(mode, recorded).get(name, 0.0) if isinstance(recorded, dict) else 0.0


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=1e-30)).item()


def options(meta: dict) -> AllSparkOptions:
    return AllSparkOptions(num_heads=meta["heads"], dropout=0.0)


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)


def memory_results(attention: CrossAttention) -> Results:
    return {"queue_after": attention.kv_queue, "ptr_after": attention.queue_ptr}


def cross_attention_results(golden: Golden) -> Results:
    meta = golden.meta
    side = round(meta["N"] ** 0.5)
    class_map = token_class_map(golden["prob_map"], (side, side))
    results = {"channel_cls": channel_semantic_grouping(golden["emb"][meta["B"] :], class_map)}
    for mode in meta["modes"]:
        attention = CrossAttention(meta["C"], meta["K"], meta["N"], options(meta))
        golden.load(attention, kv_queue=golden["queue_before"], queue_ptr=golden["ptr_before"])
        attention.train(mode != "eval")
        emb = golden["emb"].requires_grad_()
        output = torch.cat(attention(*emb.chunk(2), class_map, use_memory=mode == "memory"))
        output.backward(golden["cotangent"])
        results |= {f"{mode}/out": output.detach(), **golden.gradients(f"{mode}/", {"emb": emb}, attention)}
        # Features are inputs here: the memory holds them bit for bit.
        assert torch.equal(attention.kv_queue, golden["queue_after"])
        results["ptr_after"] = attention.queue_ptr
    return results


def bottleneck_results(golden: Golden) -> Results:
    meta = golden.meta
    results: Results = {}
    for mode in meta["modes"]:
        bottleneck = AllSpark(meta["C"], meta["K"], meta["n"] ** 2, options(meta))
        golden.load(bottleneck)
        rect = "_rect" if mode == "eval_rect" else ""
        inputs = {f"en{rect}": golden[f"en{rect}"].requires_grad_()}
        feature_map = inputs[f"en{rect}"]
        if mode.startswith("eval"):
            output = bottleneck.eval()(feature_map[: meta["B"]], kv_source="batch")
        else:
            output = bottleneck(feature_map, golden["prob_map"], use_memory=mode == "memory")
            results |= memory_results(bottleneck.attn)
        output.backward(golden[f"cotangent{rect}"][: len(output)])
        inputs["en"] = feature_map  # the stored gradient is named en for either input
        results |= {f"{mode}/out": output.detach(), **golden.gradients(f"{mode}/", inputs, bottleneck)}
    return results


def decoder_results(golden: Golden) -> Results:
    meta = golden.meta
    results: Results = {}
    for mode in meta["modes"]:
        tokens = (meta["image_size"] // 32 + 1) ** 2
        bottleneck = AllSpark(meta["planes"][-1], meta["K"], tokens, options(meta))
        head = SegFormerHead(meta["planes"], meta["K"], meta["embedding_dim"], dropout=0.0)
        decoder = Decoder(head, bottleneck)
        golden.load(decoder)
        features = {f"feat{i}": golden[f"feat{i}"].requires_grad_() for i in range(1, 5)}
        if mode == "eval":
            logits = decoder.eval()([x[: meta["B"]] for x in features.values()], kv_source="batch")
        else:
            logits = decoder(list(features.values()), golden["prob_map"], use_memory=mode == "memory")
            results |= memory_results(bottleneck.attn)
        output = upsample(logits, (meta["out_hw"], meta["out_hw"]))
        output.backward(golden["cotangent"][: len(output)])
        results |= {f"{mode}/out": output.detach(), **golden.gradients(f"{mode}/", features, decoder)}
        results[f"{mode}/bn_mean_after"] = head.linear_fuse.bn.running_mean
        results[f"{mode}/bn_var_after"] = head.linear_fuse.bn.running_var
    return results


def build_model(meta: dict) -> Segmentor:
    config = {name: tuple(sizes) for name, sizes in meta["cfg"].items()}
    encoder = MixTransformer(MiTConfig(**config, drop_path=0.0))
    height, width = encoder.deepest_size((meta["crop"], meta["crop"]))
    bottleneck = AllSpark(encoder.channels[-1], meta["K"], height * width, options(meta))
    head = SegFormerHead(encoder.channels, meta["K"], meta["embedding_dim"], dropout=0.0)
    return Segmentor(encoder, Decoder(head, bottleneck))


def model_results(golden: Golden) -> Results:
    meta = golden.meta
    size = (meta["crop"], meta["crop"])
    model = build_model(meta)
    golden.load(model)
    unlabeled = golden["x"][meta["B"] :]
    with torch.no_grad():
        model.eval()
        class_logits = model(unlabeled, kv_source="batch")
        rect = golden["eval_rect_x"]
        results = {
            "logits_u_eval": upsample(class_logits, size),
            "eval_b1": upsample(model(unlabeled[:1]), size),
            "eval_rect_out": upsample(model(rect), rect.shape[2:]),
        }
        results |= {f"feat{i}_u": feature for i, feature in enumerate(model.backbone(unlabeled), 1)}
    logits = model.train()(golden["x"], class_logits, use_memory=True)
    results["train_out"] = upsample(logits, size).detach()
    targets = golden["y"].long().chunk(2)
    losses = [upsample_cross_entropy(*pair) for pair in zip(logits.chunk(2), targets, strict=True)]
    loss = sum(losses) / 2
    loss.backward()
    norm = model.decoder.decoder.linear_fuse.bn
    results |= {"loss": loss.detach()[None], **golden.gradients("", {}, model)}
    results |= {"bn_mean_after": norm.running_mean, "bn_var_after": norm.running_var}
    return results | memory_results(model.decoder.allspark.attn)


def loss_and_metric_results(golden: Golden) -> Results:
    confusion = ConfusionMatrix(len(golden["iou/inter"]))
    confusion.update(golden["iou/pred"], golden["iou/target"])
    assert torch.equal(
        confusion.compute().by_class["iou"], golden["iou/inter"] / golden["iou/union"].clamp(min=1).double()
    )
    rates = golden.tensors["lr/backbone_by_step"]
    ours = poly_lr(torch.arange(len(rates)), len(rates), 0.001)
    torch.testing.assert_close(ours, rates.double(), rtol=1e-6, atol=0)
    matrix = confusion.compute().confusion
    results = {"iou/inter": matrix.diagonal(), "iou/target_area": matrix.sum(1)}
    for case in sorted({key.split("/")[0] for key in golden.tensors if key.startswith("ohem")}):
        min_kept, threshold = golden[f"{case}/cfg"].tolist()
        logits = golden[f"{case}/pred"].requires_grad_()
        target = golden[f"{case}/y"].long()
        loss = upsample_cross_entropy(logits, target, ohem_threshold=round(threshold, 6), ohem_min_kept=int(min_kept))
        loss.backward()
        results |= {f"{case}/loss": loss.detach()[None], f"{case}/grad": logits.grad}
    return results


# By prefix of the files: what computes their tensors, and the pattern of those that it must compute.
RESULTS = {
    "a_": (cross_attention_results, "ptr_after"),
    "b_allspark": (bottleneck_results, "ptr_after"),
    "b_semidecoder": (decoder_results, "ptr_after"),
    "c_": (model_results, "g/|feat|eval_rect_out|eval_b1|logits_u_eval|train_out"),
    "x_": (loss_and_metric_results, ".*/(loss|grad)$|iou/inter|iou/target_area"),
}


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("d_")])
def test_parity(name):
    """``RESULTS`` tells which tensors must be computed, beside all of a mode."""
    compute, pattern = next(x for prefix, x in RESULTS.items() if name.startswith(prefix))
    golden = Golden(name)
    pattern = "|".join([pattern, *(f"{mode}/" for mode in golden.meta.get("modes", ()))])
    results, doubles = compute(golden), compute(Golden(name, torch.float64))
    assert [key for key in golden.tensors if re.match(pattern, key) and key not in results] == []
    for key, value in results.items():
        expected = golden[key]
        if not expected.is_floating_point():
            assert torch.equal(value, expected), key
            continue
        error, noise = (relative_error(value, x) for x in (expected, doubles[key]))
        assert error <= max(1e-5, 10 * noise, 10 * golden.noise(key)), f"{key}: {error:.1e}, noise {noise:.1e}"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("d_")])
def test_trajectory(name):
    golden = Golden(name)
    meta = golden.meta
    model = build_model(meta)
    golden.load(model, "w0/")
    config = TrainConfig(lr=meta["lr"], lr_multi=meta["lr_multi"], weight_decay=meta["weight_decay"], kv_source="batch")
    assert meta["poly"] == 0.9
    state = TrainState(model, config, total_steps=meta["total_iters"])
    for step, (x, y, u) in enumerate(zip(golden["x"], golden["y"], golden["u"], strict=True)):
        batch = SemiBatch(x, y.long(), u, torch.ones_like(y, dtype=torch.bool), None)
        losses = train_step(state, batch, use_memory=step > 0)
        expected = golden["losses"][step]
        torch.testing.assert_close(torch.stack(losses), expected, rtol=1e-5, atol=0)
        assert torch.equal(model.decoder.allspark.attn.queue_ptr, golden[f"step{step}/ptr"])
        norm = model.decoder.decoder.linear_fuse.bn
        for statistic, key in ((norm.running_mean, "bn_mean"), (norm.running_var, "bn_var")):
            assert relative_error(statistic, golden[f"step{step}/{key}"]) <= 1e-4
    weights = model.state_dict()
    final = [key for key in golden.tensors if key.startswith("w3/")]
    assert final
    for key in final:
        value, expected = weights[key.removeprefix("w3/")], golden[key].squeeze()
        assert relative_error(value.squeeze(), expected) <= 1e-4, key

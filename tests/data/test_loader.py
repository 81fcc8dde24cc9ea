import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from allspark_fast.data.datasets import Entry, SegmentationDataset
from allspark_fast.data.loader import SemiBatch, SemiLoader, evaluation_loader
from allspark_fast.data.transforms import CropTransform
from allspark_fast.errors import DataError

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


class Numbered:
    """Sample i is an even grey of value i with label i; `labels` says which samples have one."""

    def __init__(self, count: int, size: int = 8, labels: bool = True):
        self.size = size
        self.entries = [Entry(f"{index}.png", f"{index}.png" if labels else None) for index in range(count)]

    def image(self, index):
        return Image.new("RGB", (self.size, self.size), (index,) * 3)

    def __getitem__(self, index):
        label = Image.new("L", (self.size, self.size), index) if self.entries[index].label else None
        return self.image(index), label


class WorkerIds(Numbered):
    """Images that hold the id of the process that read them."""

    def image(self, index):
        return Image.new("RGB", (self.size, self.size), tuple(os.getpid().to_bytes(3, "big")))


class Killed(Numbered):
    """Images that end the process that reads them, as the kernel does when memory is short."""

    def image(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


class Noise(Numbered):
    """Images and labels of noise, on which every augmentation leaves its trace."""

    def image(self, index):
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (20, 24, 3), np.uint8))

    def __getitem__(self, index):
        return self.image(index), Image.fromarray(np.random.default_rng(index).integers(0, 5, (20, 24), np.uint8))


def numbered_loader(labeled=5, unlabeled=12, batch_size=4, **options):
    transform = CropTransform(4, photometric=False, scale_range=(1.0, 1.0), **PLAIN)
    return SemiLoader(
        Numbered(labeled), Numbered(unlabeled), transform, transform, batch_size=batch_size, seed=1, **options
    )


def noise_loader(**options):
    labeled, unlabeled = (CropTransform((16, 20), photometric=flag) for flag in (True, False))
    return SemiLoader(Noise(5), Noise(11), labeled, unlabeled, batch_size=4, seed=3, **options)


def ids(images):
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def assert_equal(first, second):
    for left, right in zip(first, second, strict=True):
        for a, b in zip(left, right, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_shapes_and_dtypes():
    batch = next(iter(noise_loader(hidden_labels=True).iterate(0, 1)))
    assert batch.image.shape == batch.unlabeled_image.shape == (4, 3, 16, 20)
    assert batch.label.shape == batch.unlabeled_valid.shape == batch.unlabeled_label.shape == (4, 16, 20)
    assert [part.dtype for part in batch] == [
        torch.float32,
        torch.int64,
        torch.float32,
        torch.bool,
        torch.int64,
    ]
    assert (batch.unlabeled_label[~batch.unlabeled_valid] == 255).all()
    assert (batch.unlabeled_label[batch.unlabeled_valid] < 5).all()


def test_an_epoch_shows_every_unlabeled_image_once_and_drops_the_rest():
    loader = numbered_loader(unlabeled=14)
    assert loader.steps_per_epoch == 3
    for epoch in range(3):
        seen = [i for batch in loader.iterate(3 * epoch, 3 * epoch + 3) for i in ids(batch.unlabeled_image)]
        assert len(set(seen)) == len(seen) == 12


def test_labeled_images_are_repeated_and_cut():
    loader = numbered_loader(labeled=5, unlabeled=12)
    for epoch in range(3):
        steps = loader.iterate(3 * epoch, 3 * epoch + 3)
        counts = Counter(i for batch in steps for i in ids(batch.image))
        assert counts == {0: 3, 1: 3, 2: 2, 3: 2, 4: 2}


def test_more_labeled_than_unlabeled_images_are_all_used_in_time():
    loader = numbered_loader(labeled=20, unlabeled=8)
    epochs = [[i for batch in loader.iterate(2 * e, 2 * e + 2) for i in ids(batch.image)] for e in range(20)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert {i for epoch in epochs for i in epoch} == set(range(20))


def test_labels_belong_to_their_images():
    for batch in numbered_loader(hidden_labels=True).iterate(0, 6):
        assert ids(batch.image) == batch.label[:, 0, 0].tolist()
        assert ids(batch.unlabeled_image) == batch.unlabeled_label[:, 0, 0].tolist()


def test_orders_differ_between_epochs_streams_and_seeds():
    loader = numbered_loader(labeled=12)
    batches = list(loader.iterate(0, 6))
    orders = [
        [i for batch in batches[first : first + 3] for i in ids(images(batch))]
        for first in (0, 3)
        for images in (lambda batch: batch.image, lambda batch: batch.unlabeled_image)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(12)) for order in orders)


def test_repeats_of_an_image_are_augmented_anew():
    crops = {}
    loader = noise_loader()
    for step, batch in enumerate(loader.iterate(0, 4 * loader.steps_per_epoch)):
        for image in batch.image:
            crops[image.sum().item()] = step
    assert len(crops) == 4 * 4 * loader.steps_per_epoch


def test_starting_at_any_step_gives_the_same_batches():
    loader = noise_loader(hidden_labels=True)
    whole = list(loader.iterate(0, 6))
    for start in (1, 2, 3, 5):  # two steps to an epoch: inside and at a border
        assert_equal(whole[start:], loader.iterate(start, 6))


def test_the_number_of_workers_does_not_matter():
    alone = list(noise_loader().iterate(1, 5))
    assert_equal(alone, noise_loader(num_workers=2).iterate(1, 5))


def test_ranks_share_the_global_batch():
    options = {"hidden_labels": True}
    whole = list(noise_loader(**options).iterate(0, 4))
    for world_size in (2, 4):
        parts = [noise_loader(rank=r, world_size=world_size, **options).iterate(0, 4) for r in range(world_size)]
        joined = [[torch.cat(part) for part in zip(*step, strict=True)] for step in zip(*parts, strict=True)]
        assert_equal(whole, joined)


def test_workers_live_across_epochs():
    transform = CropTransform(4, photometric=False, scale_range=(1.0, 1.0), **PLAIN)
    loader = SemiLoader(WorkerIds(4), WorkerIds(4), transform, transform, batch_size=2, seed=0, num_workers=2)
    processes = {tuple((batch.image[0, :, 0, 0] * 255).round().int().tolist()) for batch in loader.iterate(0, 8)}
    assert len(processes) == 2
    assert tuple(os.getpid().to_bytes(3, "big")) not in processes


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    list(noise_loader().iterate(0, 2))
    list(noise_loader(num_workers=1).iterate(0, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_of_unlabeled_images_are_not_read_unless_asked_for(tmp_path, make_folder):
    entries = make_folder(4)
    absent = [Entry(entry.image, "labels/absent.png") for entry in entries]
    labeled, unlabeled = SegmentationDataset(tmp_path, entries), SegmentationDataset(tmp_path, absent)
    transform = CropTransform(32, photometric=False)
    loader = SemiLoader(labeled, unlabeled, transform, transform, batch_size=2, seed=0)
    assert next(loader.iterate(0, 1)).unlabeled_label is None
    asking = SemiLoader(labeled, unlabeled, transform, transform, batch_size=2, seed=0, hidden_labels=True)
    assert (next(asking.iterate(0, 1)).unlabeled_label == 255).all()


def test_labeled_only_reads_no_unlabeled_image_and_changes_nothing_else():
    class Unreadable(Noise):
        def image(self, index):
            raise AssertionError("an unlabeled image was read")

    transform = CropTransform((16, 20), photometric=True)
    loader = SemiLoader(Noise(5), Unreadable(11), transform, transform, batch_size=4, seed=3, labeled_only=True)
    for start in (0, 3):
        batches, both = list(loader.iterate(start, 6)), list(noise_loader().iterate(start, 6))
        assert_equal([batch[:2] for batch in batches], [batch[:2] for batch in both])
        assert {tuple(map(len, batch[:4])) for batch in batches} == {(4, 4, 0, 0)}
        assert batches[0].unlabeled_label is None


def test_hidden_labels_of_images_without_one_are_ignored():
    transform = CropTransform(4, photometric=False)
    loader = SemiLoader(
        Numbered(4), Numbered(4, labels=False), transform, transform, batch_size=2, seed=0, hidden_labels=True
    )
    assert (next(loader.iterate(0, 1)).unlabeled_label == 255).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_file_is_named(tmp_path, make_folder, num_workers):
    entries = make_folder(4)
    (tmp_path / entries[2].image).write_bytes(b"broken")
    data, transform = SegmentationDataset(tmp_path, entries), CropTransform(32, photometric=False)
    loader = SemiLoader(data, data, transform, transform, batch_size=4, seed=0, num_workers=num_workers)
    with pytest.raises(DataError, match=r"images/02\.png: cannot be read"):
        list(loader.iterate(0, 1))


def test_a_killed_worker_is_told():
    transform = CropTransform(4, photometric=False)
    loader = SemiLoader(Killed(2), Numbered(2), transform, transform, batch_size=2, seed=0, num_workers=1)
    with pytest.raises(RuntimeError, match="a loading process is killed"):
        next(loader.iterate(0, 1))


def test_moving_a_batch():
    class Recorder:
        def to(self, device, non_blocking):
            return device, non_blocking

        def pin_memory(self):
            return "pinned"

    batch = SemiBatch(*[Recorder()] * 4, None)
    assert batch.to("cuda", non_blocking=True) == (*[("cuda", True)] * 4, None)
    assert batch.pin_memory() == (*["pinned"] * 4, None)


@pytest.mark.gpu
def test_pinned_batches():
    for num_workers in (0, 1):
        batch = next(noise_loader(pin_memory=True, num_workers=num_workers).iterate(0, 1))
        assert all(part.is_pinned() for part in batch if part is not None)
    assert next(noise_loader().iterate(0, 1)).pin_memory().image.is_pinned()


def test_refused_arguments():
    with pytest.raises(DataError, match="3 unlabeled images do not fill a batch of 4"):
        numbered_loader(unlabeled=3)
    with pytest.raises(DataError, match="labeled list is empty"):
        numbered_loader(labeled=0)
    with pytest.raises(ValueError, match="batch_size 4 cannot be shared equally by 3"):
        numbered_loader(world_size=3)
    transform = CropTransform(4, photometric=False)
    with pytest.raises(DataError, match=r"0\.png: has no label"):
        SemiLoader(Numbered(4, labels=False), Numbered(4), transform, transform, batch_size=2, seed=0)


def test_evaluation_shows_whole_images_in_order():
    source = Noise(5)
    samples = list(evaluation_loader(source, **PLAIN))
    assert [sample.entry for sample in samples] == source.entries
    for index, sample in enumerate(samples):
        image, label = source[index]
        pixels = (sample.image[0].permute(1, 2, 0) * 255).round().byte().numpy()
        np.testing.assert_array_equal(pixels, np.asarray(image))
        np.testing.assert_array_equal(sample.label[0].numpy(), np.asarray(label))
        assert sample.label.dtype == torch.int64


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_evaluate_every_image_once(world_size):
    source = Numbered(5)
    loaders = [evaluation_loader(source, **PLAIN, rank=r, world_size=world_size) for r in range(world_size)]
    seen = [sample.entry.image for loader in loaders for sample in loader]
    assert sorted(seen) == sorted(entry.image for entry in source.entries)


def test_evaluation_with_workers_needs_labels_and_keeps_order():
    source = Numbered(5)
    samples = list(evaluation_loader(source, **PLAIN, num_workers=2))
    assert [sample.entry for sample in samples] == source.entries
    with pytest.raises(DataError, match=r"0\.png: has no label"):
        evaluation_loader(Numbered(2, labels=False), **PLAIN)

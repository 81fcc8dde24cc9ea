import itertools
import os
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from allspark_fast.data import loader
from allspark_fast.data.datasets import Entry, SegmentationDataset
from allspark_fast.data.loader import SemiLoader, evaluation_loader, mix_seed
from allspark_fast.data.transforms import CropTransform
from allspark_fast.errors import DataError, RunError
from tests.helpers.images import write_folder

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


class Numbered:
    """Sample i is an even gray of value i with label i; `labels` says whether samples have one."""

    def __init__(self, count: int, labels: bool = True):
        self.entries = [Entry(f"{index}.png", f"{index}.png" if labels else None) for index in range(count)]

    def image(self, index):
        return Image.new("RGB", (8, 8), (index,) * 3)

    def __getitem__(self, index):
        return self.image(index), Image.new("L", (8, 8), index) if self.entries[index].label else None


class Noise(Numbered):
    """Images and labels of noise, on which every augmentation leaves its trace."""

    def image(self, index):
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (20, 24, 3), np.uint8))

    def __getitem__(self, index):
        return self.image(index), Image.fromarray(np.random.default_rng(index).integers(0, 5, (20, 24), np.uint8))


def plain_loader(labeled, unlabeled, batch_size=4, **options):
    transform = CropTransform(4, photometric=False, scale_range=(1.0, 1.0), **PLAIN)
    return SemiLoader(labeled, unlabeled, transform, transform, batch_size=batch_size, seed=1, **options)


MIXING = ({"copy_paste": 0.7}, {"strong": True, "cutmix": 0.7})


def noise_loader(unlabeled=Noise, mixing=MIXING, **options):
    transforms = (
        CropTransform(18, photometric=flag, **extra) for flag, extra in zip((True, False), mixing, strict=True)
    )
    return SemiLoader(Noise(5), unlabeled(11), *transforms, batch_size=4, seed=3, **options)


def ids(images):
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def ids_by_epoch(loader, epochs):
    """Which labeled, and which unlabeled, samples each epoch shows, in order."""
    steps = loader.steps_per_epoch
    for first in range(0, steps * epochs, steps):
        batches = list(loader.iterate(first, first + steps))
        yield tuple([i for batch in batches for i in ids(batch[part])] for part in (0, 2))


def assert_equal(first, second):
    for left, right in zip(first, second, strict=True):
        for a, b in zip(left, right, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_seeds_are_those_of_splitmix64():
    # First outputs for 0 and 1, as published with the algorithm.
    assert [mix_seed(0), mix_seed(1)] == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
    keys = [key for length in (1, 2, 3, 4) for key in itertools.product(range(5), repeat=length)]
    assert len({mix_seed(*key) for key in keys}) == len(keys)


def test_shapes_and_dtypes():
    batch = next(noise_loader(hidden_labels=True).iterate(0, 1))
    images, masks = [batch.image, batch.unlabeled_image, batch.unlabeled_strong], [batch.mixed, batch.pasted]
    assert {(*x.shape, x.dtype) for x in images} == {(4, 3, 18, 18, torch.float32)}
    assert {(*x.shape, x.dtype) for x in [batch.unlabeled_valid, *masks]} == {(4, 18, 18, torch.bool)}
    assert {(*x.shape, x.dtype) for x in [batch.label, batch.unlabeled_label]} == {(4, 18, 18, torch.uint8)}
    assert batch.to("cpu").label.dtype == batch.to("cpu").unlabeled_label.dtype == torch.int64
    assert (batch.unlabeled_label[~batch.unlabeled_valid] == 255).all()
    assert (batch.unlabeled_label[batch.unlabeled_valid] < 5).all()


def test_an_epoch_repeats_labeled_images_and_shows_unlabeled_ones_once():
    for labeled, unlabeled in ids_by_epoch(plain_loader(Numbered(5), Numbered(12)), 3):
        assert Counter(labeled) == {0: 3, 1: 3, 2: 2, 3: 2, 4: 2}
        assert set(unlabeled) == set(range(12))
    loader = plain_loader(Numbered(5), Numbered(14))  # the incomplete batch is dropped
    assert loader.steps_per_epoch == 3
    for _, unlabeled in ids_by_epoch(loader, 3):
        assert len(set(unlabeled)) == len(unlabeled) == 12


def test_orders_differ_and_more_labeled_than_unlabeled_images_are_all_used_in_time():
    orders = [order for epoch in ids_by_epoch(plain_loader(Numbered(12), Numbered(12)), 2) for order in epoch]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(12)) for order in orders)
    epochs = [labeled for labeled, _ in ids_by_epoch(plain_loader(Numbered(20), Numbered(8)), 20)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert {i for epoch in epochs for i in epoch} == set(range(20))


def test_labels_belong_to_their_images():
    for batch in plain_loader(Numbered(5), Numbered(12), hidden_labels=True).iterate(0, 6):
        assert ids(batch.image) == batch.label[:, 0, 0].tolist()
        assert ids(batch.unlabeled_image) == batch.unlabeled_label[:, 0, 0].tolist()


def test_what_is_drawn_beyond_the_paper_changes_no_crop():
    paper, beyond = (list(noise_loader(mixing=mixing).iterate(0, 3)) for mixing in (({}, {}), MIXING))
    assert_equal(paper, [batch._replace(unlabeled_strong=None, mixed=None, pasted=None) for batch in beyond])


def test_repeats_of_an_image_are_augmented_anew():
    loader = noise_loader()
    crops = [image.sum().item() for batch in loader.iterate(0, 4 * loader.steps_per_epoch) for image in batch.image]
    assert len(set(crops)) == len(crops) == 4 * 4 * loader.steps_per_epoch


def test_batches_depend_on_the_step_alone():
    state = torch.get_rng_state()
    whole = list(noise_loader(hidden_labels=True).iterate(0, 6))
    for start in (1, 2, 3, 5):  # two steps to an epoch: inside and at a border
        assert_equal(whole[start:], noise_loader(hidden_labels=True).iterate(start, 6))
    assert_equal(whole[1:], noise_loader(hidden_labels=True, num_workers=2).iterate(1, 6))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batch(world_size):
    loaders = [noise_loader(hidden_labels=True, rank=r, world_size=world_size) for r in range(world_size)]
    steps = zip(*(loader.iterate(0, 4) for loader in loaders), strict=True)
    joined = [[torch.cat(part) for part in zip(*step, strict=True)] for step in steps]
    assert_equal(noise_loader(hidden_labels=True).iterate(0, 4), joined)


def test_workers_live_across_epochs(monkeypatch):
    """Each image holds the ID of the process that reads it."""
    monkeypatch.setattr(Numbered, "image", lambda *_: Image.new("RGB", (8, 8), tuple(os.getpid().to_bytes(3, "big"))))
    loader = plain_loader(Numbered(4), Numbered(4), batch_size=2, num_workers=2)
    processes = {tuple((batch.image[0, :, 0, 0] * 255).round().int().tolist()) for batch in loader.iterate(0, 8)}
    assert len(processes) == 2
    assert tuple(os.getpid().to_bytes(3, "big")) not in processes


def test_labels_of_unlabeled_images_are_read_on_request(tmp_path, caplog):
    entries = write_folder(tmp_path, 4)
    labeled = SegmentationDataset(tmp_path, entries)
    absent = SegmentationDataset(tmp_path, [Entry(entry.image, "labels/absent.png") for entry in entries])
    assert next(plain_loader(labeled, absent).iterate(0, 1)).unlabeled_label is None
    for unlabeled in (absent, Numbered(4, labels=False)):
        batch = next(plain_loader(labeled, unlabeled, hidden_labels=True).iterate(0, 1))
        assert (batch.unlabeled_label == 255).all()
    assert "labels/absent.png" in caplog.text


def test_labeled_only_reads_no_unlabeled_image_and_changes_nothing_else():
    class Unreadable(Noise):
        image = None

    for start in (0, 3):
        batches, both = list(noise_loader(Unreadable, labeled_only=True).iterate(start, 6)), noise_loader()
        assert_equal([batch[:2] for batch in batches], [batch[:2] for batch in both.iterate(start, 6)])
        assert {tuple(map(len, batch[:4])) for batch in batches} == {(4, 4, 0, 0)}
        assert batches[0].unlabeled_label is None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_file_is_named(tmp_path, num_workers):
    entries = write_folder(tmp_path, 4)
    (tmp_path / entries[2].image).write_bytes(b"broken")
    data = SegmentationDataset(tmp_path, entries)
    with pytest.raises(DataError, match=r"images/02\.png: not an image"):
        list(plain_loader(data, data, num_workers=num_workers).iterate(0, 1))


@pytest.mark.parametrize(("options", "enough"), [({}, 133), ({"labeled_only": True}, 67)])
def test_shared_memory_is_checked_before_the_first_batch(monkeypatch, options, enough):
    """Crops of 321 in batches of 8 with 2 workers, in the 64 MB of a container."""
    crops = CropTransform(321, photometric=False, scale_range=(1.0, 1.0))
    advice = rf"need {enough} MB .* /dev/shm has {enough - 1} MB free: .*--shm-size 1g.*--data\.workers 0"

    def load(free, workers=2):
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free, f_frsize=2**20))
        data = Numbered(1), Numbered(8), crops, crops
        SemiLoader(*data, batch_size=8, seed=0, num_workers=workers, **options).iterate(0, 1)

    with pytest.raises(RunError, match=advice):
        load(enough - 1)
    load(enough - 1, workers=0)
    load(enough)


def test_who_waits_for_workers_hears_that_it_is_to_stop(monkeypatch):
    """Images on a disk that does not answer."""
    monkeypatch.setattr(Numbered, "image", lambda *_: time.sleep(60))
    monkeypatch.setattr(loader, "_LOOK_UP", 1)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # for the end of a worker
    plain = plain_loader(Numbered(2), Numbered(2), batch_size=2, num_workers=1)
    calls = iter([False, True])
    assert list(plain.iterate(0, 1, lambda: next(calls))) == []
    assert list(calls) == []
    monkeypatch.setattr(loader, "_PATIENCE", 2)
    with pytest.raises(RunError, match="no batch for 2 s: the DataLoader workers wait for files"):
        next(plain.iterate(0, 1))


@pytest.mark.gpu
def test_pinned_batches():
    for num_workers in (0, 1):
        batch = next(noise_loader(pin_memory=True, num_workers=num_workers).iterate(0, 1))
        assert all(part.is_pinned() for part in batch if part is not None)


def test_lists_that_are_refused():
    for labeled, message in ((Numbered(0), "is empty"), (Numbered(4, labels=False), r"0\.png: has no label")):
        with pytest.raises(ValueError, match=message):
            plain_loader(labeled, Numbered(4))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_evaluate_every_image_once(world_size):
    source = Numbered(5)
    loaders = [evaluation_loader(source, **PLAIN, rank=r, world_size=world_size) for r in range(world_size)]
    samples = [sample for loader in loaders for sample in loader]
    assert sorted(int(sample.label[0, 0, 0]) for sample in samples) == list(range(5))
    assert {sample.label.dtype for sample in samples} == {torch.uint8}
    with pytest.raises(DataError, match=r"0\.png: has no label"):
        evaluation_loader(Numbered(2, labels=False), **PLAIN)

"""Batches of labeled and unlabeled crops, whose position is a single counter, and whole images for evaluation."""

import atexit
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from allspark_fast.data.datasets import Entry, ImageSource
from allspark_fast.data.seeding import make_generator
from allspark_fast.data.transforms import CropTransform, Sample, label_tensor, normalize_image
from allspark_fast.errors import DataError, RunError
from allspark_fast.signals import ignore_stop_signals

logger = logging.getLogger(__name__)

# Parts of seeds: the numbers of every run depend on them.
_LABELED, _UNLABELED = 0, 1
_ORDER, _AUGMENT = 0, 1


class SemiBatch(NamedTuple):
    """One rank's part of a training step.

    Attributes:
        image: (B, 3, H, W) float32, labeled crops.
        label: (B, H, W) int64, 255 ignored.
        unlabeled_image: (B, 3, H, W) float32; (0, 3, H, W) from a loader of labeled images only.
        unlabeled_valid: (B, H, W) bool, False where the crop added padding; (0, H, W) likewise.
        unlabeled_label: (B, H, W) int64, labels that training must not see, 255 where there are none; None unless
            requested.
    """

    image: Tensor
    label: Tensor
    unlabeled_image: Tensor
    unlabeled_valid: Tensor
    unlabeled_label: Tensor | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SemiBatch":
        """Return the batch on another device."""
        return SemiBatch._make(x if x is None else x.to(device, non_blocking=non_blocking) for x in self)

    def split(self, count: int) -> "Iterator[SemiBatch]":
        """Yield ``count`` equal micro-batches; ``count`` must divide B."""
        parts = [[None] * count if x is None else x.unflatten(0, (count, -1)) for x in self]
        return map(SemiBatch._make, zip(*parts, strict=True))

    def pin_memory(self) -> "SemiBatch":
        """Return the batch in page-locked memory."""
        return SemiBatch._make(x if x is None else x.pin_memory() for x in self)


class _Key(NamedTuple):
    """Identifies one crop of a whole run: ``place`` is a position in the list that an epoch shuffles."""

    stream: int
    epoch: int
    place: int


class _Crops(Dataset[Sample]):
    """The crops that keys identify, read and transformed; this is what workers run."""

    def __init__(
        self,
        sources: Sequence[ImageSource],
        transforms: Sequence[CropTransform],
        seed: int,
        labeled_only: bool,
        hidden_labels: bool,
    ):
        self.sources = sources
        self.transforms = transforms
        self.seed = seed
        self.labeled_only = labeled_only
        self.hidden_labels = hidden_labels

    def __getitem__(self, key: _Key) -> Sample:
        source = self.sources[key.stream]
        # Labeled images are repeated within an epoch, so places may exceed their number.
        index = key.place % len(source.entries)
        image, label = source[index] if key.stream == _LABELED else self._unlabeled(source, index)
        generator = make_generator(self.seed, _AUGMENT, key.stream, key.epoch, key.place)
        return self.transforms[key.stream](image, label, generator)

    def _unlabeled(self, source: ImageSource, index: int) -> tuple[Image.Image, Image.Image | None]:
        """Read an image, and its hidden label if requested and readable: training does not need these files."""
        if self.hidden_labels:
            try:
                return source[index]
            except DataError as error:
                logger.warning("a hidden label is left out of the measurement: %s", error)
        return source.image(index), None

    def collate(self, samples: list[Sample]) -> SemiBatch:
        """Stack the labeled crops (all, or the first half) and the unlabeled ones (the second half)."""
        half = len(samples) if self.labeled_only else len(samples) // 2
        image, label, valid = (torch.stack(part) for part in zip(*samples[:half], strict=True))
        if self.labeled_only:
            return SemiBatch(image, label, image[:0], valid[:0], None)
        unlabeled = [torch.stack(part) for part in zip(*samples[half:], strict=True)]
        hidden = unlabeled[1] if self.hidden_labels else None
        return SemiBatch(image, label, unlabeled[0], unlabeled[2], hidden)


class SemiLoader:
    """Pairs of labeled and unlabeled batches, in an order that is a function of the seed and the step alone.

    An epoch passes once over the unlabeled images and drops the incomplete batch. The labeled images are repeated, and
    cut to the number of unlabeled ones, as in the reference implementation; where there are more labeled than unlabeled
    images, every epoch uses another part. Both lists are shuffled independently for every epoch.

    The position is the number of the step, counted over epochs: ``iterate(k, n)`` yields exactly what ``iterate(0, n)``
    yields from its k-th batch on, bit for bit, for any number of workers. The ranks of a step share its global batch,
    which is the same set of crops for any ``world_size``. The global random state is never touched.

    Args:
        labeled: images that all have a label.
        unlabeled: images whose labels are not read unless ``hidden_labels``.
        labeled_transform: transform of the labeled images.
        unlabeled_transform: transform of the unlabeled images.
        batch_size: number of labeled, and of unlabeled, images per step over all ranks.
        seed: seed of order and augmentation.
        num_workers: worker processes; they live as long as one call of ``iterate``, across epochs.
        pin_memory: return batches in page-locked memory, for asynchronous copies to a GPU.
        labeled_only: do not read the unlabeled images; order, labeled crops and number of steps stay the same.
        hidden_labels: also return the labels of unlabeled images, to measure pseudo-labels with.
        rank: index of this process.
        world_size: number of processes.

    Raises:
        DataError: a labeled entry has no label, there are no labeled images, or too few unlabeled ones.
        ValueError: ``batch_size`` is not divisible by ``world_size``.
    """

    def __init__(
        self,
        labeled: ImageSource,
        unlabeled: ImageSource,
        labeled_transform: CropTransform,
        unlabeled_transform: CropTransform,
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        labeled_only: bool = False,
        hidden_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        _require_labels(labeled.entries)
        if len(unlabeled.entries) < batch_size:
            raise DataError(
                f"{len(unlabeled.entries)} unlabeled images do not fill a batch of {batch_size}; add images or lower"
                " train.batch_size"
            )
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} is not divisible by world_size {world_size}")
        transforms = (labeled_transform, unlabeled_transform)
        self._crops = _Crops((labeled, unlabeled), transforms, seed, labeled_only, hidden_labels)
        # Of the labeled list an epoch uses as many positions as there are unlabeled images.
        self._lengths = max(len(labeled.entries), len(unlabeled.entries)), len(unlabeled.entries)
        self._batch_size = batch_size
        self._seed = seed
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._rank = rank
        self._world_size = world_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in one pass over the unlabeled images."""
        return self._lengths[_UNLABELED] // self._batch_size

    def iterate(self, start_step: int, stop_step: int) -> Iterator[SemiBatch]:
        """Yield the batches of steps start_step, ..., stop_step - 1, counted from 0 over all epochs.

        Raises:
            DataError: while iterating, a file cannot be read; the message names it, and contains the traceback of the
                worker if there is one.
            RunError: while iterating, a worker died.
        """
        return _deliver(
            DataLoader(
                self._crops,
                batch_sampler=self._steps(start_step, stop_step),
                collate_fn=self._crops.collate,
                num_workers=self._num_workers,
                pin_memory=self._pin_memory,
                # Without its own generator, every iterator draws from the global one.
                generator=torch.Generator(),
                worker_init_fn=ignore_stop_signals,
            )
        )

    def _steps(self, start_step: int, stop_step: int) -> Iterator[list[_Key]]:
        """Yield the keys of this rank's part of every step: labeled ones, then unlabeled ones unless labeled_only."""
        streams = (_LABELED,) if self._crops.labeled_only else (_LABELED, _UNLABELED)
        share = self._batch_size // self._world_size
        shuffled_epoch = -1
        for step in range(start_step, stop_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != shuffled_epoch:
                orders, shuffled_epoch = self._orders(epoch), epoch
            first = position * self._batch_size + self._rank * share
            yield [_Key(stream, epoch, place) for stream in streams for place in orders[stream][first : first + share]]

    def _orders(self, epoch: int) -> tuple[list[int], list[int]]:
        """Return permutations of the labeled and the unlabeled list for one epoch."""
        labeled, unlabeled = (
            torch.randperm(length, generator=make_generator(self._seed, _ORDER, stream, epoch)).tolist()
            for stream, length in enumerate(self._lengths)
        )
        return labeled, unlabeled


def _deliver(loader: "DataLoader[Any]") -> Iterator[Any]:
    """Yield the batches of a loader; the death of a worker raises RunError, however it shows."""
    batches = iter(loader)
    # Workers ignore SIGTERM, so multiprocessing would join them forever at exit if something (a traceback, say) still
    # holds the iterator then.
    end_workers = getattr(batches, "_shutdown_workers", lambda: None)
    atexit.register(end_workers)
    try:
        yield from batches
    except (EOFError, ConnectionError, RuntimeError) as error:
        # A broken connection if it dies while it sends a batch, else torch's "DataLoader worker (pid ...) ...".
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
            raise
        raise RunError(f"a DataLoader worker died ({error!r}), possibly out of memory: use fewer workers") from error
    finally:
        atexit.unregister(end_workers)
        end_workers()


def _require_labels(entries: Sequence[Entry]) -> None:
    if not entries:
        raise DataError("the list of images with labels is empty; it needs at least one")
    missing = [entry.image for entry in entries if entry.label is None]
    if missing:
        raise DataError(f"{missing[0]}: has no label, but its list needs labels, as for {len(missing) - 1} others")


class EvalSample(NamedTuple):
    """One whole image.

    Attributes:
        image: (1, 3, H, W) float32, normalized.
        label: (1, H, W) int64, 255 ignored.
        entry: where it comes from.
    """

    image: Tensor
    label: Tensor
    entry: Entry


class _WholeImages(Dataset[EvalSample]):
    def __init__(self, source: ImageSource, mean: Sequence[float], std: Sequence[float]):
        self.source = source
        self.mean = mean
        self.std = std

    def __getitem__(self, index: int) -> EvalSample:
        image, label = self.source[index]
        assert label is not None
        tensor = normalize_image(image, self.mean, self.std)
        return EvalSample(tensor[None], label_tensor(label)[None], self.source.entries[index])


def evaluation_loader(
    source: ImageSource,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[EvalSample]:
    """Return whole labeled images in order, one at a time; ``evaluate`` puts those of equal size together.

    Rank r of w gets the images r, r + w, ...: each image goes to one rank, none is repeated to fill up, so
    ranks may get unequal numbers.

    Args:
        source: images that all have a label.
        mean: mean per channel that is subtracted, for images in 0..1.
        std: standard deviation per channel that is divided by.
        num_workers: worker processes.
        pin_memory: return tensors in page-locked memory, for asynchronous copies to a GPU.
        rank: index of this process.
        world_size: number of processes.

    Raises:
        DataError: an entry has no label, or there is none at all.
    """
    _require_labels(source.entries)
    return _deliver(
        DataLoader(
            _WholeImages(source, mean, std),
            batch_size=None,
            sampler=range(rank, len(source.entries), world_size),
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),
            worker_init_fn=ignore_stop_signals,
        )
    )

"""Batches of labeled and unlabeled crops, whose position is a single counter, and whole images for evaluation."""

import atexit
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torchvision.transforms.v2 import functional as tvf  # type: ignore[import-untyped]

from allspark_fast.data.datasets import Entry, ImageSource
from allspark_fast.data.transforms import CropTransform, Sample, normalize_image
from allspark_fast.errors import DataError, RunError
from allspark_fast.signals import ignore_stop_signals

logger = logging.getLogger(__name__)

# Parts of seeds: the numbers of every run depend on them.
_LABELED, _UNLABELED = 0, 1
_ORDER, _AUGMENT = 0, 1
_WORD = 2**64 - 1
# Seconds after which a process that waits for its workers looks up, and gives up.
_LOOK_UP, _PATIENCE = 5, 600


def mix_seed(*parts: int) -> int:
    """Mix integers, whose order matters, into one 64-bit seed with the finalizer of SplitMix64.

    The numbers of every run depend on it. Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
    Generators", OOPSLA 2014.
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state


def make_generator(*parts: int) -> torch.Generator:
    """Return a CPU generator seeded with ``mix_seed(*parts)``."""
    return torch.Generator().manual_seed(mix_seed(*parts))


class SemiBatch(NamedTuple):
    """One rank's part of a training step: images (B, 3, H, W) float32, labels (B, H, W) int64, masks (B, H, W) bool.

    Attributes:
        image: labeled crops.
        label: 255 ignored; labels are uint8 until ``to``, which takes less of a worker's memory.
        unlabeled_image: unlabeled crops; none (B = 0) from a loader of labeled images only.
        unlabeled_valid: False where the crop added padding.
        unlabeled_label: labels that training must not see, 255 where there are none; None unless requested.
        unlabeled_strong: what the student sees in place of ``unlabeled_image``; None for that.
        mixed: unlabeled pixels that CutMix takes from the other crop of a pair; None without CutMix.
        pasted: labeled pixels that are pasted into the unlabeled crop; None without copy-paste.
    """

    image: Tensor
    label: Tensor
    unlabeled_image: Tensor
    unlabeled_valid: Tensor
    unlabeled_label: Tensor | None
    unlabeled_strong: Tensor | None = None
    mixed: Tensor | None = None
    pasted: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SemiBatch":
        """Return the batch on another device."""
        moved = [x if x is None else x.to(device, non_blocking=non_blocking) for x in self]
        return SemiBatch._make(x.long() if x is not None and x.dtype == torch.uint8 else x for x in moved)

    def split(self, count: int) -> "Iterator[SemiBatch]":
        """Yield ``count`` equal micro-batches; ``count`` must divide B."""
        parts = [[None] * count if x is None else x.unflatten(0, (count, -1)) for x in self]
        return map(SemiBatch._make, zip(*parts, strict=True))


# One crop of a whole run: stream, epoch, and the place in the list that the epoch shuffles.
_Key = tuple[int, int, int]


@dataclass(frozen=True)
class SemiLoader(Dataset[Sample]):
    """Pairs of labeled and unlabeled batches, in an order that is a function of the seed and the step alone.

    An epoch passes once over the unlabeled images and drops the incomplete batch. The labeled images are repeated, and
    cut to the number of unlabeled ones, as in the reference implementation; where there are more labeled than unlabeled
    images, every epoch uses another part. Both lists are shuffled anew for every epoch.

    Batches are the same bit for bit at whatever step one starts, and for any number of workers. The ranks of a step
    share its batch, the same crops for any ``world_size``. The global random state is never touched.

    Attributes:
        batch_size: number of labeled, and of unlabeled, images per step over all ranks, which share it equally.
        num_workers: worker processes; they live as long as one call of ``iterate``.
        pin_memory: return batches in page-locked memory, for asynchronous copies to a GPU.
        labeled_only: do not read the unlabeled images; order, labeled crops and number of steps stay the same.
        hidden_labels: also return the labels of unlabeled images, to measure pseudo-labels with.

    Raises:
        DataError: a labeled entry has no label, there are no labeled images, or too few unlabeled ones.
    """

    labeled: ImageSource
    unlabeled: ImageSource
    labeled_transform: CropTransform
    unlabeled_transform: CropTransform
    _: KW_ONLY
    batch_size: int
    seed: int
    num_workers: int = 0
    pin_memory: bool = False
    labeled_only: bool = False
    hidden_labels: bool = False
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        _require_labels(self.labeled.entries)
        if len(self.unlabeled.entries) < self.batch_size:
            raise DataError(
                f"{len(self.unlabeled.entries)} unlabeled images do not fill a batch of {self.batch_size}; add images"
                " or lower train.batch_size"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in one pass over the unlabeled images."""
        return len(self.unlabeled.entries) // self.batch_size

    def iterate(
        self, start_step: int, stop_step: int, asked: Callable[[], bool] = lambda: False
    ) -> Iterator[SemiBatch]:
        """Yield the batches of steps start_step, ..., stop_step - 1, counted from 0 over all epochs.

        While workers keep this process waiting, ``asked`` tells whether to end early.

        Raises:
            DataError: while iterating, a file cannot be read; the message names it.
            RunError: there is too little shared memory for the workers, or, while iterating, one of them died, or no
                batch came for 10 minutes.
        """
        steps = self._steps(start_step, stop_step)
        if self.num_workers:
            transforms = [self.labeled_transform] + [self.unlabeled_transform] * (not self.labeled_only)
            crops = [transform(Image.new("RGB", (1, 1)), None, torch.Generator()) for transform in transforms]
            # Each worker prepares two batches, and two more are on their way.
            batches = (2 * self.num_workers + 2) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            require_shared_memory(self.batch_size // self.world_size * batches * _bytes_of(crops))
        return _deliver(self, self.num_workers, self.pin_memory, asked, batch_sampler=steps, collate_fn=self._collate)

    def _steps(self, start_step: int, stop_step: int) -> Iterator[list[_Key]]:
        """Yield the keys of this rank's part of every step: labeled ones, then unlabeled ones unless labeled_only."""
        length, share = len(self.unlabeled.entries), self.batch_size // self.world_size
        # Of the labeled list an epoch uses as many positions as there are unlabeled images.
        places = {_LABELED: max(length, len(self.labeled.entries)), _UNLABELED: length}
        streams = (_LABELED,) if self.labeled_only else (_LABELED, _UNLABELED)
        shuffled_epoch = -1
        for step in range(start_step, stop_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != shuffled_epoch:
                generators = {x: make_generator(self.seed, _ORDER, x, epoch) for x in streams}
                orders = {x: torch.randperm(places[x], generator=generators[x]).tolist() for x in streams}
                shuffled_epoch = epoch
            first = position * self.batch_size + self.rank * share
            yield [(stream, epoch, place) for stream in streams for place in orders[stream][first : first + share]]

    def __getitem__(self, key: _Key) -> Sample:
        """Read and transform a crop; workers do."""
        generator, (stream, _, place) = make_generator(self.seed, _AUGMENT, *key), key
        if stream == _LABELED:
            # Labeled images are repeated within an epoch, so places may exceed their number.
            return self.labeled_transform(*self.labeled[place % len(self.labeled.entries)], generator)
        if self.hidden_labels:  # training does not need these files
            try:
                return self.unlabeled_transform(*self.unlabeled[place], generator)
            except DataError as error:
                logger.warning("a hidden label is left out of the measurement: %s", error)
        return self.unlabeled_transform(self.unlabeled.image(place), None, generator)

    def _collate(self, samples: list[Sample]) -> SemiBatch:
        """Stack the labeled crops (all, or the first half) and the unlabeled ones (the second half)."""
        if self.labeled_only:
            labeled = _stack(samples)
            return SemiBatch(labeled.image, labeled.label, labeled.image[:0], labeled.valid[:0], None)
        half = len(samples) // 2
        labeled, unlabeled = _stack(samples[:half]), _stack(samples[half:])
        hidden = unlabeled.label if self.hidden_labels else None
        mixing = (unlabeled.strong, unlabeled.mixed, labeled.mixed)
        return SemiBatch(labeled.image, labeled.label, unlabeled.image, unlabeled.valid, hidden, *mixing)


def _stack(samples: Sequence[Sample]) -> Sample:
    columns = zip(*samples, strict=True)
    return Sample._make(None if parts[0] is None else default_collate(list(parts)) for parts in columns)


def _bytes_of(samples: Iterable[Iterable[Any]]) -> int:
    return sum(x.nbytes for sample in samples for x in sample if isinstance(x, Tensor))


def require_shared_memory(needed: int) -> None:
    """Raise RunError if workers cannot send so many bytes: torch would lose the batch and wait for ever."""
    try:
        state = os.statvfs("/dev/shm")
    except (OSError, AttributeError):  # only Linux has it
        return
    if needed > (free := state.f_bavail * state.f_frsize):
        raise RunError(
            f"batches of DataLoader workers need {needed // 2**20 + 1} MB of shared memory, but /dev/shm has"
            f" {free // 2**20} MB free: give the container more (docker run --shm-size {needed // 2**29 + 1}g), or"
            " use --data.workers 0 --eval.workers 0"
        )


def _deliver(
    dataset: Any, num_workers: int, pin_memory: bool, asked: Callable[[], bool], **order: Any
) -> Iterator[Any]:
    """Yield what a DataLoader reads in an order; the death of a worker raises RunError, however it shows."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without its own, every iterator draws from the global one
        worker_init_fn=ignore_stop_signals,
        timeout=_LOOK_UP if num_workers else 0,
        **order,
    )
    batches: Any = iter(loader)
    waited = 0

    def end_workers() -> None:
        if num_workers:
            batches._shutdown_workers()
            for worker in batches._workers:
                worker.kill()  # they ignore SIGTERM, with which the line before ends those that wait for a file

    # multiprocessing would join them forever at exit if something (a traceback, say) still holds the iterator then.
    atexit.register(end_workers)
    try:
        while not (waited and asked()):
            try:
                yield next(batches)
                waited = 0
            except StopIteration:
                return
            except (EOFError, ConnectionError, RuntimeError) as error:
                # A broken connection if it dies while it sends a batch, else torch's "DataLoader worker (pid ...) ...".
                if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader"):
                    raise
                if not str(error).startswith("DataLoader timed out"):
                    cause = f"a DataLoader worker died ({error!r}), possibly out of memory: use fewer workers"
                    raise RunError(cause) from error
                waited += _LOOK_UP
                if waited >= _PATIENCE:
                    raise RunError(f"no batch for {waited} s: the DataLoader workers wait for files") from error
    finally:
        atexit.unregister(end_workers)
        end_workers()


def _require_labels(entries: Sequence[Entry]) -> None:
    if not entries:
        raise DataError("the list of images with labels is empty; it needs at least one")
    if missing := [entry.image for entry in entries if entry.label is None]:
        raise DataError(f"{missing[0]}: has no label, but its list needs labels, as for {len(missing) - 1} others")


class EvalSample(NamedTuple):
    """One whole image: (1, 3, H, W) float32, normalized; and its label (1, H, W) uint8, 255 ignored."""

    image: Tensor
    label: Tensor


def _read_whole(source: ImageSource, mean: Sequence[float], std: Sequence[float], index: int) -> EvalSample:
    image, label = source[index]
    assert label is not None
    sample = EvalSample(normalize_image(image, mean, std)[None], tvf.pil_to_tensor(label))
    if get_worker_info() is not None:
        require_shared_memory(_bytes_of([sample]))
    return sample


def evaluation_loader(
    source: ImageSource,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_workers: int = 0,
    pin_memory: bool = False,
    asked: Callable[[], bool] = lambda: False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[EvalSample]:
    """Return whole labeled images in order, one at a time: rank r of w gets the images r, r + w, ..., none repeated.

    Arguments as of ``normalize_image`` and SemiLoader. Raises DataError if there is no entry, or one without a label.
    """
    _require_labels(source.entries)
    indices, read = range(rank, len(source.entries), world_size), partial(_read_whole, source, mean, std)
    return _deliver(indices, num_workers, pin_memory, asked, batch_size=None, collate_fn=read)

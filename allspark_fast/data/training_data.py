"""All images that a run reads: opened once, checked, and delivered as batches."""

import functools
from collections.abc import Iterator

import torch

from allspark_fast.config import Config
from allspark_fast.data.check import check_sources
from allspark_fast.data.loader import EvalSample, SemiBatch, SemiLoader, evaluation_loader
from allspark_fast.data.sources import open_sources
from allspark_fast.data.transforms import CropTransform
from allspark_fast.distributed import rank, world_size
from allspark_fast.errors import DataError

# Entries of each list that are read before training starts; `python -m allspark_fast check` reads all.
_CHECKED = 16
_LISTED = 20


class TrainingData:
    """Labeled, unlabeled and validation images of a configuration; each rank gets its part of them.

    Args:
        config: of the run.
        device: where batches are delivered.

    Attributes:
        sources: what was opened.
        info: names and colors of the classes.
        steps_per_epoch: steps of one pass over the unlabeled images.

    Raises:
        DataError: a folder or file is missing or malformed, or there are too few images.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config = config
        self._device = device
        self.sources = open_sources(config.data)
        self.info = self.sources.info
        self._loader = self._build_loader()
        self.steps_per_epoch = self._loader.steps_per_epoch

    def check(self) -> None:
        """Read some entries of every list, and check that the files of all exist.

        Raises:
            DataError: some cannot be used; the first of these are listed.
        """
        # Supervised training counts the unlabeled images, but does not read them.
        harmless = "labeled_and_unlabeled" if self._config.train.method == "supervised" else None
        problems = check_sources(self.sources, self._config.data.crop, sample=_CHECKED)
        errors = [problem for problem in problems if not problem.is_warning and problem.kind != harmless]
        if errors:
            more = [f"and {len(errors) - _LISTED} more"] if len(errors) > _LISTED else []
            listed = "\n".join([*map(str, errors[:_LISTED]), *more])
            raise DataError(f"{len(errors)} problems in the data; `python -m allspark_fast check` lists all:\n{listed}")

    def batches(self, start_step: int, stop_step: int) -> Iterator[SemiBatch]:
        """Yield the batches of steps, see SemiLoader.iterate."""
        for batch in self._loader.iterate(start_step, stop_step):
            yield batch.to(self._device, non_blocking=True)

    @functools.cached_property
    def first_batch(self) -> SemiBatch:
        """The crops of the first step, with the labels that training does not see."""
        return next(self._build_loader(hidden_labels=True).iterate(0, 1)).to(self._device)

    def validation(self) -> Iterator[EvalSample]:
        """Yield the validation images, see evaluation_loader."""
        data = self._config.data
        return evaluation_loader(
            self.sources.val,
            mean=data.mean,
            std=data.std,
            num_workers=self._config.eval.workers,
            pin_memory=self._device.type == "cuda",
            rank=rank(),
            world_size=world_size(),
        )

    def _build_loader(self, *, hidden_labels: bool = False) -> SemiLoader:
        data, train = self._config.data, self._config.train
        crop = functools.partial(CropTransform, data.crop, mean=data.mean, std=data.std, scale_range=data.scale)
        return SemiLoader(
            self.sources.labeled,
            self.sources.unlabeled,
            crop(photometric=True),
            crop(photometric=False),
            batch_size=train.batch_size,
            seed=train.seed,
            num_workers=0 if hidden_labels else data.workers,
            pin_memory=self._device.type == "cuda",
            labeled_only=train.method == "supervised" and not hidden_labels,
            hidden_labels=hidden_labels,
            rank=rank(),
            world_size=world_size(),
        )

"""Recipes: named settings. Each docstring gives the command, the paper's figures and ours.

Figures of the paper: AllSpark, CVPR 2024, MiT-B5, 4 GPUs; mIoU in percent on the validation set.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from allspark_fast.config import Config, DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from allspark_fast.errors import InputError
from allspark_fast.text import nearest

# Beyond the paper; where this paid, and where not: docs/results.md.
_UNLABELED = TrainConfig(
    batch_size=8,
    optimizer="adamw",
    weight_decay=0.01,
    teacher="ema",
    conf_thresh=0.95,
    conf_mode="class",
    strong=True,
    cutmix=0.5,
    copy_paste=0.5,
    dist_align=10.0,
    kv_source="image",
    pseudo_padding=False,
    ema=0.98,
)


def scenes() -> Config:
    """Procedural scenes, rendered as they are needed: a whole run in about four minutes on two CPU cores.

    ``python train.py``

    The encoder starts from scratch, so pseudo labels count after a quarter of the run only.
    """
    return Config(
        data=DataConfig(dataset="scenes", crop=96, scale=(0.75, 1.5), scenes=(12, 504, 100), workers=1),
        model=ModelConfig(backbone="mit_tiny", embedding_dim=64, memory_init="empty"),
        train=replace(_UNLABELED, steps=1000, lr=4e-3, lr_multi=1.0, warmup=0.25, pseudo_from=0.25, amp=False),
        eval=EvalConfig(times=4),
    )


def camvid() -> Config:
    """CamVid, 46 of 367 images labeled (1/8), EfficientNet-lite0 with ImageNet weights; six minutes of CPU time.

    ``pip install -e '.[timm]' && ALLSPARK_DATA_DIR=/path/to/folder/of/camvid python train.py camvid``
    """
    return Config(
        data=DataConfig(
            dataset="camvid",
            labeled=Path("splits/1_8/seed0/labeled.txt"),
            unlabeled=Path("splits/1_8/seed0/unlabeled.txt"),
            val=Path("splits/val.txt"),
            crop=128,
            scale=(0.5, 1.5),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            workers=1,
        ),
        model=ModelConfig(
            backbone="timm/tf_efficientnet_lite0", embedding_dim=128, memory_init="empty", weights=Path("imagenet")
        ),
        train=replace(_UNLABELED, batch_size=4, steps=600, lr=1e-3, lr_multi=4.0, warmup=0.1, pseudo_from=0.33),
        eval=EvalConfig(times=2),
    )


def folder() -> Config:
    """A folder of your own with images/, labels/ and meta.json, after ``splits ROOT --val 1/4``; for one small GPU.

    ``pip install -e '.[timm]' && python train.py folder --data.root my_data``

    The settings of ``camvid`` for more pixels, images and steps; its length is a guess, not tuned on any folder.
    """
    recipe = camvid()
    return replace(
        recipe,
        data=replace(
            recipe.data,
            dataset="folder",
            labeled=Path("splits/labeled.txt"),
            unlabeled=Path("splits/unlabeled.txt"),
            val=Path("splits/val.txt"),
            crop=321,
            scale=(0.5, 2.0),
            workers=2,
        ),
        train=replace(recipe.train, batch_size=8, steps=2000),
        eval=EvalConfig(times=10),
    )


def pascal() -> Config:
    """Pascal VOC 2012, original (high-quality) labels, 1/8 split.

    ``python train.py pascal --data.root VOC2012 --model.weights mit_b5.pth``

    Paper, 1/16 to full: 76.07, 78.41, 79.77, 80.75, 82.12. Ours: not yet run.
    """
    return Config(
        data=DataConfig(
            dataset="pascal",
            labeled=Path("splits/pascal/1_8/labeled.txt"),
            unlabeled=Path("splits/pascal/1_8/unlabeled.txt"),
            val=Path("splits/pascal/val.txt"),
        ),
        run=RunConfig(log_every=50),
    )


def pascal_augmented() -> Config:
    """Pascal VOC 2012, augmented labels (SBD), 1/8 split.

    ``python train.py pascal_augmented --data.root VOC2012 --model.weights mit_b5.pth``

    Paper, 1/16 to 1/2: 78.32, 79.98, 80.42, 81.14. Ours: not yet run.
    """
    return Config(
        data=DataConfig(
            dataset="pascal",
            labeled=Path("splits/pascal_aug/1_8/labeled.txt"),
            unlabeled=Path("splits/pascal_aug/1_8/unlabeled.txt"),
            val=Path("splits/pascal/val.txt"),
        ),
        run=RunConfig(log_every=50),
    )


def cityscapes() -> Config:
    """Cityscapes, 1/8 split, OHEM on the labeled images, sliding-window evaluation.

    ``python train.py cityscapes --data.root cityscapes --model.weights mit_b5.pth``

    Paper, 1/16 to 1/2: 78.33, 79.24, 80.56, 81.39. Ours: not yet run.
    """
    return Config(
        data=DataConfig(
            dataset="cityscapes",
            labeled=Path("splits/cityscapes/1_8/labeled.txt"),
            unlabeled=Path("splits/cityscapes/1_8/unlabeled.txt"),
            val=Path("splits/cityscapes/val.txt"),
            crop=801,
        ),
        train=TrainConfig(epochs=240, lr=0.005, lr_multi=1.0, warmup_epochs=15, loss="ohem"),
        eval=EvalConfig(mode="sliding"),
        run=RunConfig(log_every=50),
    )


def coco() -> Config:
    """COCO, 81 classes, 1/128 split.

    ``python train.py coco --data.root coco --model.weights mit_b5.pth``

    Paper, 1/512 to 1/64: 34.10, 41.65, 45.48, 49.56. Ours: not yet run. The reference
    configuration leaves ``warmup_epoch`` out, without which its code does not start: here it is 1 of 10 epochs, our
    choice.
    """
    return Config(
        data=DataConfig(
            dataset="coco",
            labeled=Path("splits/coco/1_128/labeled.txt"),
            unlabeled=Path("splits/coco/1_128/unlabeled.txt"),
            val=Path("splits/coco/val.txt"),
        ),
        train=TrainConfig(epochs=10, batch_size=16, warmup_epochs=1),
        run=RunConfig(log_every=50),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe for recipe in (scenes, camvid, folder, pascal, pascal_augmented, cityscapes, coco)
}


def find_recipe(name: str) -> Config:
    """Return the settings of a recipe; raises InputError if there is none of that name."""
    if name not in RECIPES:
        raise InputError(f"there is no recipe {name!r}{nearest(name, RECIPES)}; recipes are {', '.join(RECIPES)}")
    return RECIPES[name]()

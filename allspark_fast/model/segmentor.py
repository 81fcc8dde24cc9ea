"""The whole model: encoder, AllSpark bottleneck, SegFormer head."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from allspark_fast.errors import InputError
from allspark_fast.kernels.arguments import check_count, check_size
from allspark_fast.model.allspark import AllSpark
from allspark_fast.model.common import Backbone, map_size
from allspark_fast.model.cross_attention import KVSource
from allspark_fast.model.mit import MIT_CONFIGS, MixTransformer
from allspark_fast.model.options import AllSparkOptions
from allspark_fast.model.segformer_head import SegFormerHead
from allspark_fast.model.timm_backbone import TimmBackbone


class Decoder(nn.Module):
    """The bottleneck, if any, on the deepest map, then the head; names are those of the reference implementation."""

    def __init__(self, head: SegFormerHead, allspark: AllSpark | None = None) -> None:
        super().__init__()
        self.allspark = allspark
        self.decoder = head

    def forward(self, features: Sequence[Tensor], class_logits: Tensor | None = None, **options: Any) -> Tensor:
        """Decode four maps, finest first, to logits (B, K, h, w) of the same size; options are those of AllSpark."""
        *finer, deepest = features
        if self.allspark is not None:
            deepest = self.allspark(deepest, class_logits, **options)
        return self.decoder([*finer, deepest])


class Segmentor(nn.Module):
    """An encoder, which maps images (B, 3, H, W) to four feature maps, and a decoder, which maps those to logits."""

    def __init__(self, backbone: Backbone, decoder: Decoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.min_size = backbone.min_size

    def forward(
        self,
        images: Tensor,
        class_logits: Tensor | None = None,
        *,
        use_memory: bool = False,
        kv_source: KVSource = "image",
    ) -> Tensor:
        """Segment images at the size of the finest map; upsample_cross_entropy and upsample_argmax upsample further.

        Args:
            images: (B, 3, H, W); in training with AllSpark (2B, 3, H, W), labeled images first.
            class_logits: (B, K, h', w'), training with AllSpark only: what this model, in eval mode and without
                gradient, returned for the unlabeled images.
            use_memory: training with AllSpark only: whether warm-up is over.
            kv_source: eval mode with AllSpark only; see AllSpark.forward.

        Returns:
            logits (B or 2B, K, h, w) of the finest map's size, (⌈H / 4⌉, ⌈W / 4⌉) for a Mix Transformer.
        """
        options = {"crop_size": map_size(images), "use_memory": use_memory, "kv_source": kv_source}
        return self.decoder(self.backbone(images), class_logits, **options)


def build_segmentor(
    backbone: str,
    num_classes: int,
    crop_size: tuple[int, int],
    *,
    allspark: AllSparkOptions | None = AllSparkOptions(),
    embedding_dim: int = 768,
    activation_checkpointing: bool = False,
) -> Segmentor:
    """Build a model for training, with random weights.

    Args:
        backbone: ``mit_tiny``, ``mit_b0`` to ``mit_b5``, or ``timm/NAME`` for a TimmBackbone.
        num_classes: number of classes K, at least 1.
        crop_size: (H, W) of the training crops in pixels, which decides the size of the memory.
        allspark: options of the bottleneck; None leaves it out, which gives SegFormer.
        embedding_dim: channels of the head.
        activation_checkpointing: see MixTransformer. It never covers the bottleneck, which would enqueue twice.

    Raises:
        InputError: the backbone is unknown, does not fit or has no activation checkpointing; the crops are too small.
        MissingPackageError: the backbone needs timm, which is not installed.
        TypeError, ValueError: an argument is of another type, or a number less than 1.
    """
    check_count("num_classes", num_classes)
    check_count("embedding_dim", embedding_dim)
    check_size("crop_size", crop_size)
    if not isinstance(allspark, AllSparkOptions | None):
        raise TypeError(f"allspark must be AllSparkOptions or None, got {allspark!r}")
    encoder: Backbone
    if backbone in MIT_CONFIGS:
        encoder = MixTransformer(MIT_CONFIGS[backbone], activation_checkpointing=activation_checkpointing)
    elif not backbone.startswith("timm/"):
        raise InputError(f"backbone must be one of {', '.join(MIT_CONFIGS)}, or timm/NAME, got {backbone!r}")
    elif activation_checkpointing:
        raise InputError(f"activation_checkpointing is for mit_* backbones, not for {backbone}: leave it False")
    else:
        encoder = TimmBackbone(backbone.removeprefix("timm/"))
    encoder.name = backbone
    if min(crop_size) < encoder.min_size:
        raise InputError(f"crop_size is {crop_size}, expected at least {encoder.min_size} pixels a side")
    height, width = encoder.deepest_size(crop_size)
    bottleneck = None if allspark is None else AllSpark(encoder.channels[-1], num_classes, height * width, allspark)
    head = SegFormerHead(encoder.channels, num_classes, embedding_dim)
    return Segmentor(encoder, Decoder(head, bottleneck))

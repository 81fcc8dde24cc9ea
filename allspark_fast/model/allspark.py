"""The AllSpark bottleneck: goes between any encoder's deepest map and its decoder."""

import torch
from torch import Tensor, nn

from allspark_fast.kernels.arguments import (
    FLOATING,
    check_choice,
    check_count,
    check_not_empty,
    check_number,
    check_tensor,
)
from allspark_fast.model.cross_attention import Attend, CrossAttention
from allspark_fast.model.semantic_memory import ClassMap, MemoryInit, MemorySync, token_class_map
from allspark_fast.model.tokens import pointwise, to_map, to_tokens


class AllSpark(nn.Module):
    """Rebuilds the deepest features of labeled images from unlabeled channels (AllSpark, CVPR 2024, fig. 2).

    In training the batch holds B labeled images, then B unlabeled ones; at test time every image is rebuilt from its
    own channels (or its batch's)::

        bottleneck = AllSpark(channels=512, num_classes=21, tokens=17 * 17)
        deepest = bottleneck(deepest, class_logits, crop_size=(513, 513), use_memory=epoch >= 5)  # training
        deepest = bottleneck.eval()(deepest)  # test

    Args:
        channels: channels C of the deepest map.
        num_classes: number of classes K.
        tokens: spatial tokens h · w of the training crops' deepest map.
        num_heads: attention heads H.
        dropout: of attention maps and projections.
        memory_init: see SemanticMemory.
        memory_sync: see SemanticMemory.
        class_map: see token_class_map.

    Raises:
        TypeError: a size is no integer, or ``dropout`` no number.
        ValueError: a number is less than 1, ``dropout`` is outside [0, 1), or an option is unknown.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        tokens: int,
        *,
        num_heads: int = 2,
        dropout: float = 0.1,
        memory_init: MemoryInit = "randn",
        memory_sync: MemorySync = "rank0",
        class_map: ClassMap = "logits",
    ) -> None:
        super().__init__()
        check_choice("class_map", class_map, ("logits", "softmax"))
        sizes = {"channels": channels, "num_classes": num_classes, "tokens": tokens, "num_heads": num_heads}
        for name, size in sizes.items():
            check_count(name, size)
        check_number("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.class_map = class_map
        # The 1x1 convolutions are kept as such for their names and shapes in the state_dict.
        self.map_in = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU())
        self.attn_norm = nn.LayerNorm(channels, eps=1e-6)
        self.attn = CrossAttention(
            channels,
            num_heads,
            num_classes,
            tokens,
            dropout=dropout,
            memory_init=memory_init,
            memory_sync=memory_sync,
        )
        self.encoder_norm = nn.LayerNorm(channels, eps=1e-6)
        self.map_out = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU())

    def forward(
        self,
        feature_map: Tensor,
        class_logits: Tensor | None = None,
        *,
        crop_size: tuple[int, int] | None = None,
        use_memory: bool = False,
        attend: Attend = "image",
    ) -> Tensor:
        """Rebuild a deepest feature map.

        Args:
            feature_map: (2B, C, h, w) in training, labeled images first; (B, C, h, w) of any size in eval mode.
            class_logits: (B, K, h', w'), training only: logits of the pseudo-label pass on the unlabeled images.
            crop_size: (H, W) of the images in pixels; see token_class_map.
            use_memory: training only: rebuild labeled features from the memory rather than from this batch.
            attend: eval mode only; see CrossAttention.infer.

        Returns:
            a map of the shape of ``feature_map``, channels-last in memory.

        Raises:
            TypeError: an argument is no float tensor.
            ValueError: a shape is wrong; in training, class_logits are missing or the batch is not 2B; in eval mode,
                there are class_logits, or ``attend`` is unknown.
        """
        check_tensor("feature_map", feature_map, "(B, C, h, w)", FLOATING)
        if feature_map.shape[1] != self.attn_norm.normalized_shape[0]:
            raise ValueError(
                f"feature_map has {feature_map.shape[1]} channels, expected {self.attn_norm.normalized_shape[0]}"
            )
        check_choice("attend", attend, ("batch", "image"))
        size = (feature_map.shape[2], feature_map.shape[3])
        self._check_batch(feature_map, class_logits)
        tokens = self.map_in[1](pointwise(self.map_in[0], to_tokens(feature_map)))  # type: ignore[arg-type]
        normalized = self.attn_norm(tokens)
        if class_logits is None:
            attended = self.attn.infer(normalized, attend=attend)
        else:
            class_map = token_class_map(class_logits, size, crop_size=crop_size, kind=self.class_map)
            labeled, unlabeled = normalized.chunk(2)
            attended = torch.cat(self.attn(labeled, unlabeled, class_map, use_memory=use_memory))
        # The residual is the map behind the GELU, not the input.
        tokens = self.encoder_norm(attended + tokens)
        return to_map(self.map_out[1](pointwise(self.map_out[0], tokens)), size)  # type: ignore[arg-type]

    def _check_batch(self, feature_map: Tensor, class_logits: Tensor | None) -> None:
        if not self.training:
            if class_logits is not None:
                raise ValueError("class_logits are for training: call train() first, or leave them out in eval mode")
            return
        if class_logits is None:
            raise ValueError("training needs class_logits, the logits of the pseudo-label pass; or call eval() first")
        check_tensor("class_logits", class_logits, "(B, K, h', w')", FLOATING, like=feature_map)
        check_not_empty("class_logits", class_logits, {"B": 0, "h'": 2, "w'": 3})
        if feature_map.shape[0] != 2 * class_logits.shape[0]:
            raise ValueError(
                f"feature_map holds {feature_map.shape[0]} images, expected 2B = {2 * class_logits.shape[0]}: as many "
                "labeled as the unlabeled ones of class_logits, labeled first"
            )

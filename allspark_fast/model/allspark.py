"""The AllSpark bottleneck, for the deepest feature map between any encoder and its decoder."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allspark_fast.kernels.arguments import FLOATING, check_choice, check_count, check_tensor
from allspark_fast.model.common import map_size, to_map, to_tokens
from allspark_fast.model.cross_attention import CrossAttention, KVSource
from allspark_fast.model.options import AllSparkOptions
from allspark_fast.model.semantic_memory import token_class_map


class AllSpark(nn.Module):
    """Rebuilds the deepest features of labeled images from unlabeled channels (AllSpark, CVPR 2024, fig. 2).

    In training the batch holds B labeled images, then B unlabeled ones. At test time every image is rebuilt from its
    own channels, or from those of its batch.

    Args:
        channels: channels C of the deepest map.
        num_classes: number of classes K.
        tokens: spatial tokens h · w of the training crops' deepest map.
        options: heads, dropout and named switches.

    Raises:
        TypeError, ValueError: a size is not an integer of at least 1.
    """

    def __init__(
        self, channels: int, num_classes: int, tokens: int, options: AllSparkOptions = AllSparkOptions()
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        check_count("num_classes", num_classes)
        check_count("tokens", tokens)
        self.options = options
        # Linear layers in effect; Conv2d keeps names and shapes in the state_dict.
        self.map_in = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU())
        self.attn_norm = nn.LayerNorm(channels, eps=1e-6)
        self.attn = CrossAttention(channels, num_classes, tokens, options)
        self.encoder_norm = nn.LayerNorm(channels, eps=1e-6)
        self.map_out = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU())

    def forward(
        self,
        feature_map: Tensor,
        class_logits: Tensor | None = None,
        *,
        crop_size: tuple[int, int] | None = None,
        use_memory: bool = False,
        kv_source: KVSource = "image",
    ) -> Tensor:
        """Rebuild a deepest feature map.

        Args:
            feature_map: (2B, C, h, w) in training, labeled images first; (B, C, h, w) of any size in eval mode.
            class_logits: (B, K, h', w'), training only: logits of the pseudo-label pass on the unlabeled images.
            crop_size: training only: (H, W) of the images in pixels. The class logits are resized to it and then to the
                tokens, as in the reference implementation; None resizes them directly.
            use_memory: training only: rebuild labeled features from the memory, or (in warm-up) from the unlabeled
                features of this batch. Unlabeled channels are enqueued before, in warm-up too.
            kv_source: eval mode only: where keys and values come from: ``image``, the same image, or ``batch``, all
                images of the batch (the reference implementation; a prediction then depends on the other images).

        Returns:
            a map of the shape of ``feature_map``, channels-last in memory.

        Raises:
            TypeError, ValueError: an argument is of another type or shape; ``class_logits`` are missing in training, or
                given in eval mode.
        """
        check_tensor("feature_map", feature_map, "(B, C, h, w)", FLOATING)
        (channels,) = self.attn_norm.normalized_shape
        if feature_map.shape[1] != channels:
            raise ValueError(f"feature_map has {feature_map.shape[1]} channels, expected {channels}")
        check_choice("kv_source", kv_source, ("batch", "image"))
        if self.training and class_logits is None:
            raise ValueError("training needs class_logits of the pseudo-label pass: give them, or call eval() first")
        if class_logits is not None:
            if not self.training:
                raise ValueError("class_logits are for training only: call train() first, or leave them out")
            check_tensor("class_logits", class_logits, "(B, K, h', w')", FLOATING, feature_map, not_empty="B h' w'")
            images, expected = feature_map.shape[0], 2 * class_logits.shape[0]
            if images != expected:
                raise ValueError(f"feature_map holds {images} images, expected 2B = {expected}: B labeled, B unlabeled")
        size = map_size(feature_map)
        tokens = _pointwise(self.map_in, to_tokens(feature_map))
        normalized = self.attn_norm(tokens)
        if class_logits is None:
            attended = self.attn.infer(normalized, kv_source=kv_source)
        else:
            class_map = token_class_map(class_logits, size, crop_size=crop_size, kind=self.options.class_map)
            labeled, unlabeled = normalized.chunk(2)
            attended = torch.cat(self.attn(labeled, unlabeled, class_map, use_memory=use_memory))
        # The residual is the map after the GELU, not the input.
        tokens = self.encoder_norm(attended + tokens)
        return to_map(_pointwise(self.map_out, tokens), size)


def _pointwise(layers: nn.Sequential, tokens: Tensor) -> Tensor:
    """Apply a 1x1 convolution and its activation to tokens (B, N, C), as the matrix product that it is."""
    conv, activation = layers
    assert isinstance(conv, nn.Conv2d)
    return activation(F.linear(tokens, conv.weight.flatten(1), conv.bias))

"""Model parts: Mix Transformer encoders, the AllSpark bottleneck, the SegFormer head, the whole segmentor."""

from .allspark import AllSpark
from .mit import MIT_CONFIGS, MiTConfig, MixTransformer
from .segformer_head import SegFormerHead
from .segmentor import Decoder, Segmentor, build_segmentor
from .timm_backbone import TimmBackbone

__all__ = [
    "MIT_CONFIGS",
    "AllSpark",
    "Decoder",
    "MiTConfig",
    "MixTransformer",
    "SegFormerHead",
    "Segmentor",
    "TimmBackbone",
    "build_segmentor",
]

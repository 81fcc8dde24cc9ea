"""Encoders, the AllSpark bottleneck, the SegFormer head, and the segmentor made of them."""

from allspark_fast.model.allspark import AllSpark
from allspark_fast.model.common import Backbone
from allspark_fast.model.mit import MIT_CONFIGS, MiTConfig, MixTransformer, compile_blocks
from allspark_fast.model.options import AllSparkOptions
from allspark_fast.model.segformer_head import SegFormerHead
from allspark_fast.model.segmentor import Decoder, Segmentor, build_segmentor
from allspark_fast.model.timm_backbone import TimmBackbone

__all__ = [
    "MIT_CONFIGS",
    "AllSpark",
    "AllSparkOptions",
    "Backbone",
    "Decoder",
    "MiTConfig",
    "MixTransformer",
    "SegFormerHead",
    "Segmentor",
    "TimmBackbone",
    "build_segmentor",
    "compile_blocks",
]

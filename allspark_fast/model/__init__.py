"""Encoders, the AllSpark bottleneck, the SegFormer head, and the segmentor made of them."""

from allspark_fast.model.allspark import AllSpark
from allspark_fast.model.common import Backbone
from allspark_fast.model.mit import compile_blocks
from allspark_fast.model.options import AllSparkOptions
from allspark_fast.model.segmentor import Segmentor, build_segmentor

__all__ = ["AllSpark", "AllSparkOptions", "Backbone", "Segmentor", "build_segmentor", "compile_blocks"]

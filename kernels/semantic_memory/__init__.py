"""The Semantic Memory: channel semantic grouping and the class-wise ring buffers."""

from allspark_fast.kernels.semantic_memory.op import channel_semantic_grouping, semantic_memory_enqueue

__all__ = ["channel_semantic_grouping", "semantic_memory_enqueue"]

"""Fused operators of allspark_fast; import them as ``allspark_fast.kernels``, never as ``kernels``."""

"""FLOPs of matrix products and convolutions by torch's counter, with the formulas that it lacks."""

import math
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import allspark_fast.model  # noqa: F401 registers the operators

# What torch's counter lacks: our operators, and its own attention on a CPU. Its formula of the gradients of
# a convolution overlooks groups.
FLOP_FORMULAS: dict[object, Callable[..., int]] = {
    # Similarity and the product with the values: query (B, H, N, Cq), key (B or 1, H, N, L); backward the similarity
    # again, and gradients of the map, query, key and value.
    torch.ops.allspark_fast.channel_attention: lambda query, key, *_, **__: 2 * 2 * math.prod(query) * key[3],
    torch.ops.allspark_fast.channel_attention_backward: lambda grad, _, key, *__, **___: (
        5 * 2 * math.prod(grad) * key[3]
    ),
    # Cosine similarities of features (B, N, C) and class_map (B, K, N).
    # Nine products for each number of tokens (B, N, C); backward the same again, and gradients of tokens and weights.
    torch.ops.allspark_fast.depthwise_gelu: lambda tokens, *_, **__: 2 * 9 * math.prod(tokens),
    torch.ops.allspark_fast.depthwise_gelu_backward: lambda grad, *_, **__: 3 * 2 * 9 * math.prod(grad),
    # Gradients (B, C, h, w) of input and weight cost as much as the forward pass each.
    torch.ops.aten.convolution_backward: lambda grad, _, weight, *rest, **__: (
        sum(rest[-1][:2]) * 2 * grad[0] * math.prod(grad[2:]) * math.prod(weight)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def flop_counter() -> FlopCounterMode:
    """Return a context that counts the FLOPs in it; on fake tensors nothing is computed."""
    return FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)

"""bfloat16 copies of the weights, cast once a step where autocast casts weight by weight."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from allspark_fast.model.allspark import AllSpark
from allspark_fast.model.mit import MixTransformer


class HalfWeights:
    """bfloat16 copies of the weights that autocast would cast: the same bits as autocast's, in a few launches.

    Backward through the copies leaves gradients on them, which ``collect_gradients`` adds to those of the weights. The
    copies live as long as this object, so that a recorded step finds them where they were.

    Args:
        models: on their device, and the same one more than once counts once. What is copied are the linear layers and
            the convolutions of Mix Transformers and bottlenecks: the head multiplies its weights in float32, and
            encoders of timm are left to autocast.
    """

    def __init__(self, *models: nn.Module) -> None:
        modules = dict.fromkeys(x for model in models for x in model.modules())
        parts = [x for x in modules if isinstance(x, (MixTransformer, AllSpark))]
        layers = [(x, part) for part in parts for x in part.modules() if isinstance(x, (nn.Linear, nn.Conv2d))]
        # The operator for depthwise convolutions takes float32 weights, and an encoder adds the biases of the others in
        # float32. The convolutions of a bottleneck are linear layers.
        self._places = [
            (x, name)
            for x, part in layers
            for name, _ in x.named_parameters()
            if isinstance(x, nn.Linear) or isinstance(part, AllSpark) or (x.groups == 1 and name == "weight")
        ]
        self._weights: list[Tensor] = [layer.get_parameter(name) for layer, name in self._places]
        self._copies: list[Tensor] = [nn.Parameter(x.bfloat16(), requires_grad=x.requires_grad) for x in self._weights]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Cast the weights, and let the copies be the parameters of their layers, for recomputation in backward too."""
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._weights)
        self._install(self._copies)
        try:
            yield
        finally:
            self._install(self._weights)

    def _install(self, parameters: list[Tensor]) -> None:
        for (layer, name), parameter in zip(self._places, parameters, strict=True):
            setattr(layer, name, parameter)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the gradients of the copies to those of the weights, in float32, and clear them."""
        halves = [copy.grad for copy in self._copies if copy.grad is not None]
        if not halves:
            return
        weights = [x for x, copy in zip(self._weights, self._copies, strict=True) if copy.grad is not None]
        gradients = [torch.empty_like(x) for x in weights]
        torch._foreach_copy_(gradients, halves)
        if earlier := [x.grad for x in weights if x.grad is not None]:
            torch._foreach_add_(gradients, earlier)
        for x, gradient in zip(weights, gradients, strict=True):
            x.grad = gradient
        for copy in self._copies:
            copy.grad = None

"""Channel-wise attention between labeled features, unlabeled features and the Semantic Memory."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from allspark_fast.kernels.channel_attention import Backend, channel_attention
from allspark_fast.model.common import to_autocast
from allspark_fast.model.options import AllSparkOptions
from allspark_fast.model.semantic_memory import SemanticMemory

KVSource = Literal["batch", "image"]


class CrossAttention(SemanticMemory):
    """Rebuilds labeled features from unlabeled channels (AllSpark, "Channel-wise Cross-attention").

    It inherits from the memory instead of holding one, so that the buffers keep their names ``attn.kv_queue`` and
    ``attn.queue_ptr`` of the reference implementation. A class of the memory has as many slots as the features have
    channels C; the hidden size is D = H · C. The backend ``reference`` is for exported graphs.
    """

    backend: Backend = "auto"

    def __init__(
        self, channels: int, num_classes: int, tokens: int, options: AllSparkOptions = AllSparkOptions()
    ) -> None:
        super().__init__(num_classes, channels, tokens, options)
        self.num_heads = options.num_heads
        self.dropout = options.dropout
        hidden = options.num_heads * channels
        self.q_u, self.k_u, self.v_u = (_linear(channels, hidden) for _ in range(3))
        self.q_l2u, self.k_l2u, self.v_l2u = (_linear(channels, hidden) for _ in range(3))
        self.out_u, self.out_l2u = (_linear(hidden, channels) for _ in range(2))

    def forward(
        self, labeled: Tensor, unlabeled: Tensor, class_map: Tensor, *, use_memory: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Enqueue unlabeled channels by class map (B, K, N); return rebuilt labeled and refined unlabeled (B, N, C)."""
        self.enqueue(unlabeled, class_map)
        refined = self._self_attention(unlabeled)
        if use_memory:
            memory = to_autocast(self.stored_channels()[None].to(unlabeled.dtype))
            rebuilt = self._cross_attention(labeled, memory, self.queue_filled)
        else:
            rebuilt = self._cross_attention(labeled, unlabeled.transpose(0, 1)[None], None)
        return rebuilt, refined

    def infer(self, features: Tensor, *, kv_source: KVSource) -> Tensor:
        """Rebuild features (B, N, C), any N, from their own channels, as the labeled branch does at test time."""
        features = to_autocast(features)
        source = features.transpose(0, 1)[None] if kv_source == "batch" else features[:, :, None]
        return self._cross_attention(features, source, None)

    def _cross_attention(self, labeled: Tensor, source: Tensor, group_mask: Tensor | None) -> Tensor:
        """Compute the labeled branch: one map [D, groups · D] an image, from a source (B or 1, N, groups, C)."""
        query = self.q_l2u(labeled)[:, None]
        key = self.k_l2u(source).flatten(2)[:, None]
        value = self.v_l2u(source).flatten(2)[:, None]
        rebuilt = channel_attention(
            query, key, value, group_mask=group_mask, dropout_p=self._dropout_p, backend=self.backend
        )
        return F.dropout(self.out_l2u(rebuilt[:, 0]), self._dropout_p)

    def _self_attention(self, unlabeled: Tensor) -> Tensor:
        """Compute the unlabeled branch: one similarity map [C, C] for each image and head."""
        query, key, value = (
            projection(unlabeled).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_u, self.k_u, self.v_u)
        )
        attended = channel_attention(query, key, value, dropout_p=self._dropout_p, backend=self.backend)
        # The reference implementation interleaves the heads as (C, H) here, unlike in the labeled branch.
        return F.dropout(self.out_u(attended.permute(0, 2, 3, 1).flatten(2)), self._dropout_p)

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0


def _linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=False)
    nn.init.xavier_uniform_(linear.weight)
    return linear

"""The whole model and its training step computed the official way, written plainly: what the step is compared with.

Every class takes its parameters, buffers and their names from ours and computes as the public code does
(github.com/xmed-lab/AllSpark at 445809d, model/ and train_allspark.py).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allspark_fast.config import TrainConfig
from allspark_fast.data.info import IGNORE_INDEX
from allspark_fast.data.loader import SemiBatch
from allspark_fast.model import AllSpark, MixTransformer, SegFormerHead, Segmentor
from allspark_fast.model.batch_norm import FiniteBatchNorm2d
from allspark_fast.model.cross_attention import CrossAttention, KVSource
from allspark_fast.model.mit import DepthwiseConv, EfficientSelfAttention, MixFFN
from allspark_fast.model.tokens import to_map, to_tokens
from allspark_fast.training.step import Losses
from bench.naive import naive_channel_attention, naive_enqueue, naive_grouping


def make_naive(model: Segmentor) -> Segmentor:
    """Makes a model, in place, compute the official way from now on; its state_dict stays as it is."""
    for module in model.modules():
        if type(module) in _NAIVE:
            module.__class__ = _NAIVE[type(module)]
    assert model.decoder.allspark is not None
    attention = model.decoder.allspark.attn
    attention.kv_queue = attention.kv_queue.contiguous()  # ours is stored in another order of axes
    return model


def naive_train_step(
    model: Segmentor,
    optimizer: torch.optim.Optimizer,
    batch: SemiBatch,
    config: TrainConfig,
    *,
    lr: float,
    use_memory: bool,
) -> Losses:
    """One training step of learning rate ``lr``, which is set on the host, and where the losses are read."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    with torch.autocast(batch.image.device.type, torch.bfloat16, enabled=config.amp and batch.image.is_cuda):
        losses = naive_losses(model, batch, use_memory=use_memory)
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    for loss in losses:
        loss.item()
    return losses


def naive_losses(model: Segmentor, batch: SemiBatch, *, use_memory: bool) -> Losses:
    """Pseudo-label pass and forward pass, both with full-resolution logits; arguments as ``compute_losses``'s."""
    with torch.no_grad():
        class_logits = model.eval()(batch.unlabeled_image)
        pseudo_label = class_logits.argmax(1)
    model.train()
    images = torch.cat([batch.image, batch.unlabeled_image])
    labeled, unlabeled = model(images, class_logits, use_memory=use_memory).chunk(2)
    labeled_loss = F.cross_entropy(labeled, batch.label, ignore_index=IGNORE_INDEX)
    unlabeled_loss = F.cross_entropy(unlabeled, pseudo_label, ignore_index=IGNORE_INDEX)
    return Losses((labeled_loss + unlabeled_loss) / 2, labeled_loss, unlabeled_loss)


class NaiveSegmentor(Segmentor):
    """Returns logits at the size of the images."""

    def forward(
        self,
        images: Tensor,
        class_logits: Tensor | None = None,
        *,
        use_memory: bool = False,
        kv_source: KVSource = "batch",
    ) -> Tensor:
        """(B, 3, H, W) -> (B, K, H, W); ``class_logits`` are of that size too."""
        logits = super().forward(images, class_logits, use_memory=use_memory, kv_source=kv_source)
        return _upsample(logits, images.shape[2:])


class NaiveMixTransformer(MixTransformer):
    """Copies the map of each stage to contiguous memory."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps, finest first."""
        features, feature_map = [], images
        for stage in range(1, 5):
            tokens, size = getattr(self, f"patch_embed{stage}")(feature_map)
            for block in getattr(self, f"block{stage}"):
                tokens = block(tokens, size)
            feature_map = to_map(getattr(self, f"norm{stage}")(tokens), size).contiguous()
            features.append(feature_map)
        return features


class NaiveSelfAttention(EfficientSelfAttention):
    """Forms the attention map."""

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, h·w, C) and (h, w) -> (B, h·w, C)."""
        query = self.q(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        reduced = self.norm(to_tokens(self.sr(to_map(tokens, size)))) if self.sr_ratio > 1 else tokens
        key, value = self.kv(reduced).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (query @ key.mT * query.shape[3] ** -0.5).softmax(-1)
        return self.proj((attention @ value).transpose(1, 2).flatten(2))


class NaiveMixFFN(MixFFN):
    """Keeps what each of its layers takes in."""

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, h·w, C) and (h, w) -> (B, h·w, C)."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(tokens), size)))


class NaiveDepthwiseConv(DepthwiseConv):
    """Copies tokens to a contiguous map before the convolution."""

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, h·w, C) and (h, w) -> (B, h·w, C)."""
        return to_tokens(self.dwconv(to_map(tokens, size).contiguous()))


class NaiveAllSpark(AllSpark):
    """Doubles the batch in eval mode, where it computes the unlabeled branch and throws it away."""

    def forward(
        self,
        feature_map: Tensor,
        class_logits: Tensor | None = None,
        *,
        crop_size: tuple[int, int] | None = None,  # the logits have this size already
        use_memory: bool = False,
        kv_source: KVSource = "batch",  # the public code knows no other
    ) -> Tensor:
        """(2B, C, h, w) in training, (B, C, h, w) in eval mode; returns the same shape."""
        if not self.training:
            feature_map = torch.cat([feature_map, feature_map])
        tokens = to_tokens(self.map_in(feature_map))
        size = (feature_map.shape[2], feature_map.shape[3])
        class_map = None if class_logits is None else _upsample(class_logits, size).flatten(2)
        labeled, unlabeled = self.attn_norm(tokens).chunk(2)
        attended = torch.cat(self.attn(labeled, unlabeled, class_map, use_memory=use_memory))
        tokens = self.encoder_norm(attended + tokens)
        rebuilt = self.map_out(to_map(tokens, size).contiguous())
        return rebuilt if self.training else rebuilt.chunk(2)[0]


class NaiveCrossAttention(CrossAttention):
    """Clones the memory and forms the similarity maps."""

    def forward(
        self, labeled: Tensor, unlabeled: Tensor, class_map: Tensor | None = None, *, use_memory: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Labeled and unlabeled features (B, N, C) -> the same shapes."""
        if class_map is not None:
            naive_enqueue(self.kv_queue, self.queue_ptr, unlabeled, naive_grouping(unlabeled, class_map))
        refined = self._self_attention(unlabeled)
        return self._rebuild(labeled, self.kv_queue.clone().mT if use_memory else unlabeled), refined

    def _self_attention(self, unlabeled: Tensor) -> Tensor:
        query, key, value = (
            projection(unlabeled).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_u, self.k_u, self.v_u)
        )
        attended = naive_channel_attention(query, key, value, dropout_p=self._dropout_p)
        return F.dropout(self.out_u(attended.permute(0, 2, 3, 1).flatten(2)), self._dropout_p)

    def _rebuild(self, labeled: Tensor, source: Tensor) -> Tensor:
        """Labeled features (B, N, C) from a source (groups, N, C)."""
        query = self.q_l2u(labeled)[:, None]
        key, value = (
            projection(source).transpose(0, 1).flatten(1)[None, None] for projection in (self.k_l2u, self.v_l2u)
        )
        rebuilt = naive_channel_attention(query, key, value, dropout_p=self._dropout_p)
        return F.dropout(self.out_l2u(rebuilt[:, 0]), self._dropout_p)


class NaiveHead(SegFormerHead):
    """Embeds, upsamples and concatenates all four maps before it fuses them."""

    def forward(self, features: list[Tensor]) -> Tensor:  # type: ignore[override]
        """Four maps, finest first, -> logits (B, K, h_0, w_0)."""
        layers = (self.linear_c4, self.linear_c3, self.linear_c2, self.linear_c1)
        embedded = []
        for layer, feature in zip(layers, reversed(features), strict=True):
            projected = to_map(layer.proj(to_tokens(feature)), (feature.shape[2], feature.shape[3])).contiguous()
            embedded.append(projected if feature is features[0] else _upsample(projected, features[0].shape[2:]))
        fused = self.linear_fuse.bn(self.linear_fuse.conv(torch.cat(embedded, 1)))
        return self.linear_pred(self.dropout(F.relu(fused, inplace=True)))


def _upsample(feature_map: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(feature_map, size, mode="bilinear", align_corners=False)


_NAIVE: dict[type[nn.Module], type[nn.Module]] = {
    Segmentor: NaiveSegmentor,
    MixTransformer: NaiveMixTransformer,
    EfficientSelfAttention: NaiveSelfAttention,
    MixFFN: NaiveMixFFN,
    DepthwiseConv: NaiveDepthwiseConv,
    AllSpark: NaiveAllSpark,
    CrossAttention: NaiveCrossAttention,
    SegFormerHead: NaiveHead,
    FiniteBatchNorm2d: nn.BatchNorm2d,
}

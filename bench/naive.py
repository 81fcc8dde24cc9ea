"""The reference implementation written plainly: what the benchmarks compare with.

Operators, and the whole model with its training step as the public code computes them (github.com/xmed-lab/AllSpark at
445809d, model/ and train_allspark.py).
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allspark_fast.config import TrainConfig
from allspark_fast.data.info import IGNORE_INDEX
from allspark_fast.data.loader import SemiBatch
from allspark_fast.model import AllSpark, Segmentor
from allspark_fast.model.batch_norm import FiniteBatchNorm
from allspark_fast.model.common import to_map, to_tokens
from allspark_fast.model.cross_attention import CrossAttention
from allspark_fast.model.mit import EfficientSelfAttention, MixFFN
from allspark_fast.model.segformer_head import SegFormerHead
from allspark_fast.training.step import Losses, TrainState


def naive_channel_attention(query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float = 0.0) -> Tensor:
    """Compute channel attention with every map materialized; shapes as the operator's."""
    similarity = F.instance_norm(query.mT @ key)
    attention = F.dropout(similarity.softmax(-1), dropout_p)
    return (attention @ value.mT).mT


@torch.no_grad()
def naive_grouping(features: Tensor, class_map: Tensor) -> Tensor:
    """Return classes (B, C) of channels by cosine similarity, both sides normalized; shapes as the operator's."""
    return (F.normalize(class_map, dim=-1) @ F.normalize(features, dim=1)).argmax(1)


@torch.no_grad()
def naive_enqueue(queue: Tensor, queue_ptr: Tensor, features: Tensor, channel_class: Tensor) -> None:
    """Enqueue image by image and class by class, with a host sync for the classes and for each pointer."""
    slots = queue.shape[1]
    for image, classes in zip(features, channel_class, strict=True):
        for cls in classes.unique().tolist():
            channels = image[:, classes == cls].mT
            start = int(queue_ptr[cls])
            places = torch.arange(start, start + len(channels), device=queue.device) % slots
            queue[cls, places] = channels
            queue_ptr[cls] = (start + len(channels)) % slots


def naive_mix_ffn(ffn: MixFFN, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Copy tokens (B, h·w, C) to a contiguous map for the convolution, and save the input of every layer."""
    hidden = to_map(ffn.fc1(tokens), size).contiguous()
    return ffn.fc2(F.gelu(to_tokens(ffn.dwconv.dwconv(hidden))))


def make_naive(model: Segmentor) -> Segmentor:
    """Make a model, in place, compute as the reference implementation does; its state_dict stays as it is."""
    for module in model.modules():
        if type(module) in _FORWARD:
            module.forward = MethodType(_FORWARD[type(module)], module)
    assert model.decoder.allspark is not None
    attention = model.decoder.allspark.attn
    attention.kv_queue = attention.kv_queue.contiguous()  # ours is stored in another order of axes
    return model


def naive_train_step(state: TrainState, batch: SemiBatch, *, use_memory: bool, amp: bool = False) -> Losses:
    """Take a training step at the base learning rate, set on the host, where the losses are read too."""
    model, optimizer, config = state.model, state.optimizer, state.config
    for group in optimizer.param_groups:
        group["lr"] = config.lr * group["lr_scale"]
    with torch.autocast(batch.image.device.type, torch.bfloat16, enabled=amp):
        losses = naive_losses(model, batch, config, use_memory=use_memory)
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    for loss in losses:
        loss.item()
    return losses


def naive_losses(model: Segmentor, batch: SemiBatch, _: TrainConfig, *, use_memory: bool) -> Losses:
    """Run pseudo-label pass and forward pass with full-resolution logits; arguments as ``compute_losses``'s."""
    with torch.no_grad():
        class_logits = model.eval()(batch.unlabeled_image)
        pseudo_label = class_logits.argmax(1)
    model.train()
    images = torch.cat([batch.image, batch.unlabeled_image])
    labeled, unlabeled = model(images, class_logits, use_memory=use_memory).chunk(2)
    labeled_loss = F.cross_entropy(labeled, batch.label, ignore_index=IGNORE_INDEX)
    unlabeled_loss = F.cross_entropy(unlabeled, pseudo_label, ignore_index=IGNORE_INDEX)
    return Losses((labeled_loss + unlabeled_loss) / 2, labeled_loss, unlabeled_loss)


def _segmentor(model: Segmentor, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Upsample the logits to the size of the images: (B, 3, H, W) -> (B, K, H, W), as ``class_logits`` are."""
    return upsample(Segmentor.forward(model, images, *args, **kwargs), images.shape[2:])


def _self_attention(attention: EfficientSelfAttention, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Materialize the attention map."""
    query = attention.q(tokens).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    reduced = attention.norm(to_tokens(attention.sr(to_map(tokens, size)))) if attention.sr_ratio > 1 else tokens
    key, value = attention.kv(reduced).unflatten(2, (2, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.mT * query.shape[3] ** -0.5).softmax(-1)
    return attention.proj((weights @ value).transpose(1, 2).flatten(2))


def _bottleneck(
    bottleneck: AllSpark,
    feature_map: Tensor,
    class_logits: Tensor | None = None,
    *,
    use_memory: bool = False,
    **_: object,
) -> Tensor:
    """Double the batch in eval mode, compute the unlabeled branch and discard it."""
    if not bottleneck.training:
        feature_map = torch.cat([feature_map, feature_map])
    tokens = to_tokens(bottleneck.map_in(feature_map))
    size = (feature_map.shape[2], feature_map.shape[3])
    class_map = None if class_logits is None else upsample(class_logits, size).flatten(2)
    labeled, unlabeled = bottleneck.attn_norm(tokens).chunk(2)
    attended = torch.cat(bottleneck.attn(labeled, unlabeled, class_map, use_memory=use_memory))
    tokens = bottleneck.encoder_norm(attended + tokens)
    rebuilt = bottleneck.map_out(to_map(tokens, size).contiguous())
    return rebuilt if bottleneck.training else rebuilt.chunk(2)[0]


def _cross_attention(
    attention: CrossAttention, labeled: Tensor, unlabeled: Tensor, class_map: Tensor | None, *, use_memory: bool
) -> tuple[Tensor, Tensor]:
    """Clone the memory and materialize the similarity maps; features (B, N, C) to the same shapes."""
    if class_map is not None:
        naive_enqueue(attention.kv_queue, attention.queue_ptr, unlabeled, naive_grouping(unlabeled, class_map))
    dropout_p = attention._dropout_p
    query, key, value = (
        projection(unlabeled).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for projection in (attention.q_u, attention.k_u, attention.v_u)
    )
    refined = naive_channel_attention(query, key, value, dropout_p=dropout_p).permute(0, 2, 3, 1).flatten(2)
    source = attention.kv_queue.clone().mT if use_memory else unlabeled
    key, value = (
        projection(source).transpose(0, 1).flatten(1)[None, None] for projection in (attention.k_l2u, attention.v_l2u)
    )
    rebuilt = naive_channel_attention(attention.q_l2u(labeled)[:, None], key, value, dropout_p=dropout_p)[:, 0]
    return F.dropout(attention.out_l2u(rebuilt), dropout_p), F.dropout(attention.out_u(refined), dropout_p)


def _head(head: SegFormerHead, features: list[Tensor]) -> Tensor:
    """Embed, upsample and concatenate all four maps, then fuse them."""
    layers = (head.linear_c4, head.linear_c3, head.linear_c2, head.linear_c1)
    embedded = []
    for layer, feature in zip(layers, reversed(features), strict=True):
        projected = to_map(layer.proj(to_tokens(feature)), (feature.shape[2], feature.shape[3])).contiguous()
        embedded.append(projected if feature is features[0] else upsample(projected, features[0].shape[2:]))
    fused = head.linear_fuse.bn(head.linear_fuse.conv(torch.cat(embedded, 1)))
    return head.linear_pred(head.dropout(F.relu(fused, inplace=True)))


def upsample(feature_map: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize (B, C, h, w) to a size (H, W)."""
    return F.interpolate(feature_map, size, mode="bilinear", align_corners=False)


_FORWARD: dict[type[nn.Module], Callable[..., object]] = {
    Segmentor: _segmentor,
    EfficientSelfAttention: _self_attention,
    MixFFN: naive_mix_ffn,
    AllSpark: _bottleneck,
    CrossAttention: _cross_attention,
    SegFormerHead: _head,
    FiniteBatchNorm: nn.BatchNorm2d.forward,
}

"""Names of tensors in other people's files as ours: one table of patterns for each kind of file."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_HF_ENCODER = r"(?:.*\.)?encoder\."
_HF_BLOCK = rf"{_HF_ENCODER}block\.(?P<stage>\d)\.(?P<block>\d+)\."
# Hugging Face counts stages from 0, we from 1 as the public code does. Its keys and values are two layers, ours one.
_ENCODER = {
    rf"{_HF_ENCODER}patch_embeddings\.(?P<stage>\d)\.proj\.": "backbone.patch_embed{stage}.proj.",
    rf"{_HF_ENCODER}patch_embeddings\.(?P<stage>\d)\.layer_norm\.": "backbone.patch_embed{stage}.norm.",
    rf"{_HF_BLOCK}layer_norm_(?P<part>[12])\.": "backbone.block{stage}.{block}.norm{part}.",
    rf"{_HF_BLOCK}attention\.self\.query\.": "backbone.block{stage}.{block}.attn.q.",
    rf"{_HF_BLOCK}attention\.self\.(?P<part>key|value)\.": "backbone.block{stage}.{block}.attn.{part}.",
    rf"{_HF_BLOCK}attention\.self\.sr\.": "backbone.block{stage}.{block}.attn.sr.",
    rf"{_HF_BLOCK}attention\.self\.layer_norm\.": "backbone.block{stage}.{block}.attn.norm.",
    rf"{_HF_BLOCK}attention\.output\.dense\.": "backbone.block{stage}.{block}.attn.proj.",
    rf"{_HF_BLOCK}mlp\.dense(?P<part>[12])\.": "backbone.block{stage}.{block}.mlp.fc{part}.",
    rf"{_HF_BLOCK}mlp\.dwconv\.": "backbone.block{stage}.{block}.mlp.dwconv.",
    rf"{_HF_ENCODER}layer_norm\.(?P<stage>\d)\.": "backbone.norm{stage}.",
}
_HEAD = {
    r"decode_head\.linear_c\.(?P<stage>\d)\.proj\.": "decoder.decoder.linear_c{stage}.proj.",
    r"decode_head\.linear_fuse\.": "decoder.decoder.linear_fuse.conv.",
    r"decode_head\.batch_norm\.": "decoder.decoder.linear_fuse.bn.",
    r"decode_head\.classifier\.": "decoder.decoder.linear_pred.",
}


def to_our_names(state: Mapping[str, Tensor], *, head: bool = False) -> dict[str, Tensor]:
    """Rename the tensors of a public AllSpark checkpoint, ``mit_b*.pth`` or a Hugging Face SegFormer; keep ours.

    Args:
        state: tensors by name.
        head: also rename the head of a Hugging Face SegFormer, which else keeps the names that no model here has:
            training starts from the encoder alone.

    Raises:
        ValueError: keys of attention have no values beside them.
    """
    table = _ENCODER | (_HEAD if head else {})
    # The public code saves the names of DistributedDataParallel.
    state = {_renamed(name.removeprefix("module."), table): x for name, x in state.items()}
    for name in [name for name in state if name.startswith("backbone.block") and ".attn.key." in name]:
        value = state.pop(name.replace(".key.", ".value."), None)
        if value is None:
            raise ValueError(f"{name} has no values beside it, so this is no whole SegFormer")
        state[name.replace(".key.", ".kv.")] = torch.cat([state.pop(name), value])
    is_encoder = "patch_embed1.proj.weight" in state
    return {f"backbone.{name}": x for name, x in state.items()} if is_encoder else state


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for pattern, ours in table.items():
        if match := re.match(pattern, name):
            parts = match.groupdict()
            if "stage" in parts:
                parts["stage"] = str(int(parts["stage"]) + 1)
            return ours.format(**parts) + name[match.end() :]
    return name

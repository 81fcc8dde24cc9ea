"""Channel-wise attention over an instance-normalised similarity map (UCTransNet; cf. XCiT)."""

from .op import channel_attention

__all__ = ["channel_attention"]

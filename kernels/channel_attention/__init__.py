"""Channel-wise attention over an instance-normalised similarity map (UCTransNet; cf. XCiT)."""

from allspark_fast.kernels.channel_attention.op import Backend, channel_attention

__all__ = ["Backend", "channel_attention"]

"""Frozen text encoders: captions to token states.

from diffusion_pl import text

encoder = text.encoder("minilm", length=32)
tokens, mask, cut = encoder.encode(["a red heart"])
"""

from diffusion_pl.text.encoders import Encoded, Encoder, encoder

__all__ = ["Encoded", "Encoder", "encoder"]

"""Layer 2, the same function as matrix products over chunks of tokens."""

from vig_ref.chunked.chunks import bidirectional_gla, gla

__all__ = ["bidirectional_gla", "gla"]

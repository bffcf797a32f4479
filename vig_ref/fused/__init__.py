"""Layer 3, the same function in Triton: one kernel for both directions forward, one backward, three more for long T.

Read `vig_ref/chunked/chunks.py`, the docstring of kernels.py, then blocks, halving, anchored, kernels, launch. For half
an hour: of blocks the first three quarters, to `carry`; of anchored to `forward_anchored`; `kernels.forward_kernel`;
`launch._cut` and `_forward`. That is the forward pass of sequences in one piece.
"""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "backend 'fused' needs Triton, which is published for Linux only; install it (pip install 'triton>=3.6') or "
        "choose backend='chunked' or 'naive'"
    ) from error

from vig_ref.fused.launch import CHUNK, MAX_K, bidirectional_gla, gla

__all__ = ["CHUNK", "MAX_K", "bidirectional_gla", "gla"]

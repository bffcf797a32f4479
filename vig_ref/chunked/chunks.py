"""Gated linear attention as matrix products over chunks of C tokens: the form that hardware likes.

Unrolling the recurrence, token i reads token j with weight  q_i . (k_j * exp(g_j+1 + ... + g_i)).  A chunk splits
these pairs in two: pairs across chunks go through the state at the chunk's edge, pairs inside a chunk are met directly.

**Why no exponent here is ever positive.** With b the cumulative log gate, the exponent above is b_i - b_j, and the
textbook factorisation exp(b_i) * exp(-b_j) overflows as soon as a chunk forgets much: exp(-b_j) has no bound.
Here every sum of gates runs *away from a boundary* that lies between j and i: one factor decays from j to the
boundary, the other from the boundary to i. Both exponents are sums of numbers <= 0, obtained by adding and never by
subtracting, so that each factor is in [0, 1], -inf (a full reset) is just another gate, and nothing cancels. Inside a
chunk the boundaries are found by halving: the later half of every block of 2, 4, 8, ... tokens reads the earlier half,
and each pair meets exactly once.

The reverse scan is the same code with "earlier" on the right; q, k and v are never flipped.

Notation: docs/notation.md. Shapes: N chunks, `[B, H, N, C, K]` once cut.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bidirectional_gla(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_rev: Tensor, *, scale: float, chunk_size: int = 64
) -> Tensor:
    """Eq. 6: the mean of a scan from the first token and one from the last. See `vig_ref.bidirectional_gla`."""
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    q, k, v, g_fwd, g_rev = (x.to(wide) for x in (q, k, v, g_fwd, g_rev))  # round to half precision once, at the end
    o_fwd = gla(q, k, v, g_fwd, reverse=False, scale=scale, chunk_size=chunk_size)
    o_rev = gla(q, k, v, g_rev, reverse=True, scale=scale, chunk_size=chunk_size)
    return ((o_fwd + o_rev) / 2).to(dtype)


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, reverse: bool, scale: float, chunk_size: int = 64
) -> Tensor:
    """Eq. 5 in four steps, in float32 at least. `chunk_size` changes speed and rounding, never the result.

    See `vig_ref.gla`.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 token, got {chunk_size}")
    T, dtype = q.shape[2], v.dtype
    C = max(1, min(chunk_size, T))
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, g = (cut(x.to(wide), C) for x in (q, k, v, g))

    # 1. Inside a chunk: each token reads the tokens of its own chunk.
    o = intra_chunk(q, k, v, g, reverse)  # [B, H, N, C, V]

    # 2. What each chunk alone adds to the state at its far edge.
    to_edge = torch.exp(decay_from(g, reverse))  # decay from token j to the end of its chunk  [B, H, N, C, K]
    S_own = (k * to_edge).mT @ v  # [B, H, N, K, V]

    # 3. The state that enters each chunk: the recurrence of Eq. 5, one step a chunk instead of one a token.
    total = g.sum(-2)[..., None]  # log decay over a whole chunk  [B, H, N, K, 1]
    S = torch.zeros_like(S_own[:, :, 0])
    S_in = [S] * S_own.shape[2]
    for n in reversed(range(len(S_in))) if reverse else range(len(S_in)):
        S_in[n] = S
        S = torch.exp(total[:, :, n]) * S + S_own[:, :, n]

    # 4. Across chunks: each token reads the state that entered its chunk, decayed down to the token itself.
    o = o + (q * torch.exp(decay_to(g, reverse))) @ torch.stack(S_in, dim=2)
    return (scale * o)[:, :, :, :C].flatten(2, 3)[:, :, :T].to(dtype)


def intra_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, reverse: bool) -> Tensor:
    """sum over j met no later than i in the chunk of  q_i . (k_j * exp(g_j+1 + ... + g_i)) v_j,  by halving.

    Args: `[..., C, K]` (v: `[..., C, V]`), C a power of two. Returns `[..., C, V]`.
    """
    C = q.shape[-2]
    o = (q * k).sum(-1, keepdim=True) * v  # i = j: no gate in between
    half = 1
    while half < C:
        early, late = (1, 0) if reverse else (0, 1)
        q_, k_, v_, g_ = (x.unflatten(-2, (C // (2 * half), 2, half)) for x in (q, k, v, g))
        q_late = q_[..., late, :, :] * torch.exp(decay_to(g_[..., late, :, :], reverse))
        k_early = k_[..., early, :, :] * torch.exp(decay_from(g_[..., early, :, :], reverse))
        o_late = (q_late @ k_early.mT) @ v_[..., early, :, :]  # A v, with A: [..., C / (2 half), half, half]
        pair = [torch.zeros_like(o_late), torch.zeros_like(o_late)]
        pair[late] = o_late
        o = o + torch.stack(pair, dim=-3).flatten(-4, -2)
        half *= 2
    return o


def decay_to(g: Tensor, reverse: bool) -> Tensor:
    """Log decay from the block's near edge down to token i, its own gate included: b_i.  `[..., C, K]`"""
    return g.flip(-2).cumsum(-2).flip(-2) if reverse else g.cumsum(-2)


def decay_from(g: Tensor, reverse: bool) -> Tensor:
    """Log decay from token j to the block's far edge, its own gate excluded: what is met after j.  `[..., C, K]`"""
    after = F.pad(g[..., :-1, :], (0, 0, 1, 0)) if reverse else F.pad(g[..., 1:, :], (0, 0, 0, 1))
    return decay_to(after, not reverse)


def cut(x: Tensor, C: int) -> Tensor:
    """`[B, H, T, D]` into chunks of C tokens, each padded to a power of two: `[B, H, N, 2^n, D]`.

    The padding is zeros behind a chunk's last token: k = 0 adds nothing, g = 0 (in log) forgets nothing.
    """
    N = max(1, -(-x.shape[2] // C))  # one chunk of padding stands for T = 0
    x = F.pad(x, (0, 0, 0, N * C - x.shape[2])).unflatten(2, (N, C))
    return F.pad(x, (0, 0, 0, (1 << (C - 1).bit_length()) - C))

"""Gated linear attention as its authors write it: a recurrence over tokens (ViG, Eqs. 5 and 6).

`S: [B, H, K, V]` is a memory of key-value pairs. At each token a gate fades it, row by row; then the token's own
pair is added, and the token's query reads it. Plain PyTorch, differentiable by autograd, in the dtype given.
"""

import torch
from torch import Tensor


def bidirectional_gla(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_rev: Tensor, *, scale: float) -> Tensor:
    """Eq. 6: the mean of a scan from the first token and one from the last. See `vig_ref.bidirectional_gla`."""
    o_fwd = gla(q, k, v, g_fwd, reverse=False, scale=scale)
    o_rev = gla(q, k, v, g_rev, reverse=True, scale=scale)
    return (o_fwd + o_rev) / 2


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, reverse: bool, scale: float) -> Tensor:
    """Eq. 5: one scan over the tokens, from the last to the first if `reverse`. See `vig_ref.gla`."""
    B, H, T, K = q.shape
    alpha = torch.exp(g)
    if T == 0:  # nothing to compute, but a gradient for every input
        return (q * k * alpha).sum(3, keepdim=True).to(v.dtype) * v
    S = alpha.new_zeros(B, H, K, v.shape[3])
    o = [v] * T
    for t in reversed(range(T)) if reverse else range(T):
        S = alpha[:, :, t, :, None] * S + k[:, :, t, :, None] * v[:, :, t, None, :]  # S_t = G_t * S_t-1 + k_t^T v_t
        o[t] = (q[:, :, t, None, :] @ S.to(q.dtype))  # o_t = q_t S_t   [B, H, 1, V]
    return scale * torch.cat(o, dim=2)

"""Solutions of chapter 4, gradients by hand."""

import torch

import vig_ref


def dv_by_gla(q, k, v, g, do, scale):
    """dS gathers q_t^T do_t and is read by k; the arrow back into t carries the gate of t + 1, the last one none."""
    next_gate = torch.cat([g[:, :, 1:], torch.zeros_like(g[:, :, :1])], dim=2)
    return vig_ref.gla(k, q, do, next_gate, reverse=True, scale=scale)


def d_initial_state(q, g, do, scale):
    """o_t gains scale (q_t exp(b_t)) S_-1, with b_t the sum of all gates up to t, its own included."""
    return scale * (q * torch.exp(g.cumsum(0))).T @ do


def peak_states(T, C):
    """A chunk that is not full is a chunk; and no chunk is longer than the sequence. (C near the root of T is best.)"""
    return -(-T // C) + min(C, T)


def dalpha(q, k, v, alpha, do, scale):
    """The last line of section 1 without its factor alpha: what S_t-1 would have contributed."""
    S = [torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype)]
    for t in range(len(q)):
        S.append(alpha[t][:, None] * S[t] + k[t][:, None] * v[t])
    dS, rows = torch.zeros_like(S[0]), []
    for t in reversed(range(len(q))):
        dS = dS + scale * q[t][:, None] * do[t]
        rows.append((S[t] * dS).sum(1))
        dS = alpha[t][:, None] * dS
    return torch.stack(rows[::-1])

"""Solutions of chapter 1."""

import math

import torch


def half_life(g: float) -> float:
    return math.log(2) / -g  # exp(n g) = 1/2


def weight(q, k, g, i: int, j: int):
    if j > i:
        return torch.zeros((), dtype=q.dtype)
    decay = g[j + 1 : i + 1].sum(0).exp()  # the gates met after token j, token i's own included  [K]
    return (q[i] * k[j] * decay).sum()


def reverse_scan(q, k, v, g):
    S, o = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), torch.empty_like(v)
    for t in reversed(range(len(q))):
        S = g[t].exp()[:, None] * S + torch.outer(k[t], v[t])
        o[t] = q[t] @ S
    return o

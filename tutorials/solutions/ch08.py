"""Solutions of chapter 8, how to trust a kernel."""

from fractions import Fraction
from math import prod

import torch

import vig_ref


def gauge(q, k, v, g_fwd, g_rev, scale):
    """Every term of the sum with its magnitude; the gates, factors from 0 to 1, stay as they are."""
    return vig_ref.bidirectional_gla(q.abs(), k.abs(), v.abs(), g_fwd, g_rev, scale=abs(scale), backend="naive")


def o_by_pairs(q, k, v, alpha):
    """Token i reads token j through the gates after j, up to and with its own. No quotient, so that 0 is a gate too."""
    return [
        sum((q[i] * k[j] * v[j] * prod(alpha[j + 1 : i + 1], start=Fraction(1)) for j in range(i + 1)), Fraction(0))
        for i in range(len(q))
    ]


def directions_are_right(operator, q, k, v, g_fwd, g_rev):
    """With g_rev closed, only the forward scan is left, and no token may know of the last one."""
    closed = torch.full_like(g_rev, -torch.inf)
    changed = torch.cat([k[:, :, :-1], k[:, :, -1:] + 1], dim=2)
    one, two = (operator(q, key, v, g_fwd, closed, scale=0.5) for key in (k, changed))
    return torch.equal(one[:, :, :-1], two[:, :, :-1])


def a_call_that_shows_it():
    """24 is padded to 32, which a mean notices; and the third chunk is the first to read a state that crossed one."""
    return dict(T=72, chunk_size=24)

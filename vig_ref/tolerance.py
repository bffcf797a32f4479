"""How close is close enough: the one error bound of the project, and the inputs it is tried on.

A result X is compared with X64, the naive recurrence in float64 *on the very values that the layer read*:

    |X - X64|  <=  4 (u_dot + u_sum (1 + L + N)) G  +  u_out |X64|  +  eta                         (elementwise)

    G      the gauge: the same computation on |q|, |k|, |v|, |do| with the gates unchanged. It is the sum of the
           magnitudes of the terms, hence what rounding errors are proportional to, however much the terms cancel.
    u_dot  unit roundoff of the operands of matrix products: 0 for IEEE float32, 2^-11 tf32 and float16, 2^-8 bfloat16.
    u_sum  unit roundoff of the accumulator: 2^-24, or 2^-53 in float64.
    L      the largest |log decay| inside a chunk. The exponential turns an absolute error of u_sum L in its argument
           into a relative one. Resets are left out (exp(-inf) is exact), and L stops where exp() underflows to 0.
    N      chunks in the sequence: a state is rounded at every chunk's edge, and equal tokens make equal roundings,
           which add up.
    4      the most operands that are rounded on the way of one term: do and v to a score, the score and a decayed key
           to dq, from which dg follows.
    u_out  unit roundoff of the stored result; eta, its smallest useful magnitude.

The gradient of a gate is a difference of sums over a chunk, so its gauge is the sum of all that is
subtracted:

    G_dg[t] = sum of |q| G_dq + |k| G_dk over the tokens of the chunk from t on, plus G of the chunk's last state

The second gate is over a whole tensor and readable: rms(X - X64) <= RMS_LIMIT rms(X64). It is asked of sequences of
RMS_TOKENS or more: fewer share too few sums, and one that cancels, as the only score of a single token may, would count
as an error. The first gate knows how much a sum cancels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vig_ref import naive

NAMES = ("o", "dq", "dk", "dv", "dg_fwd", "dg_rev")
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ETA = {torch.float64: 0.0, torch.float32: 1e-37, torch.float16: 6e-8, torch.bfloat16: 1e-37}
DOT_UNIT = {"ieee": 0.0, "tf32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
RMS_LIMIT = {
    "float64": 1e-13, "ieee": 2e-6, "ieee, strong gates": 2e-5, "tf32": 1e-3, "float16": 1e-3, "bfloat16": 6e-3,
}  # fmt: skip

RMS_TOKENS = 16

_INF = float("inf")
#: Gate regimes, by name: each maps a standard normal tensor to log gates <= 0.
REGIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "vig": lambda x: F.logsigmoid(x) / 16,  # what a ViG computes: -0.05 a token on average
    "keep": lambda x: 0 * x,  # nothing is forgotten: plain linear attention
    "moderate": lambda x: -x.abs(),
    "strong": lambda x: -20 - 80 * torch.special.ndtr(x),  # -20 to -100 a token
    "reset": lambda x: torch.where(x > 1, -_INF, F.logsigmoid(x) / 16),  # one gate in six empties its row
    "all reset": lambda x: torch.full_like(x, -_INF),  # only the token itself is left
}


class Inputs(NamedTuple):
    """The operator's tensors and the gradient of its result, `[B, H, T, K or V]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    g_fwd: Tensor
    g_rev: Tensor
    do: Tensor


def draw(
    B: int, H: int, T: int, K: int, V: int, *, regime: str = "vig", seed: int = 0,
    dtype: torch.dtype = torch.float32, gate_dtype: torch.dtype | None = None, device: str | torch.device = "cpu",
) -> Inputs:
    """Seeded standard normal inputs with the gates of a regime, equal on every device."""
    r = torch.Generator().manual_seed(seed)
    q, k, v, g_fwd, g_rev, do = (torch.randn(B, H, T, D, generator=r) for D in (K, K, V, K, K, V))
    q, k, v, do = (x.to(device, dtype) for x in (q, k, v, do))
    g_fwd, g_rev = (REGIMES[regime](g).to(device, gate_dtype or dtype) for g in (g_fwd, g_rev))
    return Inputs(q, k, v, g_fwd, g_rev, do)


def evaluate(function: Callable[..., Tensor], x: Inputs, **options) -> dict[str, Tensor]:
    """The result of `function(q, k, v, g_fwd, g_rev, **options)` and its five gradients, by name."""
    leaves = [t.detach().requires_grad_() for t in x[:5]]
    o = function(*leaves, **options)
    return dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, leaves, x.do)), strict=True))


def reference(x: Inputs, *, scale: float) -> dict[str, Tensor]:
    """The oracle: the naive recurrence in float64 on the values of `x`."""
    return evaluate(naive.bidirectional_gla, _float64(x), scale=scale)


def bounds(
    x: Inputs, exact: dict[str, Tensor], *, scale: float, chunk: int, dot: str = "ieee"
) -> dict[str, Tensor]:
    """The elementwise bound on |X - X64| for each result.

    Args:
        exact: what `reference` returned.
        chunk: the chunk length of the layer under test; 1 for the naive layer.
        dot: the arithmetic of its matrix products, a key of `DOT_UNIT`.
    """
    u_sum = UNIT[torch.promote_types(x.q.dtype, torch.float32)]
    u_dot = DOT_UNIT[dot]
    gauge = {name: torch.zeros_like(value) for name, value in exact.items()}
    q, k, v, g_fwd, g_rev, do = (t.abs() if n not in (3, 4) else t for n, t in enumerate(_float64(x)))
    for reverse, g, dg in ((False, g_fwd, "dg_fwd"), (True, g_rev, "dg_rev")):
        leaves = [t.detach().requires_grad_() for t in (q, k, v, g)]
        o = naive.gla(*leaves, reverse=reverse, scale=abs(scale) / 2)
        dq, dk, dv, G = torch.autograd.grad(o, leaves, do)
        for name, part in (("o", o.detach()), ("dq", dq), ("dk", dk), ("dv", dv)):
            gauge[name] += part
        gauge[dg] = _gate_gauge(q * dq + k * dk, G, chunk, reverse)
    L = max(_largest_decay(g, chunk, u_sum) for g in (g_fwd, g_rev))
    N = -(-q.shape[2] // chunk)
    unit = u_dot + u_sum * (1 + L + N)
    dtypes = dict(zip(NAMES, (x.v.dtype, *(t.dtype for t in x[:5])), strict=True))
    return {
        name: 4 * unit * gauge[name] + UNIT[dtypes[name]] * exact[name].abs() + ETA[dtypes[name]]
        for name in NAMES
    }


def worst_ratios(
    got: dict[str, Tensor], x: Inputs, *, scale: float, chunk: int, dot: str = "ieee"
) -> dict[str, float]:
    """The largest |X - X64| / bound for each result: at most 1 passes; NaN anywhere counts as infinite."""
    exact = reference(x, scale=scale)
    bound = bounds(x, exact, scale=scale, chunk=chunk, dot=dot)
    return {name: nearest(got[name], exact[name], bound[name])[0] if got[name].numel() else 0.0 for name in NAMES}


def nearest(got: Tensor, expected: Tensor, bound: Tensor) -> tuple[float, float, float]:
    """Error / bound, error and bound at the element where the first is largest. NaN anywhere is an infinite ratio."""
    error = (got.double() - expected).abs()
    ratio = torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=_INF, posinf=_INF).flatten()
    n = ratio.argmax()
    return ratio[n].item(), error.flatten()[n].item(), bound.flatten()[n].item()


def rms_kind(x: Inputs, dot: str) -> str:
    """The key of `RMS_LIMIT` for inputs and the arithmetic of a layer's matrix products, a key of `DOT_UNIT`."""
    if x.q.dtype == torch.float64:
        return "float64"
    return "ieee, strong gates" if dot == "ieee" and min(x.g_fwd.min(), x.g_rev.min()) < -1 else dot


def rms_ratios(got: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> dict[str, float]:
    """rms(X - X64) / (limit rms(X64) + eta) for each result: at most 1 passes. 0 for fewer than RMS_TOKENS tokens."""

    def rms(x: Tensor) -> float:
        return x.square().mean().sqrt().item() if x.numel() else 0.0

    ratios = {}
    for name in NAMES:
        error = rms(got[name].double() - exact[name])
        ratio = 0.0 if error == 0 else error / (limit * rms(exact[name]) + ETA[got[name].dtype])
        if math.isnan(ratio):
            ratio = _INF  # max() would pass over a NaN
        elif exact[name].shape[2] < RMS_TOKENS:
            ratio = 0.0
        ratios[name] = ratio
    return ratios


def _float64(x: Inputs) -> Inputs:
    return Inputs(*(t.detach().double() for t in x))


def _gate_gauge(terms: Tensor, G: Tensor, chunk: int, reverse: bool) -> Tensor:
    """Sum `terms` over the tokens of the chunk that a scan meets from t on; add G at the next chunk's first token."""
    if reverse:  # chunks are cut from the left in both directions: pad on the right, then look from the other end
        pad = -terms.shape[2] % chunk
        terms, G = (F.pad(t, (0, 0, 0, pad)).flip(2) for t in (terms, G))
        return _gate_gauge(terms, G, chunk, False).flip(2)[:, :, : terms.shape[2] - pad]
    T = terms.shape[2]
    terms, G = (F.pad(t, (0, 0, 0, -T % chunk)).unflatten(2, (-1, chunk)) for t in (terms, G))
    later = F.pad(G[:, :, 1:, :1], (0, 0, 0, 0, 0, 1))
    return (terms.flip(3).cumsum(3).flip(3) + later).flatten(2, 3)[:, :, :T]


def _largest_decay(g: Tensor, chunk: int, u_sum: float) -> float:
    g = torch.where(g.isinf(), 0.0, g.abs())
    decay = F.pad(g, (0, 0, 0, -g.shape[2] % chunk)).unflatten(2, (-1, chunk)).sum(3)
    underflow = 104.0 if u_sum == UNIT[torch.float32] else 745.0
    return min(decay.max().item(), underflow) if decay.numel() else 0.0

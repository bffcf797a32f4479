"""Without rounding there is no tolerance: the layers must agree digit for digit, and so must their gradients.

Two tiers, cheapest first.

*Exact numbers.* The source of the naive and the chunked layer runs as it stands, and so does autograd through it, but
every number is a fraction or a residue modulo a prime (`ExactNumbers`). Two formulas that are not the same function
differ: on fractions always, modulo p for all but a share of about 1/p of the inputs. It sees every error of algebra,
however small its effect in floating point. It cannot see what rounding or overflow do, nor the kernel.

*Dyadic inputs.* Small integers and gates that are powers of two make every product and every sum of a float32
computation exact, in whatever order it is done. So all three layers must agree bitwise, in every launch configuration.
It sees a wrong index, mask, sign or factor anywhere. It cannot see precision: what rounds elsewhere is exact here.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cases import FUSED_DEVICE, Case, cases, interpreted
from vig_ref import chunked, fused, gla, naive
from vig_ref.fused import anchored, blocks, kernels, launch
from vig_ref.tolerance import NAMES, Inputs, bounds, evaluate

aten = torch.ops.aten

# --- exact numbers ---------------------------------------------------------------------------------------------------

#: Operations that move numbers and compute nothing.
MOVES = {
    aten.alias, aten.cat, aten.clone, aten.constant_pad_nd, aten.detach, aten.expand, aten.flip, aten.new_zeros,
    aten.promote_types, aten.select, aten.select_backward, aten.slice, aten.slice_backward, aten.squeeze, aten.stack,
    aten.transpose, aten.unsqueeze, aten.view, aten._unsafe_view, aten.zeros_like,
}  # fmt: skip


@dataclass(frozen=True)
class Log:
    """The logarithm of a number, kept as that number: sums of logarithms are products, and a reset is Log(0)."""

    alpha: Fraction | int

    def __add__(self, other):
        return Log(self.alpha * exp(other))

    __radd__ = __add__

    def __mod__(self, p: int):
        return Log(self.alpha % p)


def exp(x):
    return x.alpha if isinstance(x, Log) else {0: 1}[x]  # the only logarithm that is a plain number is a padded 0


class ExactNumbers(TorchDispatchMode):
    """PyTorch, autograd included, on fractions (p = 0) or on residues modulo a prime p.

    A tensor holds the *places* of its numbers in a list. Operations that move numbers move places and need no care;
    those that compute look the numbers up and write the results at the end of the list. The number at place 0 is 0,
    so that padding and new_zeros mean what they say. An operation that is not listed here is an error.
    """

    def __init__(self, p: int = 0):
        super().__init__()
        self.p = p
        self.numbers = [0]

    def write(self, values) -> Tensor:
        values = np.asarray(values, dtype=object)
        first = len(self.numbers)
        self.numbers.extend((values % self.p if self.p else values).flat)
        return torch.arange(first, len(self.numbers), dtype=torch.float64).reshape(values.shape)

    def literal(self, x: float | Fraction) -> Fraction | int:
        """A number of the source, such as a scale, without rounding."""
        x = Fraction(x)
        return x.numerator * pow(x.denominator, -1, self.p) if self.p else x

    def read(self, x: Tensor | float) -> np.ndarray:
        """The numbers of a tensor; a literal, which PyTorch may wrap into a tensor without dimensions, is itself."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            return np.asarray(self.literal(float(x)), dtype=object)
        places = x.long().flatten().tolist()
        values = np.empty(len(places), dtype=object)
        values[:] = [self.numbers[place] for place in places]
        return values.reshape(tuple(x.shape))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operation = function.overloadpacket
        if operation in MOVES:
            return function(*args, **(kwargs or {}))
        rules = {
            aten.add: lambda a, b: self.read(a) + self.read(b),
            aten.mul: lambda a, b: self.read(a) * self.read(b),
            aten.bmm: lambda a, b: self.read(a) @ self.read(b),
            aten.div: lambda a, b: self.read(a) * self.literal(1 / Fraction(float(b))),
            aten.exp: lambda a: np.vectorize(exp, otypes=[object])(self.read(a)),
            aten.cumsum: lambda a, dim: self.read(a).cumsum(dim),
            aten.sum: lambda a, dim, keepdim=False: self.read(a).sum(tuple(d % a.dim() for d in dim), keepdims=keepdim),
        }
        return self.write(rules[operation](*args))


def exact_inputs(numbers: ExactNumbers, T: int, K: int, V: int, seed: int) -> Inputs:
    """Random numbers of either kind; one gate in eight is a reset."""
    r = np.random.default_rng(seed)
    shape = lambda D: (1, 2, T, D)  # noqa: E731
    if numbers.p:
        number = np.vectorize(lambda _: int(r.integers(numbers.p)), otypes=[object])
    else:
        number = np.vectorize(lambda _: Fraction(int(r.integers(-9, 10)), int(r.integers(1, 10))), otypes=[object])
    gate = np.vectorize(lambda a: Log(a if r.random() > 1 / 8 else 0), otypes=[object])
    q, k, v, alpha_fwd, alpha_rev, do = (numbers.write(number(np.empty(shape(D)))) for D in (K, K, V, K, K, V))
    g_fwd, g_rev = (numbers.write(gate(numbers.read(alpha))) for alpha in (alpha_fwd, alpha_rev))
    return Inputs(q, k, v, g_fwd, g_rev, do)


def by_pairs(x: Inputs, scale: int, numbers: ExactNumbers) -> dict[str, np.ndarray]:
    """The operator and its gradients as sums over pairs of tokens: one line of algebra each, no recurrence, no chunk.

    With W_ij = product of alpha_t over the gates t that a scan meets after token j and up to token i (no division, so
    that a reset is a gate like any other), summed over both scans,

        o_i  = scale/2 sum_j (q_i * W_ij . k_j) v_j
        dg_t = scale/2 sum over the pairs with gate t between j and i of  q_i * W_ij * k_j (do_i . v_j)

    and dq, dk, dv are the derivatives of the first line. This is the hand-written adjoint; autograd is the other one.
    """
    q, k, v, g_fwd, g_rev, do = (numbers.read(t) for t in x)
    T = q.shape[2]
    half = numbers.literal(Fraction(scale, 2))
    got = {name: np.zeros_like(t) for name, t in zip(NAMES, (v, q, k, v, q, q), strict=True)}
    dA = do @ v.swapaxes(2, 3) * half  # [B, H, T, T]
    for g, dg, order in ((g_fwd, "dg_fwd", range(T)), (g_rev, "dg_rev", range(T - 1, -1, -1))):
        order = list(order)
        for at, j in enumerate(order):
            W = np.ones_like(q[:, :, j])
            met = []  # the gates between j and i
            for i in order[at:]:
                if i != j:
                    W = W * np.vectorize(exp, otypes=[object])(g[:, :, i])
                    met.append(i)
                qW, Wk, dA_ij = q[:, :, i] * W, W * k[:, :, j], dA[:, :, i, j, None]
                A_ij = (qW * k[:, :, j]).sum(-1, keepdims=True) * half
                got["o"][:, :, i] += A_ij * v[:, :, j]
                got["dv"][:, :, j] += A_ij * do[:, :, i]
                got["dq"][:, :, i] += dA_ij * Wk
                got["dk"][:, :, j] += dA_ij * qW
                got[dg][:, :, met] += (qW * k[:, :, j] * dA_ij)[:, :, None]
    return {name: t % numbers.p if numbers.p else t for name, t in got.items()}


def exactly_equal(layer, x: Inputs, expected: dict[str, np.ndarray], numbers: ExactNumbers, **options):
    with numbers:
        got = evaluate(layer.bidirectional_gla, x, scale=3, **options)
    for name in NAMES:
        assert (numbers.read(got[name]) == expected[name]).all(), f"{layer.__name__} {options}: {name}"


@pytest.mark.parametrize("T", [1, 2, 7, 12])
def test_layers_are_equal_over_the_fractions(T):
    numbers = ExactNumbers()
    x = exact_inputs(numbers, T, K=2, V=3, seed=T)
    expected = by_pairs(x, 3, numbers)
    exactly_equal(naive, x, expected, numbers)
    for chunk_size in range(1, T + 2):
        exactly_equal(chunked, x, expected, numbers, chunk_size=chunk_size)


@pytest.mark.parametrize("T", [1, 3, 16, 17, 33, 70])
def test_layers_are_equal_modulo_a_prime(T):
    numbers = ExactNumbers(p=2**61 - 1)
    x = exact_inputs(numbers, T, K=3, V=2, seed=T)
    expected = by_pairs(x, 3, numbers)
    exactly_equal(naive, x, expected, numbers)
    for chunk_size in sorted({1, 2, 3, 5, 8, 16, 31, 64, T, T + 1}):
        exactly_equal(chunked, x, expected, numbers, chunk_size=chunk_size)


# --- dyadic inputs ---------------------------------------------------------------------------------------------------

#: The log gate of 1/2. Its last three bits are 0, so that up to 8 of them add without rounding, in whatever order.
HALF = torch.tensor(-math.log(2.0))
MOST = 8


def dyadic(T: int, K: int, V: int, seed: int, weak: bool = False) -> Inputs:
    """Numbers in {-1, 0, 1} and gates 1, 1/2, 1/4 or 0, with at most 8 halvings of a row between resets.

    `weak`: two halvings in a row and no reset, so that the fused layer may stay on its fast path.

    Why every sum is then exact in float32, whatever its order: all terms are integer multiples of 2^-8 (times scale/2,
    a power of two), and the largest partial sums there are, those of dg, count pairs of tokens on either side of a gate
    and features of v: at most T^2/4 V. A float32 holds every multiple of 2^-8 up to 2^16.
    """
    assert T * T / 4 * V < 2**16
    assert T * K < 2**16
    r = torch.Generator().manual_seed(seed)
    q, k, v, do = (torch.randint(-1, 2, (1, 2, T, D), generator=r).float() for D in (K, K, V, V))

    def weak_gates():
        return torch.rand(1, 2, T, K, generator=r).argsort(2).lt(2) * HALF

    def gates():
        reset = torch.rand(1, 2, T, K, generator=r) < 1 / 8
        wanted = torch.randint(0, 3, (1, 2, T, K), generator=r)
        n, used = torch.zeros_like(wanted), torch.zeros_like(wanted[:, :, 0])
        for t in range(T):
            used = torch.where(reset[:, :, t], 0, used)
            n[:, :, t] = torch.minimum(wanted[:, :, t], MOST - used)
            used = used + n[:, :, t]
        return torch.where(reset, -torch.inf, n * HALF)

    gates = weak_gates if weak else gates
    return Inputs(q, k, v, gates(), gates(), do)


def test_powers_of_two_are_exact_on_this_machine():
    """What the dyadic tier stands on: exp, and multiplication by log2 e before exp2, round to the exact power."""
    n = torch.arange(MOST + 1.0)
    g = n * HALF
    for copies in (1, 8, 64):  # scalar and vectorised code
        assert torch.equal(g.repeat(copies).exp(), 2.0 ** -n.repeat(copies))
    assert torch.equal(g * torch.tensor(blocks.LOG2E.value), -n)
    assert torch.equal(g.double(), n.double() * HALF.double()), "n times the gate is rounded"


def equal_bits(layer, x: Inputs, expected: dict[str, Tensor], scale: float, **options):
    device = FUSED_DEVICE if layer is fused else "cpu"
    got = evaluate(layer.bidirectional_gla, Inputs(*(t.to(device) for t in x)), scale=scale, **options)
    for name in NAMES:
        assert torch.equal(got[name].cpu(), expected[name]), f"{layer.__name__} {options}: {name}"


def forbid(monkeypatch, path: str):
    """In the interpreter, a fused kernel that takes this path fails: the test is about the other one."""

    def refused(*_):
        raise AssertionError(f"the path {path!r} was taken")

    for name in (f"forward_{path}", f"states_{path}", f"gradients_{path}"):
        if path and launch.INTERPRETED:
            monkeypatch.setattr(kernels, name, refused)


#: K and V inside every tile that the launcher chooses, and V in two blocks.
SIZES = [(BK - 3, BV - 5) for BK, BV in launch.TILES] + [(5, max(BV for _, BV in launch.TILES) + 6)]


@pytest.mark.parametrize(("K", "V"), SIZES)
@pytest.mark.parametrize("weak", [False, True], ids=["any gate", "weak gates"])
def test_all_layers_are_bitwise_equal_on_dyadic_inputs(weak, K, V, monkeypatch):
    x = dyadic(37, K, V, seed=K, weak=weak)
    forbid(monkeypatch, "halving" if weak else "")
    expected = evaluate(naive.bidirectional_gla, x, scale=2.0)
    for chunk_size in (1, 3, 16, 37, 64):
        equal_bits(chunked, x, expected, 2.0, chunk_size=chunk_size)
    equal_bits(fused, x, expected, 2.0)


@pytest.mark.parametrize(("K", "V"), SIZES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("weak", [False, True], ids=["any gate", "weak gates"])
def test_one_direction_is_bitwise_equal_on_dyadic_inputs(weak, reverse, K, V, monkeypatch):
    """The other two launch configurations of each tile."""
    x = dyadic(19, K, V, seed=K, weak=weak)
    forbid(monkeypatch, "halving" if weak else "")

    def one_direction(layer, x):
        leaves = [t.to(FUSED_DEVICE if layer == "fused" else "cpu").requires_grad_() for t in (*x[:3], x[3 + reverse])]
        o = gla(*leaves, reverse=reverse, scale=-0.5, backend=layer)
        return [t.cpu() for t in (o, *torch.autograd.grad(o, leaves, x.do.to(o.device)))]

    expected = one_direction("naive", x)
    for layer in ("chunked", "fused"):
        assert all(map(torch.equal, one_direction(layer, x), expected)), layer


def test_dyadic_results_are_the_true_ones():
    """The layers agree on what is right: the sums over pairs in fractions, converted without rounding."""
    numbers, x = ExactNumbers(), dyadic(18, 3, 2, seed=0)
    fraction = np.vectorize(Fraction, otypes=[object])
    alpha = np.vectorize(lambda n: Log(0 if n == math.inf else Fraction(1, 2 ** int(n))), otypes=[object])
    exact = (alpha((t / HALF).tolist()) if n in (3, 4) else fraction(t.tolist()) for n, t in enumerate(x))
    expected = by_pairs(Inputs(*map(numbers.write, exact)), 2, numbers)
    got = evaluate(naive.bidirectional_gla, x, scale=2.0)
    for name in NAMES:
        assert (fraction(got[name].tolist()) == expected[name]).all(), name


@interpreted
def test_a_broken_kernel_is_seen(monkeypatch):
    """A token that no longer reads itself, in the interpreted kernel: the dyadic tier turns red."""
    monkeypatch.setattr(anchored, "_reads", lambda REVERSE: blocks.ahead(not REVERSE, False))
    x = dyadic(17, 5, 7, seed=0, weak=True)
    with pytest.raises(AssertionError, match="fused"):
        equal_bits(fused, x, evaluate(naive.bidirectional_gla, x, scale=2.0), 2.0)


# --- float64 ---------------------------------------------------------------------------------------------------------


@example(case=Case(T=130, regime="strong"))
@given(case=cases)
def test_float64_is_held_to_1e_12_of_the_gauge(case):
    """So tests/test_layers.py, which holds the kernel's own source in float64 to `bounds`, holds it to this too.

    The bound for tf32 products is at least 4 * 2^-11 gauges and at most that with the bound of float64 on top.
    """
    x = case.inputs(torch.float64)
    zero = {name: torch.zeros_like(t) for name, t in zip(NAMES, (x.v, *x[:5]), strict=True)}
    options = dict(scale=case.scale_value, chunk=fused.CHUNK)
    bound, tf32 = bounds(x, zero, **options), bounds(x, zero, **options, dot="tf32")
    for name in NAMES:
        gauge = (tf32[name] - bound[name]) * 2**9
        assert (bound[name] <= 0.5e-12 * gauge).all(), name  # the rest is for the rounding of the stored result

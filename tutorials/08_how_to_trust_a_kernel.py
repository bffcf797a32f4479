# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 8. How to trust a kernel
#
# **Time** 60 minutes to read, a minute to run · **Prerequisites** chapters [1](01_a_gate_is_a_memory.ipynb) to
# [4](04_gradients_by_hand.ipynb) · **Device** a laptop CPU with Linux (Triton is published for no other system; elsewhere,
# read along)
#
# A kernel runs, its results look plausible, the loss goes down. Is it right? This chapter answers with methods instead
# of opinions: what to compare with, how close is close enough, how to compute without rounding, which laws need no
# reference at all. Then you break the chunked layer on purpose, in a dozen ways, and watch which method notices. None
# of them sees everything; the table at the end says, by measurement, what each one is blind to.
#
# The same methods, with more cases, are the project's test-suite and the command `vig-ref verify`; [the verification
# page](../docs/verification.md) describes them without code.

# %%
import contextlib
import functools
import inspect
import os
import random
import re
import sys
import warnings
from collections import Counter
from fractions import Fraction
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels are interpreted, on any CPU
sys.path.append("../tests")  # for the exact numbers and the list of planted bugs of our test-suite

import torch
import triton
import triton.language as tl
from exercises import check
from exercises.ch08 import MEAN_TIMES_LENGTH, plant
from figures import ch08
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import vig_ref
from mutants import MUTANTS
from test_exact import ExactNumbers, dyadic, exact_inputs
from vig_ref import chunked, naive, tolerance
from vig_ref.tolerance import NAMES, REGIMES, Inputs, evaluate

# A kernel may try a fast form first, and compute again where that overflows; the interpreter would say so each time.
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
torch.set_num_threads(1)  # the tensors are small
SCALE = 0.5

# %% [markdown]
# ## 1. A bug that trains
#
# To study checks we need bugs. `plant` copies the source of the chunked layer, edits the text, and imports the copy as
# a module of its own; nothing in the repository changes.

# %%
print(inspect.getsource(plant))

# %% [markdown]
# The first one: the gates of the two directions are swapped. **Predict**: what would a training curve look like?

# %%
swapped = plant(("q, k, v, g_fwd, g_rev = (x.to(wide)", "q, k, v, g_rev, g_fwd = (x.to(wide)"))
x = tolerance.draw(1, 3, 196, 32, 64, regime="vig")  # the tensors of one ViG-T mixer
right, wrong = (m.bidirectional_gla(*x[:5], scale=SCALE) for m in (chunked, swapped))
print(f"right  mean {right.mean():.3f}, standard deviation {right.std():.2f}, largest {right.abs().max():.1f}")
print(f"wrong  mean {wrong.mean():.3f}, standard deviation {wrong.std():.2f}, largest {wrong.abs().max():.1f}")

# %% [markdown]
# It would look the same. Both gates come from one projection of the token, `forget_proj`; swapping its outputs gives
# the right operator back, so that the wrong model can learn whatever the right one can. It fails on the day somebody
# loads weights that were trained with the right one.
#
# The second: the mean of both scans became their sum, a factor of 2 everywhere. In the model, each head's result goes
# through RMSNorm.

# %%
doubled = plant(("return ((o_fwd + o_rev) / 2)", "return (o_fwd + o_rev)")).bidirectional_gla(*x[:5], scale=SCALE)
norm = functools.partial(torch.nn.functional.rms_norm, normalized_shape=(64,), eps=1e-5)
print(f"largest difference of the operators {(doubled - right).abs().max():.1f}")
print(f"largest difference after the norm   {(norm(doubled) - norm(right)).abs().max():.1e}")

# %% [markdown]
# Two rules follow, and they are most of the art: **compare the operator itself**, not what a model makes of it; and
# **compare numbers**, not curves.
#
# ## 2. Compare with what? The oracle
#
# The **oracle** is the equation of the paper (Eqs. 5 and 6), one token at a time, in float64. It must be so short that
# it can be read; here it is, whole, and you know it from chapter 1.

# %%
print(inspect.getsource(naive.gla))

# %% [markdown]
# One trap: the oracle must get *the very numbers that the layer got*. If the layer reads bfloat16, so must the oracle
# (and then compute in float64). Otherwise the rounding of the inputs is taken for an error of the layer:

# %%
low = Inputs(*(t.bfloat16() for t in x))
o = chunked.bidirectional_gla(*low[:5], scale=SCALE).double()
for what, values in (("the rounded inputs", low), ("the inputs before rounding", x)):
    oracle = naive.bidirectional_gla(*(t.double() for t in values[:5]), scale=SCALE)
    print(f"oracle on {what:27} RMS error {(o - oracle).square().mean().sqrt() / oracle.square().mean().sqrt():.1e}")

# %% [markdown]
# ## 3. How close is close enough? The bound
#
# Now two arrays of numbers, one right, one rounded. The usual test is `torch.allclose(rtol=1e-3, atol=1e-3)`, with both
# constants raised until it passes. **Predict** what it says of a layer that returns zeros, when the values are small:

# %%
small = x._replace(v=x.v * 1e-5)
expected = naive.bidirectional_gla(*small[:5], scale=SCALE)
print("zeros accepted:", torch.allclose(torch.zeros_like(expected), expected, rtol=1e-3, atol=1e-3))

exact = tolerance.reference(x, scale=SCALE)["o"]
relative = (right - exact).abs() / exact.abs()
print(f"the right layer, relative error: median {relative.median():.0e}, largest {relative.max():.0e}")

# %% [markdown]
# An absolute tolerance knows nothing of the scale of the data; and a relative one fails where the terms of a sum
# cancel: `1000.1 - 1000` in float32 has an error of 2.4e-5, which is as good as it gets, and 2.4e-4 of the result. Rounding
# errors are proportional to what was *added up*. So add up the magnitudes. The **gauge** $G$ is the same computation on
# $|q|$, $|k|$, $|v|$ (and $|do|$ for gradients), and each element has a bound of its own
# ([`vig_ref/tolerance.py`](../vig_ref/tolerance.py)):
#
# $$|X - X_{64}| \;\le\; 4\,\big(u_{dot} + u_{sum}(1 + L + N)\big)\, G \;+\; u_{out}\,|X_{64}| \;+\; \eta$$
#
# | letter | what it is | in float32 |
# |---|---|---|
# | $u_{dot}$ | rounding of the operands of matrix products | 0 (tf32: $2^{-11}$, bfloat16: $2^{-8}$) |
# | $u_{sum}$ | rounding of the accumulator | $2^{-24}$ |
# | $L$ | largest log decay inside a chunk: `exp` turns an absolute error into a relative one | from the gates |
# | $N$ | number of chunks: a state is rounded at every edge | `ceil(T / C)` |
# | $u_{out}$, $\eta$ | rounding, and smallest useful magnitude, of the stored result | $2^{-24}$, $10^{-37}$ |
#
# Each letter has its reason, which the module states. Look at all elements of one result at once:

# %%
x = tolerance.draw(1, 1, 196, 32, 16, regime="vig")
x = x._replace(v=x.v * torch.logspace(-5, 2, 16))  # columns of very different size
exact = tolerance.reference(x, scale=SCALE)
bound = tolerance.bounds(x, exact, scale=SCALE, chunk=64)["o"]
G = (tolerance.bounds(x, exact, scale=SCALE, chunk=64, dot="tf32")["o"] - bound) / (4 * 2**-11)  # they differ by u_dot
o = chunked.bidirectional_gla(*x[:5], scale=SCALE)
ch08.errors(exact["o"], G, bound, o - exact["o"], 0.99 * o - exact["o"])

# %% [markdown]
# *Figure 1. Errors of the chunked layer in float32, and of the same result 1 % too small; a point is one element of
# `o: [1, 1, 196, 16]`. Left, against the result: for a result of one size, errors of a right layer differ by many
# orders of magnitude, and the largest come near 1 %. Right, against the gauge: they form a band, and all of it lies
# under the bound.*
#
# Some red points lie under the bound too: where the terms cancel, 1 % of the result is less than its rounding error,
# and no honest bound could refuse it. The tensor is refused, by all its other elements. (The band is a hundred times
# below the line because the line is for the worst case: roundings that all point the same way.)
#
# A bound that nothing breaks is worthless. So the checker is checked: a tensor that is 1 % off must be refused, in
# every arithmetic. In half precision one element may be off by more than that, and the elementwise bound has to allow
# it; a limit on the root mean square over the whole tensor, where roundings average out, does not.

# %%
print("1 % off: error / bound and RMS / limit of the tensor that is refused least")
for dtype, dot in ((torch.float64, "ieee"), (torch.float32, "ieee"), (torch.bfloat16, "bfloat16")):
    y = tolerance.draw(1, 1, 64, 8, 8, regime="vig", dtype=dtype)
    truth = tolerance.reference(y, scale=SCALE)
    off = {name: (0.99 * t).to(dtype) for name, t in truth.items()}
    ratios = tolerance.worst_ratios(off, y, scale=SCALE, chunk=64, dot=dot)
    rms = tolerance.rms_ratios(off, truth, tolerance.RMS_LIMIT["float64" if dtype == torch.float64 else dot])
    print(f"{str(dtype).removeprefix('torch.'):9} {min(ratios.values()):9.2g} {min(rms.values()):9.2g}")

# %% [markdown]
# ### Exercise 1: the gauge
#
# Write the gauge of `o`. One call of a layer does it; the question is what becomes of each argument.


# %%
def gauge(q, k, v, g_fwd, g_rev, scale):
    """What rounding errors of `bidirectional_gla(q, k, v, g_fwd, g_rev, scale=scale)` are proportional to: G, like o."""
    ...  # your turn


check(gauge)

# %% [markdown]
# ## 4. Take the rounding away
#
# If rounding is what makes comparing hard, compute without it. The operator is algebra: products, sums, and
# exponentials of sums of gates. Of `exp` only one fact is used, $e^{a+b} = e^a e^b$; so let the gates be *any* numbers
# $\alpha$, and let a sum of logs be a product of them. Then everything can be done with fractions, and "close" becomes
# `==`. One channel, by token (Eq. 5) and by chunk:


# %%
def by_token(q, k, v, alpha):
    S, o = 0, []
    for t in range(len(q)):
        S = alpha[t] * S + k[t] * v[t]
        o.append(q[t] * S)
    return o


def by_chunk(q, k, v, alpha, C=4):
    S_in, o = 0, []
    for n in range(0, len(q), C):
        S_own, passed = 0, 1
        for t in range(n, min(n + C, len(q))):
            S_own, passed = alpha[t] * S_own + k[t] * v[t], alpha[t] * passed  # passed is exp(b_t)
            o.append(q[t] * S_own + q[t] * passed * S_in)
        S_in = passed * S_in + S_own
    return o


r = random.Random(0)
q, k, v, alpha = ([Fraction(r.randint(1, 9), r.randint(1, 9)) for _ in range(10)] for _ in range(4))
floats = [[float(n) for n in numbers] for numbers in (q, k, v, alpha)]
print("fractions equal:", by_token(q, k, v, alpha) == by_chunk(q, k, v, alpha))
print("floats equal:   ", by_token(*floats) == by_chunk(*floats))
print("the last result:", by_token(q, k, v, alpha)[-1])

# %% [markdown]
# No tolerance, and no small effect that could hide in one: two formulas that are not the same function differ. The
# digits grow with the length, though. **Modulo a prime** $p$ they cannot: numbers are integers from 0 to $p - 1$,
# division is multiplication by an inverse, every identity of algebra still holds, and a wrong one survives a random
# input with a chance of about $1/p$, here $4 \cdot 10^{-19}$.
#
# We need not rewrite our layers for that. In [`tests/test_exact.py`](../tests/test_exact.py) a mode of PyTorch replaces
# the arithmetic below `torch.add`, `torch.exp` and so on, so that the layers' own source runs over residues, and
# autograd with it.

# %%
def residues(layer, T=9, **options):
    """o and the five gradients over the integers modulo 2^61 - 1; one gate in eight is a reset."""
    numbers = ExactNumbers(p=2**61 - 1)
    y = exact_inputs(numbers, T, K=2, V=2, seed=0)
    with numbers:
        got = evaluate(layer.bidirectional_gla, y, scale=3, **options)
    return {name: numbers.read(got[name]) for name in NAMES}


of_naive = residues(naive)
for chunk_size in (1, 3, 4, 16):
    got = residues(chunked, chunk_size=chunk_size)
    equal = all((got[name] == of_naive[name]).all() for name in NAMES)
    print(f"chunks of {chunk_size:2}: all equal {equal}, for example one element of dg_fwd: {got['dg_fwd'].flat[5]}")

# %% [markdown]
# A kernel cannot be run over residues. But it can be given numbers that float32 holds exactly at every step, in
# whatever order they are added: inputs from {-1, 0, 1}, and gates 1, 1/2, 1/4 or 0. Then all three layers must agree
# *to the last bit*.

# %%
powers = dyadic(T=37, K=3, V=4, seed=0)
bits = {b: evaluate(vig_ref.bidirectional_gla, powers, scale=2.0, backend=b) for b in ("naive", "chunked", "fused")}
for backend in ("chunked", "fused"):
    print(f"{backend:8}", *(f"{name} {torch.equal(bits[backend][name], bits['naive'][name])}" for name in NAMES), sep="  ")

# %% [markdown]
# ### Exercise 2: a second opinion
#
# An independent derivation is worth more than a second implementation. Unrolled, Eq. 5 is a sum over pairs,
# $o_i = \sum_{j \le i} q_i\, k_j\, v_j \prod_{j < t \le i} \alpha_t$. Write it for one channel (`K = V = 1`), for lists
# of fractions, exactly, for closed gates as well.


# %%
def o_by_pairs(q, k, v, alpha):
    """o of one forward scan with scale 1: a list of Fractions, from lists of Fractions."""
    ...  # your turn


check(o_by_pairs)

# %% [markdown]
# ## 5. Laws, and a machine that looks for exceptions
#
# Some facts follow from the definition, whatever computes it. A law needs no oracle, and so it sees mistakes that
# oracle and layer share. Three of them:
#
# - **Time reversal**: reverse the tokens and swap the gates, and the result is reversed.
# - **Chunks do not matter**: another chunk length, the same function.
# - **A reset separates**: with $\alpha = 0$ between two sequences, each comes out as if it were alone.
#
# Two results of one layer may differ by the sum of their bounds; in float64 a mistake is a million times larger.


# %%
def results(layer, x, **options):
    return evaluate(layer.bidirectional_gla, x, scale=SCALE, **options)


def agree(one, other, bound):
    return all(((one[n] - other[n]).abs() <= 2 * bound[n]).all() for n in NAMES)


def time_reversal(layer, x, bound):
    q, k, v, g_fwd, g_rev, do = (t.flip(2) for t in x)
    mirrored = {n: t.flip(2) for n, t in results(layer, Inputs(q, k, v, g_rev, g_fwd, do)).items()}
    mirrored["dg_fwd"], mirrored["dg_rev"] = mirrored["dg_rev"], mirrored["dg_fwd"]
    return agree(results(layer, x), mirrored, bound)


# %%
def chunks_do_not_matter(layer, x, bound):
    return all(agree(results(layer, x), results(layer, x, chunk_size=C), bound) for C in (16, 24))


def a_reset_separates(layer, x, bound, cut=70):
    g_fwd, g_rev = x.g_fwd.clone(), x.g_rev.clone()
    g_fwd[:, :, cut] = g_rev[:, :, cut - 1] = -torch.inf
    x = x._replace(g_fwd=g_fwd, g_rev=g_rev)
    left, right = (results(layer, Inputs(*(t[:, :, part] for t in x))) for part in (slice(cut), slice(cut, None)))
    return agree(results(layer, x), {n: torch.cat([left[n], right[n]], 2) for n in NAMES}, bound)


# %%
@functools.cache
def case(T, regime, chunk=64, dtype=torch.float32):
    """Inputs, the oracle's results and their bounds."""
    x = tolerance.draw(1, 2, T, 3, 4, regime=regime, dtype=dtype)
    exact = tolerance.reference(x, scale=SCALE)
    return x, exact, tolerance.bounds(x, exact, scale=SCALE, chunk=chunk)


LAWS = (time_reversal, chunks_do_not_matter, a_reset_separates)
x, _, bound = case(196, "vig", 16, torch.float64)
for name, layer in {"chunked": chunked, "gates swapped": swapped}.items():
    print(f"{name:14}", *(f"{law.__name__}: {law(layer, x, bound)}" for law in LAWS), sep="  ")

# %% [markdown]
# The last line is worth a minute. The layer with swapped gates obeys time reversal: swap them once more and reverse,
# and the law still holds. Nor do chunks see it. **A law cannot see a mistake that keeps the law**, which is why there
# is more than one. The law of resets sees it, since a reset in the wrong direction leaks.
#
# Which inputs should a law be tried on? **Hypothesis** draws them: you describe *what* may be drawn (a length, a
# regime, a seed, never arrays), and it looks for an exception. When it has one, it *shrinks* it: it goes on looking for
# a smaller one, until nothing can be taken away. Plant a bug of which we know the place, and let it search:

# %%
OPTIONS = dict(max_examples=30, derandomize=True, database=None, deadline=None)
OPTIONS |= dict(phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))


def search(layer):
    """The smallest call of `layer` beyond the bound that Hypothesis finds, and all lengths that it tried."""
    tried = []

    @settings(**OPTIONS)
    @given(T=st.integers(1, 300), K=st.integers(1, 4), regime=st.sampled_from(list(REGIMES)), seed=st.integers(0, 99))
    def obeys_the_bound(T, K, regime, seed):
        x = tolerance.draw(1, 1, T, K, 2, regime=regime, seed=seed)
        got = evaluate(layer.bidirectional_gla, x, scale=SCALE)
        tried.append((T, max(tolerance.worst_ratios(got, x, scale=SCALE, chunk=64).values()) <= 1))
        assert tried[-1][1]

    try:
        obeys_the_bound()
    except AssertionError as error:
        return ", ".join(re.findall(r"(\w+=[^,]+),", error.__notes__[0])), tried
    return "nothing found", tried


# %%
forgetful = plant(("S = torch.exp(total[:, :, n]) * S + S_own[:, :, n]", "S = S_own[:, :, n]"))
found, tried = search(forgetful)
print(found)
assert "T=129" in found

# %%
ch08.shrinking(tried, 129)

# %% [markdown]
# *Figure 2. The lengths that Hypothesis tried. First it searches; from the first exception on (grey) it shrinks.*
#
# Look at the number that is left: 129 is two chunks of 64, and one token. Not 128, and not 65. That sentence almost
# names the bug: *what goes wrong needs a third chunk*. The planted edit makes every chunk hand on its own state only,
# so that the third is the first to miss something. A failing test with T = 283 and seed 7919 would have said nothing. (Longer
# calls that pass have gates that forget so fast that there is nothing to miss; so Hypothesis says which gates, too.)

# %%
found, tried = search(chunked)
print(f"the layer as it is: {found}, {len(tried)} calls, T from {min(tried)[0]} to {max(tried)[0]}")

# %% [markdown]
# ### Exercise 3: a law against swapped gates
#
# Write a law, without an oracle, that the right operator obeys and that swapped gates break. A hint: close all gates of
# one scan (`-inf`). What may a token then know, and of whom not?


# %%
def directions_are_right(operator, q, k, v, g_fwd, g_rev):
    """True if `operator(q, k, v, g_fwd, g_rev, scale=...)` obeys your law on these inputs `[B, H, T, ...]`."""
    ...  # your turn


check(directions_are_right)

# %% [markdown]
# ## 6. Corners: cases that somebody met before you
#
# Hypothesis draws from what you describe; it does not know where numbers break. For this operator they break where
# gates close. The textbook computes a decay inside a chunk as a difference of two cumulative sums, $b_C - b_j$. It is
# shorter than our code, it is equal by algebra, and it passes every test on the gates that an untrained ViG has:

# %%
DIFFERENCE = (
    "    return decay_to(after, not reverse)",
    "    b = decay_to(g, reverse)\n    return (b[..., :1, :] if reverse else b[..., -1:, :]) - b",
)
textbook = plant(DIFFERENCE)


# %%
def over_bound(layer, T, regime, chunk_size=64):
    """The largest error / bound among o and its gradients: right is up to 1."""
    x, exact, bound = case(T, regime, chunk_size)
    got = evaluate(layer.bidirectional_gla, x, scale=SCALE, chunk_size=chunk_size)
    return max(tolerance.nearest(got[name], exact[name], bound[name])[0] for name in NAMES)


ratios = {
    name: {regime: over_bound(layer, 130, regime) for regime in REGIMES}
    for name, layer in {"halving (vig_ref)": chunked, "difference of sums": textbook}.items()
}
ch08.corners(ratios)

# %% [markdown]
# *Figure 3. Largest error / bound for six regimes of gates. `inf` is NaN in the result: $-\infty - (-\infty)$.*
#
# Such cases are not found by thinking, but by collecting: lengths beside the chunk (15, 16, 17, 63, 64, 65), one token,
# no token; dimensions that are odd, below 16, or no power of two; gates from 0 to $-\infty$, resets at the first and
# the last token and at a chunk's edge; strides of 0; half precision inside autocast. Ours are numbered in
# [`tests/test_adversarial.py`](../tests/test_adversarial.py), and each of them broke some published kernel, or is where
# one would break.
#
# ### Exercise 4: find the corner
#
# Here is a bug that no test with the default chunk of 64 sees, at any length. The log decay over a whole chunk is
# computed as a length times a mean:

# %%
print(*MEAN_TIMES_LENGTH, sep="\n")
mean_times_length = plant(MEAN_TIMES_LENGTH)
print({T: f"{over_bound(mean_times_length, T, 'vig'):.2f} of the bound" for T in (64, 100, 130, 196)})


# %%
def a_call_that_shows_it():
    """dict(T=..., chunk_size=...) for which the layer with this bug is wrong."""
    ...  # your turn


check(a_call_that_shows_it)

# %% [markdown]
# ## 7. Memory: red zones
#
# A kernel loads tiles of a fixed size, and masks what lies behind the end. Forget the mask, and on most days nothing
# happens: the memory there belongs to a neighbour, is often 0, or is multiplied by 0 later. Here is such a kernel. It
# sums T numbers, loads C of them, and relies on a multiplication:

# %%
@triton.jit
def sum_kernel(p_x, p_o, T, C: tl.constexpr):
    i = tl.arange(0, C)
    x = tl.load(p_x + i)  # no mask
    tl.store(p_o, tl.sum(x * (i < T)))  # "what lies behind the end is multiplied by 0"


def sum_of(values, around, margin=4):
    memory = torch.full((len(values) + 2 * margin,), around)
    x = memory[margin : margin + len(values)].copy_(values)
    o = torch.empty(1)
    sum_kernel[(1,)](x, o, len(values), C=16)
    return o.item()


# %%
values = torch.arange(13.0)
print("memory around x is 0:  ", sum_of(values, 0.0), "and 0 + 1 + ... + 12 =", values.sum().item())
print("memory around x is NaN:", sum_of(values, torch.nan))

# %%
ch08.red_zone(4, 13, 16)

# %% [markdown]
# *Figure 4. A red zone: the tensor `x: [13]` lies inside memory that is NaN. 0 times NaN is NaN, and no tolerance lets
# it pass.*
#
# The same trick finds results that are read before they are written: fresh memory is made NaN too. And it costs nothing
# to do it to the fused layer, whose states pass through scratch memory:


# %%
def in_red_zone(t):
    """The values of t in the middle of memory that is NaN on every side."""
    inside = (slice(1, -1),) * 4
    return t.new_full([size + 2 for size in t.shape], torch.nan)[inside].copy_(t)


x, exact, bound = case(17, "vig", 16)
got = evaluate(vig_ref.bidirectional_gla, Inputs(*map(in_red_zone, x)), scale=SCALE, backend="fused")
for name in NAMES:
    print(f"fused, inside NaN: {name:6} {tolerance.nearest(got[name], exact[name], bound[name])[0]:.2f} of the bound")

# %% [markdown]
# ## 8. Would the checks know? Plant bugs
#
# A test-suite that has never failed proves little. So break the code on purpose, one small edit at a time, and see who
# notices: **mutation testing**. Below are fifteen edits of the chunked layer. The last one changes nothing, on purpose.

# %%
BUGS = {
    "gates swapped": ("q, k, v, g_fwd, g_rev = (x.to(wide)", "q, k, v, g_rev, g_fwd = (x.to(wide)"),
    "both scans forward": ("g_rev, reverse=True", "g_rev, reverse=False"),
    "mean becomes sum": ("return ((o_fwd + o_rev) / 2)", "return (o_fwd + o_rev)"),
    "one percent lost": ("return ((o_fwd + o_rev) / 2)", "return ((o_fwd + o_rev) / 2.02)"),
    "token counted twice": ("o = (q * k).sum(-1, keepdim=True) * v", "o = 2 * (q * k).sum(-1, keepdim=True) * v"),
    "halving stops early": ("while half < C:", "while 2 * half < C:"),
    "own gate counted twice": ("    return decay_to(after, not reverse)", "    return decay_to(g, not reverse)"),
    "key without decay": ("S_own = (k * to_edge).mT @ v", "S_own = k.mT @ v"),
    "state loses the past": ("S = torch.exp(total[:, :, n]) * S + S_own[:, :, n]", "S = S_own[:, :, n]"),
    "mean times length": MEAN_TIMES_LENGTH,
    "difference of sums": DIFFERENCE,
    "last chunk dropped": ("N = max(1, -(-x.shape[2] // C))", "N = max(1, x.shape[2] // C)"),
    "memory not cleared": ("S = torch.zeros_like(S_own[:, :, 0])", "S = torch.empty_like(S_own[:, :, 0])"),
    "gradient cut off": ("S = torch.exp(total[:, :, n]) * S +", "S = torch.exp(total[:, :, n]).detach() * S +"),
    "harmless transposition": ("S_own = (k * to_edge).mT @ v", "S_own = (v.mT @ (k * to_edge)).mT"),
}

# %% [markdown]
# And the checks: each takes a layer and returns True if all is well. The first three are what one finds in many
# repositories; the others are this chapter's.


# %%
def it_runs(layer):
    x, *_ = case(130, "vig")
    o = layer.bidirectional_gla(*x[:5], scale=SCALE)
    return o.shape == x.v.shape and o.isfinite().all()


def allclose(layer):
    x, exact, _ = case(64, "vig")
    return torch.allclose(layer.bidirectional_gla(*x[:5], scale=SCALE), exact["o"].float(), rtol=1e-2, atol=1e-2)


def gradcheck(layer):
    leaves = [t.requires_grad_() for t in tolerance.draw(1, 1, 9, 2, 2, regime="moderate", dtype=torch.float64)[:5]]
    f = functools.partial(layer.bidirectional_gla, scale=SCALE, chunk_size=3)
    return torch.autograd.gradcheck(f, leaves, fast_mode=True)


# %%
def bound_once(layer):
    return over_bound(layer, 64, "vig") <= 1


def bound_everywhere(layer):
    cases = [(130, regime, 64) for regime in REGIMES] + [(130, "vig", 24), (17, "vig", 16)]
    return all(over_bound(layer, *c) <= 1 for c in cases)


def law(function):
    x, _, bound = case(196, "vig", 16, torch.float64)
    return lambda layer: function(layer, x, bound)


# %%
def exact_residues(layer):
    found = [residues(layer, chunk_size=C) for C in (3, 4)]
    return all((got[n] == of_naive[n]).all() for got in found for n in NAMES)


def exact_bits(layer):
    found = [evaluate(layer.bidirectional_gla, powers, scale=2.0, chunk_size=C) for C in (3, 16)]
    return all(torch.equal(got[n], bits["naive"][n]) for got in found for n in NAMES)


# %%
@contextlib.contextmanager
def fresh_memory(like):
    """`torch.empty_like` gives what `like` gives, instead of whatever was in the memory before."""
    with mock.patch.object(torch, "empty_like", like):
        yield


def red_zones(layer):
    x, *_ = case(130, "vig")
    with fresh_memory(functools.partial(torch.full_like, fill_value=torch.nan)):
        got = evaluate(layer.bidirectional_gla, Inputs(*map(in_red_zone, x)), scale=SCALE)
    return not any(t.isnan().any() for t in got.values())


# %%
CHECKS = {
    "it runs": it_runs, "allclose 1e-2": allclose, "gradcheck": gradcheck, "bound, T = 64": bound_once,
    "bound, all cases": bound_everywhere, "law: time reversal": law(time_reversal),
    "law: chunks": law(chunks_do_not_matter), "law: reset": law(a_reset_separates), "modulo a prime": exact_residues,
    "dyadic, bitwise": exact_bits, "red zones": red_zones,
}  # fmt: skip

# %% [markdown]
# Fresh memory is 0 on most days, and something else on the day of the demonstration. So that this page is the same
# every time, it is 0 below for all checks but the red zones. An exception counts as noticed.
#
# **Predict before you run it.** Which check will see the most? Which bug will be seen by one check alone? What does
# gradcheck see?


# %%
def notices(check_, layer):
    try:
        with fresh_memory(torch.zeros_like):
            return not check_(layer)
    except Exception:
        return True


def who_notices(layer):
    return {name: notices(check_, layer) for name, check_ in CHECKS.items()}


# %%
assert not any(who_notices(chunked).values())  # the layer as it is passes everything
seen = {bug: who_notices(plant(edit)) for bug, edit in BUGS.items()}
ch08.matrix(seen)

# %% [markdown]
# *Figure 5. Planted bugs by checks, computed above. Blue: the check noticed.*

# %%
for bug, found in seen.items():
    by = [name for name, noticed in found.items() if noticed]
    print(f"{bug:23}", "nobody" if not by else f"{len(by)} of {len(CHECKS)}" if len(by) > 2 else " and ".join(by))

# %% [markdown]
# Read it by columns, then by rows.
#
# | check | sees | is blind to |
# |---|---|---|
# | it runs | a shape that does not fit | all the rest |
# | allclose 1e-2 | loud mistakes inside a chunk | one percent, a second chunk, gradients |
# | gradcheck | a backward pass that is not that of its forward pass | a wrong function with its right gradient |
# | bound, T = 64 | any wrong number, down to rounding | all that needs a second chunk |
# | bound, all cases | the same, at chunk edges and with closed gates | what its cases do not contain; memory |
# | time reversal | what happens at one end of a chunk only | swapped gates, factors, the diagonal |
# | chunks do not matter | mistakes at the edges of chunks | mistakes that no edge changes |
# | a reset separates | leaks, lost decay, a wrong direction | factors, the diagonal |
# | modulo a prime | every mistake of algebra, however small | memory, overflow, rounding, the kernel |
# | dyadic, bitwise | the same, in the kernel too | what fades below the last bit, or is reset too soon |
# | red zones | memory that is foreign or was never written | arithmetic |
#
# Three rows deserve a second look. *Swapped gates* obey two laws of three. *Memory not cleared* is seen by one check
# alone. And the *difference of sums* is equal by algebra; it is refused modulo a prime because those numbers cannot
# subtract logarithms: there is no logarithm of 0 that could be taken away, which is just what goes wrong in floating
# point.
#
# ### Your turn: plant one
#
# Change one thing in [`vig_ref/chunked/chunks.py`](../vig_ref/chunked/chunks.py), here and not there: a sign, an index,
# an exponent. Write the text that is there and what it becomes, predict who will notice, and run the cell. If nobody
# does, you have found either an edit that changes nothing (then say why), or a hole in these checks.

# %%
old, new = "half *= 2", "half *= 4"  # yours instead

prediction = {"bound, all cases"}
found = {name for name, noticed in who_notices(plant((old, new))).items() if noticed}
print("predicted and noticed:", *sorted(prediction & found), sep="\n    ")
print("a surprise:", *sorted(prediction ^ found), sep="\n    ")

# %% [markdown]
# The project does this to its kernels, their launcher, the chunked layer and the model's choice of kernels, with the
# whole test-suite in the place of our eleven checks:

# %%
print(f"{len(MUTANTS)} planted bugs:", dict(Counter(mutant.layer for mutant in MUTANTS)))

# %% [markdown]
# `python tests/mutants.py` runs them, which takes long; [the verification page](../docs/verification.md) has the
# record.
#
# ## 9. What no method here can see
#
# - **A wrong equation.** All methods compare the code with Eqs. 5 and 6 as *we* read them. Whether these are what the
#   authors compute is a question to their code, and [has its own page](../docs/paper_vs_code.md).
# - **A compiler, a GPU, a race between threads.** The interpreter runs a kernel's source, one program after the other,
#   on a CPU. Compiled for a GPU it is another program; the same checks are run there too
#   (`vig-ref verify --device cuda`), and one call 200 times, since a race shows itself only now and then.
# - **bfloat16 products.** The interpreter gets them wrong, so that they are tested on a GPU alone.
# - **What nobody drew.** A search finds what it can describe.
#
# ## Common mistakes
#
# | mistake | why it is one | instead |
# |---|---|---|
# | the reference is another kernel | both may share the mistake | the equation, in float64 |
# | the reference gets unrounded inputs | rounding of inputs passes for an error | the very values that the layer read |
# | comparing behind a norm | a factor is gone | compare the operator |
# | raising `atol` until the test is green | zeros pass | a bound that follows from the arithmetic |
# | a bound without a test that it refuses 1 % | it may refuse nothing | check the checker |
# | `max(errors)` when one is NaN | Python's `max` passes over a NaN that is not first | NaN counts as infinite |
# | lengths below the chunk, or its multiples | no state, no padding | 1, 15, 16, 17, 63, 64, 65, 130 |
# | running a failed numeric test again | it has found something | shrink it |
# | gradcheck taken as proof | it compares forward and backward, both may be wrong | gradcheck and an oracle |
#
# The line about `max` is why [`vig_ref/tolerance.py`](../vig_ref/tolerance.py) turns NaN into infinity before it
# compares.
#
# ## Summary
#
# - Compare the operator with its equation in float64, on the same values, result and gradients, element by element.
# - Errors are proportional to the gauge, the same computation on magnitudes. A bound made of it is tight where nothing
#   cancels, and fair where much does; a limit on the RMS sees what it must let pass in half precision.
# - Exact arithmetic (fractions, residues, dyadic inputs) needs no tolerance.
# - Laws need no oracle, and cannot see what keeps the law. Let a machine draw the inputs, and shrink what it finds.
# - Poison memory; collect corners; plant bugs, and count who notices. No column of Figure 5 is full.
#
# This was the last chapter. From here: `vig-ref verify` checks the layers on your own machine; [the verification
# page](../docs/verification.md) says what was found on ours; and [CONTRIBUTING](../CONTRIBUTING.md) says what a change
# needs before it counts as verified. Change something.

# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Gradients by hand
#
# **Time** 45 minutes to read, half a minute to run · **Prerequisites** chapters [1](01_a_gate_is_a_memory.ipynb) and
# [2](02_from_a_loop_to_matmuls.ipynb), the chain rule · **Device** a laptop CPU with Linux
# (Triton is published for no other system; elsewhere, read along)
#
# PyTorch's autograd differentiates the naive and the chunked layer for us. A kernel has no autograd: whoever writes one
# writes its backward pass by hand, and decides what to remember for it. This chapter answers three questions.
#
# 1. What is the gradient of a scan?
# 2. Which intermediate results are kept for it, and which are computed again?
# 3. The gradient of the gates has a famous short formula. Why does it fail, and what is used instead?
#
# Symbols are those of [the notation page](../docs/notation.md); equation numbers are those of the
# [paper](https://arxiv.org/abs/2405.18425).

# %%
import functools
import os
import warnings

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels are interpreted, on any CPU, in float64 too

import torch
from exercises import check
from figures import ch04

import vig_ref
from vig_ref import tolerance

# A kernel may try a fast form first, and compute again where that overflows; the interpreter would say so each time.
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
torch.set_num_threads(1)  # the tensors are small

# %% [markdown]
# ## 1. The adjoint of a scan is a scan the other way
#
# One head, one direction. Eq. 5 with a scale $s$, and $\alpha_t = e^{g_t}$ repeated over the columns of the state:
#
# $$S_t = \alpha_t \odot S_{t-1} + k_t^\top v_t \qquad\qquad o_t = s\, q_t S_t \tag{5}$$
#
# A loss $\mathcal L$ depends on `o`, and somebody hands us `do`: the gradient of the loss by every element of `o`. We
# want `dq`, `dk`, `dv` and `dg`. First a small example in float64, and the scan as it stands above. It keeps its states
# in a list, and asks autograd to keep their gradients, so that there is something to compare with.

# %%
T, K, V, scale = 12, 4, 3, 0.5
x = tolerance.draw(1, 1, T, K, V, regime="moderate", dtype=torch.float64)
q, k, v, g, do = (x[n][0, 0] for n in (0, 1, 2, 3, 5))  # [T, K] or [T, V]


def scan(q, k, v, g):
    states, S = [], torch.zeros(K, V, dtype=q.dtype)
    for t in range(len(q)):
        S = torch.exp(g[t])[:, None] * S + k[t][:, None] * v[t]  # S_t = G_t * S_t-1 + k_t^T v_t
        states.append(S)
    return torch.stack([scale * q[t] @ S for t, S in enumerate(states)]), states


# %%
leaves = [t.clone().requires_grad_() for t in (q, k, v, g)]
o, states = scan(*leaves)
for S in states:
    S.retain_grad()
o.backward(do)
autograd = dict(zip(("dq", "dk", "dv", "dg"), (t.grad for t in leaves), strict=True))
autograd["dS"] = torch.stack([S.grad for S in states])


def compare(name, mine):
    error = (mine - autograd[name]).abs().max().item()
    print(f"{name}: {list(mine.shape)}, largest difference from autograd {error:.0e}")
    assert error < 1e-12


# %% [markdown]
# Write $dS_t$ for the gradient of the loss by $S_t$, along *all* paths. There are two: $S_t$ is read by the query of
# its own token, and it is faded and handed on to $S_{t+1}$. The chain rule adds them up:
#
# $$dS_t = \alpha_{t+1} \odot dS_{t+1} + s\, q_t^\top do_t \qquad\qquad dS_T = 0$$
#
# Compare this line with Eq. 5. It is the same recurrence, with `q` in the place of `k` and `do` in the place of `v`,
# and it runs from the last token to the first. One thing is different, and it is the first thing that people get wrong:
# the state of token $t$ fades by $\alpha_t$ on its way *into* $t$, the gradient by $\alpha_{t+1}$ on its way *back*
# into $t$.

# %%
ch04.two_scans()

# %% [markdown]
# *Figure 1. Above, the scan; below, its adjoint. Every horizontal arrow turns round, and keeps its gate.*

# %%
dS, arriving = [None] * T, torch.zeros(K, V, dtype=q.dtype)
for t in reversed(range(T)):
    dS[t] = arriving + scale * q[t][:, None] * do[t]  # dS_t = what arrives from t + 1, and what the query adds
    arriving = torch.exp(g[t])[:, None] * dS[t]  # faded by the gate between t - 1 and t
dS = torch.stack(dS)  # [T, K, V]
compare("dS", dS)

# %% [markdown]
# With all $S_t$ and $dS_t$ at hand, each of the four gradients is one line, since each input enters one equation, at
# one token:
#
# | from | differentiate by | gradient |
# |---|---|---|
# | $o_t = s\,q_t S_t$ | $q_t$ | $dq_t = s\, do_t S_t^\top$ |
# | $S_t = \dots + k_t^\top v_t$ | $k_t$ | $dk_t = v_t\, dS_t^\top$ |
# | $S_t = \dots + k_t^\top v_t$ | $v_t$ | $dv_t = k_t\, dS_t$ |
# | $S_t = e^{g_t} \odot S_{t-1} + \dots$ | $g_t$ | $dg_t = e^{g_t} \odot \sum_{\text{columns}} S_{t-1} \odot dS_t$ |
#
# The sum in the last row is over the columns of the state, because one gate fades a whole row of it.

# %%
S = torch.stack(states).detach()  # [T, K, V]
S_before = torch.cat([torch.zeros_like(S[:1]), S[:-1]])  # S_t-1

compare("dq", scale * torch.einsum("tkv,tv->tk", S, do))
compare("dk", torch.einsum("tkv,tv->tk", dS, v))
compare("dv", torch.einsum("tkv,tk->tv", dS, k))
compare("dg", torch.exp(g) * (S_before * dS).sum(-1))

# %% [markdown]
# That is the whole backward pass of Eq. 5. Two facts can be read off the last line, without any calculation:
#
# - **The first gate has gradient exactly 0.** It fades the empty state: $S_{-1} = 0$. Not "about 1e-17": nothing is
#   subtracted, so that it is zero to the last bit.
# - **A reset has gradient 0 too**, since $e^{-\infty} = 0$. Training cannot reopen a gate that is fully closed.
#
# ### Exercise 1: a backward pass made of the forward pass
#
# If the adjoint is a scan, the forward code can run it. `vig_ref.gla(..., reverse=True)` scans from the last token to
# the first: $S_t = e^{g_t} \odot S_{t+1} + k_t^\top v_t$ and $o_t = s\, q_t S_t$. Which tensors must it be given, for
# its *result* to be `dv`? Mind which gate lies on which arrow in Figure 1.


# %%
def dv_by_gla(q, k, v, g, do, scale):
    """dv of `vig_ref.gla(q, k, v, g, scale=scale)`, by one call of `vig_ref.gla(..., reverse=True)`; `[1, H, T, V]`."""
    ...  # your turn


check(dv_by_gla)

# %% [markdown]
# ### Exercise 2: a state that was there before
#
# In a model that reads a long image in pieces, the scan would not start empty but from a state $S_{-1}$, and the piece
# before it would want to know the gradient $dS_{-1}$. Write it down without a loop: unrolled, token $t$ reads the
# initial state with the product of all gates met so far.


# %%
def d_initial_state(q, g, do, scale):
    """The gradient by the state `[K, V]` that a scan starts from. q, g: `[T, K]`, do: `[T, V]`."""
    ...  # your turn


check(d_initial_state)

# %% [markdown]
# ## 2. Both directions
#
# Eq. 6 is the mean of two scans, so that its gradients are sums: each scan takes `scale / 2`, `dq`, `dk` and `dv` add
# up, and each direction has its own `dg`. The reverse scan needs no new derivation. Turn all tensors round, use what we
# have, and turn the result back.


# %%
def states_of(q, k, v, g, do, scale):
    """S_t and dS_t of every token, `[T, K, V]` each: the two scans of Figure 1."""
    T, fade = len(q), torch.exp(g)[:, :, None]
    S, dS = torch.zeros(2, T, q.shape[1], v.shape[1], dtype=q.dtype)
    for t in range(T):
        S[t] = (fade[t] * S[t - 1] if t else 0) + k[t][:, None] * v[t]
    for t in reversed(range(T)):
        dS[t] = (fade[t + 1] * dS[t + 1] if t + 1 < T else 0) + scale * q[t][:, None] * do[t]
    return S, dS


def gradients(q, k, v, g, do, scale):
    """dq, dk, dv, dg of one scan: one line each, as above."""
    S, dS = states_of(q, k, v, g, do, scale)
    S_before = torch.cat([torch.zeros_like(S[:1]), S[:-1]])
    dq, dk, dv = scale * S @ do[:, :, None], dS @ v[:, :, None], k[:, None] @ dS
    return dq[..., 0], dk[..., 0], dv[:, 0], torch.exp(g) * (S_before * dS).sum(-1)


# %%
def both_directions(one_scan, q, k, v, g_fwd, g_rev, do, scale):
    """The gradients of Eq. 6 from those of one scan, by name."""
    fwd = one_scan(q, k, v, g_fwd, do, scale / 2)
    rev = [t.flip(0) for t in one_scan(*(t.flip(0) for t in (q, k, v, g_rev, do)), scale / 2)]
    dq, dk, dv = (a + b for a, b in zip(fwd[:3], rev[:3], strict=True))
    return {"dq": dq, "dk": dk, "dv": dv, "dg_fwd": fwd[3], "dg_rev": rev[3]}


mine = both_directions(gradients, *(t[0, 0] for t in x), scale)
for backend in ("naive", "chunked", "fused"):
    theirs = tolerance.evaluate(vig_ref.bidirectional_gla, x, scale=scale, backend=backend)
    worst = max((mine[name] - theirs[name][0, 0]).abs().max().item() for name in mine)
    print(f"{backend:8} all five gradients, largest difference {worst:.0e}")
    assert worst < 1e-12

# %% [markdown]
# Three layers, three backward passes: autograd through a loop, autograd through matrix products, and a kernel's, which
# somebody wrote by hand and which Triton's interpreter runs here in float64. All three agree with ours to the last
# digits.

# %% [markdown]
# ## 3. Checkpoint or recompute
#
# Our backward pass wants $S_t$ at every token. How much memory is that? **Predict first**, for one mixer of ViG-T at
# 224 x 224 pixels, one image, float32: `T = 196` tokens, `H = 3` heads, states of `K V = 32 * 64` numbers, two
# directions.
#
# | what is kept for the backward pass | numbers | how it is used |
# |---|---|---|
# | every state | `2 H T K V` | ready to read |
# | the states at the edges of chunks of C tokens | `2 H ceil(T/C) K V` | the others are computed again |
# | the inputs alone | `H T (4 K + V)` | everything is computed again |

# %%
H, T_, K_, V_ = 3, 196, 32, 64
predicted = {
    "every state": 4 * 2 * H * T_ * K_ * V_,
    "edges of chunks of 16": 4 * 2 * H * -(-T_ // 16) * K_ * V_,
    "inputs alone": 4 * H * T_ * (4 * K_ + V_),
}
for name, size in predicted.items():
    print(f"{name:22} {size:>10,} bytes, {size / predicted['inputs alone']:5.1f} times the inputs")

# %% [markdown]
# Now measure. Autograd calls a hook for every tensor that it keeps; we add up the memory behind them, each piece once.


# %%
def kept(backend):
    """Bytes that autograd keeps from the forward pass of one mixer's operator until its backward pass."""
    leaves = [t.requires_grad_() for t in tolerance.draw(1, H, T_, K_, V_)[:5]]
    memory = {}

    def pack(t):
        memory[t.untyped_storage().data_ptr()] = t.untyped_storage()  # kept alive: no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        vig_ref.bidirectional_gla(*leaves, backend=backend)
    return sum(storage.nbytes() for storage in memory.values())


# %%
measured = {backend: kept(backend) for backend in ("naive", "chunked", "fused")}
for backend, size in measured.items():
    print(f"{backend:8} {size:>10,} bytes, {size / predicted['inputs alone']:5.1f} times the inputs")
assert measured["naive"] >= predicted["every state"]
assert measured["fused"] <= predicted["inputs alone"] + predicted["edges of chunks of 16"]

# %%
tokens = torch.logspace(1.69, 3.62, 60).round()
curves = {
    "every state": 4 * 2 * H * tokens * K_ * V_,
    "states at the edges, C = 16": 4 * 2 * H * (tokens / 16).ceil() * K_ * V_,
    "states at the edges, C = 64": 4 * 2 * H * (tokens / 64).ceil() * K_ * V_,
    "inputs alone": 4 * H * tokens * (4 * K_ + V_),
}
ch04.bytes_kept(tokens, curves, {name: (T_, size) for name, size in measured.items()})

# %% [markdown]
# *Figure 2. Bytes of one layer and image that wait for the backward pass. A ViG-T has twelve such layers, and a batch
# has many images: for 128 of them the top line means 12 * 128 * 9.6 MB, 15 GB for states alone.*
#
# The naive layer keeps what was predicted, and its inputs. The chunked layer keeps few states but a number of products
# of the size of its inputs, one set a level of halving. The fused layer keeps next to nothing: its backward pass
# computes the states again, *one a chunk*, writes those to memory that is free again when the pass ends, and walks
# through the chunks with them. (Where few long sequences are cut into segments, it keeps the states that enter
# those.) That is the compromise called **checkpointing**: more arithmetic, which is cheap, for less memory traffic,
# which is not.
#
# Could we not run the scan *backwards* and keep nothing, $S_{t-1} = (S_t - k_t^\top v_t) / \alpha_t$? That inverts Eq.
# 5. Try it in float32, from the right last state:

# %%
back = S[-1].float()
for t in reversed(range(1, T)):
    back = (back - (k[t][:, None] * v[t]).float()) / torch.exp(g[t].float())[:, None]
    if t % 3 == 0:
        error = (back - S[t - 1]).abs().max()
        print(f"S[{t - 1}]: largest error {error:.1e}, largest entry {S[t - 1].abs().max():.1f}")

# %% [markdown]
# Forgetting cannot be undone: a gate that shrinks the past by a factor shrinks its digits with it, and division blows
# up the rounding error by that factor at every step. A reset would divide by 0. States are computed from the side where
# they are known.
#
# ### Exercise 3: count states
#
# A backward pass keeps the states at the near edges of the chunks (one a chunk, the first is empty but has a place),
# and for the one chunk that it is working on, the states after each of its tokens. How many states are there at most at
# a time? (Then try in your head: which C is best for T = 196?)


# %%
def peak_states(T, C):
    """States in memory at most: one for each chunk of C tokens, and one for each token of the longest chunk."""
    ...  # your turn


check(peak_states)

# %% [markdown]
# ## 4. The famous short formula for dg
#
# $dg_t = e^{g_t} \odot \sum S_{t-1} \odot dS_t$ needs a state and its gradient at every token. A kernel that works with
# matrix products over chunks has neither. It has `dq` and `dk`, though, and there is a formula with nothing else.
#
# Unroll Eq. 5: token $i$ reads token $j \le i$, and channel $c$ contributes to the loss
#
# $$P_{ij} = s\, q_{ic}\, k_{jc}\; e^{g_{j+1,c} + \dots + g_{i,c}}\; (do_i \cdot v_j).$$
#
# Three sums over these pairs are of interest. Each follows from one derivative of $P_{ij}$:
#
# $$q_i\, dq_i = \sum_{j \le i} P_{ij} \quad k_j\, dk_j = \sum_{i \ge j} P_{ij} \quad dg_t = \sum_{i \ge t > j} P_{ij}$$
#
# The last one says that a gate matters to those pairs that it stands between. Now draw the pairs as a triangle.


# %%
def pair_terms(q, k, v, g, do, c=0):
    """P `[T, T]` of one channel: what the pair (i reads j) contributes to the loss, 0 above the diagonal."""
    b = g[:, c].cumsum(0)
    decay = torch.exp((b[:, None] - b).tril()).tril()  # fine here, in float64 and for moderate gates
    return scale * q[:, None, c] * k[None, :, c] * decay * (do @ v.T)


t, P = 7, {}
for name, regime in (("weak decay", "vig"), ("strong decay", "strong")):
    y = [s[0, 0] for s in tolerance.draw(1, 1, T, K, V, regime=regime, dtype=torch.float64)]
    P[name] = pair_terms(*y[:4], y[5])
ch04.pairs(P, t)

# %% [markdown]
# *Figure 3. The pairs of one channel, `[T, T]`, by size. The red rectangle is $dg_t$. Blue minus orange leaves it: what
# they share, the lower right triangle, is subtracted from itself. With strong decay the rectangle holds numbers of 1e-9
# and less, while the triangle holds the diagonal, of size 1.*
#
# The rows from $t$ on (blue), minus the columns from $t$ on (orange), are the red rectangle. So
#
# $$dg_t = \sum_{i \ge t} (q_i\, dq_i - k_i\, dk_i),$$
#
# a reverse cumulative sum of two things that every backward pass has at hand. It needs no state and no gate, it is
# exact algebra, and published kernels use it. In float64 and with moderate gates it works:


# %%
def shortcut(q, dq, k, dk):
    """dg by the short formula, `[..., T, K]`: a cumulative sum from the last token."""
    return (q * dq - k * dk).flip(-2).cumsum(-2).flip(-2)


compare("dg", shortcut(q, autograd["dq"], k, autograd["dk"]))
print("dg of the first gate:", shortcut(q, autograd["dq"], k, autograd["dk"])[0].tolist())

# %% [markdown]
# The second line is a first warning. The gradient of the first gate should be 0 *exactly*; here it is what is left when
# two sums over the whole sequence cancel.
#
# **Predict before you measure.** The shared triangle is rounded with relative error $u$ and should vanish; what remains
# is an error of about $u \cdot \sum |q\,dq|$, whatever the size of $dg$. Under weak decay $dg$ is as large as that sum,
# and all is well. Gates of -20 a token and less make $dg$ smaller than $e^{-20} \approx 2 \cdot 10^{-9}$, and the error
# of float32, $u = 6 \cdot 10^{-8}$, is larger than the result. When `dq` and `dk` were stored in bfloat16,
# $u = 4 \cdot 10^{-3}$.

# %%
REGIMES = {"weak: about -0.04": "vig", "moderate: about -0.8": "moderate", "strong: -20 to -100": "strong"}
inputs = {name: tolerance.draw(B=1, H=1, T=128, K=16, V=16, regime=regime) for name, regime in REGIMES.items()}


def one_scan(backend):
    """The forward scan of a layer, with the arguments that `tolerance.evaluate` passes: g_rev takes no part."""
    return lambda q, k, v, g_fwd, g_rev: vig_ref.gla(q, k, v, g_fwd, scale=0.25, backend=backend) + 0 * g_rev.sum()


def rms(t):
    return t.double().square().mean().sqrt().item()


# %%
def against_truth(method):
    """rms(error of dg) / rms(dg) in each regime, the truth being the naive layer in float64."""
    return {name: rms(method(y) - exact[name]) / rms(exact[name]) for name, y in inputs.items()}


double = {name: tolerance.Inputs(*(t.double() for t in y)) for name, y in inputs.items()}
exact = {name: tolerance.evaluate(one_scan("naive"), y)["dg_fwd"] for name, y in double.items()}


# %%
def shortcut_from(dtype):
    """The short formula, from float32 gradients that were stored in `dtype`."""

    def method(y):
        found = tolerance.evaluate(one_scan("naive"), y)
        return shortcut(y.q, found["dq"].to(dtype).float(), y.k, found["dk"].to(dtype).float())

    return method


# %%
errors = {
    "short formula, dq and dk in bfloat16": against_truth(shortcut_from(torch.bfloat16)),
    "short formula, dq and dk in float32": against_truth(shortcut_from(torch.float32)),
}
for method, found in errors.items():
    print(f"{method:37}", *(f"{name.split(':')[0]} {e:.1e}" for name, e in found.items()), sep="  ")

# %% [markdown]
# The prediction holds. Under the gates that an untrained ViG has, the short formula is fine in float32 and good to a
# percent in bfloat16; it grows worse as the gates learn to forget; and under strong decay it returns noise, thousands
# of times larger than the gradient in float32. No error message says so.

# %% [markdown]
# ## 5. How it is kept accurate
#
# A positive exponent, $-b_j$, caused trouble in [chapter 2](02_from_a_loop_to_matmuls.ipynb), and halving repaired it.
# The same idea repairs the gradient, and it is worth seeing why. In the chunked form every decay is the exponential of
# a sum of gates between a token and a *boundary*. Collect these sums, one row a token, in a matrix of zeros and ones:
#
# $$E = e^{M g} \qquad M_{it} = 1 \text{ if gate } t \text{ lies between token } i \text{ and the boundary}$$
#
# with `M: [C, C]` and `g, E: [C, K]`.
#
# Then the gradient is the chain rule, and nothing else:
#
# $$dg = M^\top (E \odot dE).$$
#
# Where is the subtraction? There is none. A gate collects from those tokens whose decay contains it, and from no
# others; nothing is added that would have to be taken away again. Inside a chunk the boundaries are the middles of
# blocks of 2, 4, 8, ... tokens: the later half of a block reads the earlier half, across the middle.


# %%
def halves(C, half):
    """For blocks of 2 * half tokens: M `[C, C]`, which tokens are late `[C, 1]`, which pairs meet here `[C, C]`."""
    i, t = torch.arange(C)[:, None], torch.arange(C)
    middle = i // (2 * half) * (2 * half) + half
    late = i >= middle
    M = torch.where(late, (middle <= t) & (t <= i), (i < t) & (t < middle))
    return M, late, late & ~late.T & (i // (2 * half) == t // (2 * half))


i, t = torch.arange(8)[:, None], torch.arange(8)
ch04.boundaries({
    "middles, half = 1": halves(8, 1)[0], "half = 2": halves(8, 2)[0], "half = 4": halves(8, 4)[0],
    "edge it enters by": t <= i, "edge it leaves by": t > i,
})  # fmt: skip

# %% [markdown]
# *Figure 4. M `[C, C]` for a chunk of C = 8 tokens: three levels of halving, then the two edges of the chunk. Column 0,
# the chunk's first gate, is empty but for the edge that the scan enters by: this gate fades only what comes from
# outside, and for the first chunk that is nothing. So its gradient is 0 to the last bit.*
#
# Now the pairs inside a chunk, level by level. The scores of a level are $A = (q \odot E)(k \odot E)^\top$ for the
# pairs that meet there, their gradient is $dA = do\, v^\top$, and from $E \odot dE = qE \odot dqE + kE \odot dkE$
# follows `dg`. (`qE` is short for $q \odot E$, and `dqE` for the gradient by it.)


# %%
def inside(q, k, v, g, do):
    """dq, dk, dv, dg of the pairs inside one chunk of C = 2^n tokens. `[C, K or V]`"""
    A, dA = torch.diag((q * k).sum(1)), do @ v.T  # a token reads itself: no gate in between
    dq, dk, dg = dA.diagonal()[:, None] * k, dA.diagonal()[:, None] * q, torch.zeros_like(g)
    for n in range(len(q).bit_length() - 1):
        M, late, meet = halves(len(q), 2**n)
        E = torch.exp(M.to(g) @ g)
        qE, kE = late * q * E, ~late * k * E
        A = A + meet * (qE @ kE.T)
        dqE, dkE = (meet * dA) @ kE, (meet * dA).T @ qE
        dq, dk = dq + E * dqE, dk + E * dkE
        dg = dg + M.to(g).T @ (qE * dqE + kE * dkE)  # dg = M^T (E dE)
    return dq, dk, A.T @ do, dg


# %% [markdown]
# Pairs across chunks go through the states, and there the two edges of the chunk are the boundaries: a query reads what
# entered, $o = (q \odot E)\,S$, and a key is handed on to what leaves,
# $S_{out} = e^{total} \odot S + (k \odot E)^\top v$. That is three more terms for `dg`, and they have the same form.


# %%
def edges(g):
    """M for the edge that the scan enters by, and for the one that it leaves by, each with E = exp(M g)."""
    i, t = torch.arange(len(g))[:, None], torch.arange(len(g))
    return [(M.to(g), torch.exp(M.to(g) @ g)) for M in (t <= i, t > i)]


def across(q, k, v, g, do, S, dS):
    """dq, dk, dv, dg of one chunk through S, the state that enters, and dS, the gradient of the one that leaves."""
    (M_in, E_in), (M_out, E_out) = edges(g)
    dqE, dkE = do @ S.T, v @ dS.T
    dg = M_in.T @ (q * E_in * dqE) + M_out.T @ (k * E_out * dkE)
    dg = dg + torch.exp(g.sum(0)) * (S * dS).sum(1)  # every gate of the chunk fades what passes through
    return E_in * dqE, E_out * dkE, (k * E_out) @ dS, dg


# %% [markdown]
# What is left is the walk: the states at the edges from the left, their gradients from the right. Only one state a
# chunk is kept. This is a backward pass that is right for every gate, and our kernel has it, for both directions at
# once. (Where gates forget little, it takes a shorter way through a chunk, with exponents of both signs and one
# subtraction: [one boundary for a chunk](../docs/mathematics.md#one-boundary-for-a-chunk). So it looks at how much was
# forgotten, and goes the long way if that was too much.)
#
# One line is for resets: $0 \cdot (-\infty)$ is NaN, also in $Mg$. So gates are cut off, far below the point where
# $e^g$ is 0.


# %%
def backward(q, k, v, g, do, scale, C=16):
    """dq, dk, dv, dg of one scan over chunks of C = 2^n tokens; C divides T."""
    chunks = list(zip(*(t.split(C) for t in (q, k, v, g.clamp(min=-1000), do * scale)), strict=True))
    S = [q.new_zeros(q.shape[1], v.shape[1])]
    for _, k_, v_, g_, _ in chunks:
        S.append(torch.exp(g_.sum(0))[:, None] * S[-1] + (k_ * edges(g_)[1][1]).T @ v_)
    dS, parts = torch.zeros_like(S[0]), []
    for (q_, k_, v_, g_, do_), S_in in zip(chunks[::-1], S[-2::-1], strict=True):
        both = zip(inside(q_, k_, v_, g_, do_), across(q_, k_, v_, g_, do_, S_in, dS), strict=True)
        parts.append([a + b for a, b in both])
        dS = torch.exp(g_.sum(0))[:, None] * dS + (q_ * edges(g_)[0][1]).T @ do_
    return [torch.cat(part[::-1]) for part in zip(*parts, strict=True)]


# %%
for name, value in zip(("dq", "dk", "dv", "dg"), backward(q, k, v, g, do, scale, C=4), strict=True):
    compare(name, value)
print("dg of the first gate:", backward(q, k, v, g, do, scale, C=4)[3][0].tolist())

# %% [markdown]
# Now the accuracy, in float32. For comparison there is also a half measure: the short formula inside each chunk only,
# plus what passes the chunk's far edge, $\sum_{\text{columns}} S_{out} \odot dS_{out}$.


# %%
def head(y):
    """q, k, v, g, do and the scale of the one head and direction."""
    return (*(t[0, 0] for t in y[:4]), y.do[0, 0], 0.25)


# %%
def in_chunks(y, C=16):
    S, dS = states_of(*head(y))
    dq, dk, *_ = gradients(*head(y))
    dS_out = dS - 0.25 * y.q[0, 0, :, :, None] * y.do[0, 0, :, None, :]  # without what the token itself reads
    within = shortcut(*(t.unflatten(0, (-1, C)) for t in (y.q[0, 0], dq, y.k[0, 0], dk)))  # [N, C, K]
    passing = (S * dS_out).sum(-1)[C - 1 :: C]  # [N, K]
    return (within + passing[:, None]).flatten(0, 1)[None, None]


# %%
errors["short formula inside chunks"] = against_truth(in_chunks)
errors["ours, M^T (E dE)"] = against_truth(lambda y: backward(*head(y))[3][None, None])
for backend in ("chunked", "fused"):
    layer = one_scan(backend)
    errors[f"vig_ref, {backend}"] = against_truth(lambda y, layer=layer: tolerance.evaluate(layer, y)["dg_fwd"])
for method, found in errors.items():
    print(f"{method:37}", *(f"{name.split(':')[0]} {e:.1e}" for name, e in found.items()), sep="  ")

# %%
ch04.gate_errors(errors)

# %% [markdown]
# *Figure 5. Error of `dg` in float32, relative to `dg`. Lower is better; the dashed line is "all wrong".*
#
# With $M^\top(E \odot dE)$ the error is that of float32, in every regime. (The kernel computes $2^{g \log_2 e}$, and
# the product in that exponent is rounded: with exponents of 100 that costs a digit. The bound of section 6 allows for it.) The
# half measure loses fewer digits than the whole short formula, and still loses all of them under strong decay: inside a
# chunk it subtracts the same diagonal from itself. The chunked layer was never told any of this: autograd
# differentiates `exp(cumsum(g))`, and arrives at $M^\top(E \odot dE)$ by itself, because the forward pass was written
# without a subtraction.

# %% [markdown]
# ## 6. Is it right? gradcheck, and a bound
#
# `torch.autograd.gradcheck` compares a backward pass with finite differences of the forward pass, in float64. It takes
# any `autograd.Function`, so that a hand-written backward pass can be tried before there is a kernel.


# %%
def with_backward(backward):
    """Eq. 5 as a function for autograd, its backward pass written by hand."""

    class GLA(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return scan(*inputs)[0]

        @staticmethod
        def backward(ctx, do):
            return tuple(backward(*ctx.saved_tensors, do, scale, C=4))

    return GLA.apply


# %%
def passes(function, T):
    leaves = [t[:T].clone().requires_grad_() for t in (q, k, v, g)]
    return torch.autograd.gradcheck(function, leaves, raise_exception=False)


print("ours, 12 tokens in chunks of 4:", passes(with_backward(backward), 12))

# %% [markdown]
# gradcheck knows the right answer only for the sizes it is given. Here is a backward pass that forgets everything that
# passes from one chunk to another. **Predict** what gradcheck says of it, for 4 tokens and for 12.


# %%
def chunks_alone(q, k, v, g, do, scale, C):
    """The backward pass of every chunk as if it were alone."""
    parts = [backward(*chunk, scale, C) for chunk in zip(*(t.split(C) for t in (q, k, v, g, do)), strict=True)]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


for length in (4, 12):
    print(f"{length:2} tokens in chunks of 4:", passes(with_backward(chunks_alone), length))

# %% [markdown]
# The first line is the commonest way to be sure of a wrong kernel: a test smaller than a chunk. gradcheck has another
# blind spot: it asks whether the backward pass belongs to the forward pass, not whether the forward pass is right. And
# it needs float64. Our kernel has that in the interpreter only, and there it can be tried; 17 tokens are a chunk and
# one.

# %%
leaves = [t.requires_grad_() for t in tolerance.draw(1, 1, 17, 3, 2, regime="moderate", dtype=torch.float64)]
fused = functools.partial(vig_ref.bidirectional_gla, backend="fused")
print("the fused layer, 17 tokens:", torch.autograd.gradcheck(fused, leaves[:5], fast_mode=True))

# %% [markdown]
#
# So how near must a float32 gradient be? [Chapter 8](08_how_to_trust_a_kernel.ipynb) is about that question; for `dg`
# it has a particular answer. Rounding errors are proportional to what is *added up*, so a bound is a unit of rounding
# times the same computation on absolute values, the **gauge** `G`. A sum over a chunk that may subtract has the gauge
#
# $$G_{dg}[t] = \sum_{i \ge t \text{, same chunk}} \left(|q_i|\, G_{dq,i} + |k_i|\, G_{dk,i}\right) + (\text{what leaves})$$
#
# and a second limit holds for the RMS of the error over a whole tensor. Both stand in
# [`vig_ref/tolerance.py`](../vig_ref/tolerance.py). A ratio up to 1 passes:


# %%
def ratios(dg, name, chunk=16):
    """Error / elementwise bound, and RMS error / RMS limit."""
    y = inputs[name]
    everything = tolerance.reference(y, scale=0.5)  # both directions; each scan then has the scale 0.25
    bound = tolerance.bounds(y, everything, scale=0.5, chunk=chunk)["dg_fwd"]
    limit = tolerance.RMS_LIMIT["ieee, strong gates" if name.startswith("strong") else "ieee"]
    return tolerance.nearest(dg, exact[name], bound)[0], rms(dg - exact[name]) / rms(exact[name]) / limit


# %%
candidates = {
    "short formula, bfloat16": shortcut_from(torch.bfloat16),
    "short formula, float32": shortcut_from(torch.float32),
    "ours, M^T (E dE)": lambda y: backward(*head(y))[3][None, None],
    "vig_ref, fused": lambda y: tolerance.evaluate(one_scan("fused"), y)["dg_fwd"],
    "a dg of 0": lambda y: torch.zeros_like(y.g_fwd),
}
print(" " * 23, *(f"{name.split(':')[0]:>20}" for name in REGIMES))
for method, function in candidates.items():
    found = [ratios(function(y), name) for name, y in inputs.items()]
    print(f"{method:23}", *(f"{worst:9.1e}, {whole:9.1e}" for worst, whole in found))

# %% [markdown]
# In each column the first number is the worst element over its bound, the second the whole tensor over its limit. The
# short formula is refused wherever it is bad; ours stays far below 1 everywhere.
#
# Read the last line twice. Under strong decay a gradient of *zero* passes the elementwise bound: `dg` is far smaller
# than the rounding error that a sum over a chunk may have. The bound must allow for that, since it speaks of all
# correct ways to compute; the RMS limit is what refuses it. No single check sees everything.

# %% [markdown]
# ## 7. The kernel's backward pass is yours
#
# Last, both directions of *your* backward pass against the fused one: first in float64, where the interpreter runs the
# kernel's own source, then in float32, each held to the bound. The mild gates go the shorter way, the others the one that
# you know.

# %%
mine = functools.partial(both_directions, backward)
for gates, regime in (("mild", "vig"), ("one gate of six a reset", "reset")):
    y = tolerance.draw(1, 1, 48, 8, 5, regime=regime, seed=4, dtype=torch.float64)
    kernel = tolerance.evaluate(vig_ref.bidirectional_gla, y, scale=0.3, backend="fused")
    for name, value in mine(*(t[0, 0] for t in y), 0.3).items():
        difference = (value - kernel[name][0, 0]).abs().max().item()
        print(f"{gates}: {name:6} {list(value.shape)}, largest difference {difference:.0e}")
        assert difference < 1e-12

# %%
y = tolerance.Inputs(*(t.float() for t in y))
kernel = tolerance.evaluate(vig_ref.bidirectional_gla, y, scale=0.3, backend="fused")
by_hand = {name: t[None, None] for name, t in mine(*(t[0, 0] for t in y), 0.3).items()} | {"o": kernel["o"]}
for who, found in (("by hand", by_hand), ("fused", kernel)):
    worst = tolerance.worst_ratios(found, y, scale=0.3, chunk=16)
    print(f"{who:8}", *(f"{name} {worst[name]:.2f}" for name in tolerance.NAMES[1:]), " of the bound", sep="  ")
    assert max(worst.values()) <= 1

# %% [markdown]
# ### Exercise 4: gates that are no logarithms
#
# Some implementations take `alpha` itself, from 0 to 1, and want `dalpha`. Since $\alpha = e^g$, `dg = alpha * dalpha`,
# and it is tempting to divide. Write `dalpha` so that it is right for `alpha = 0` as well: a closed gate has a
# gradient, even if its logarithm has none.


# %%
def dalpha(q, k, v, alpha, do, scale):
    """The gradient by alpha `[T, K]` of o_t = scale q_t S_t, S_t = alpha_t * S_t-1 + k_t^T v_t, for one head."""
    ...  # your turn


check(dalpha)

# %% [markdown]
# ## Common mistakes
#
# | mistake | what it looks like | what sees it |
# |---|---|---|
# | `dS` fades by its own token's gate instead of the next one's | errors in all tokens but the last | any comparison |
# | the scale is forgotten in `dS` alone | `dq` right, `dk` and `dv` off by a factor | a scale other than 1 |
# | the short formula for `dg` | good at first, noise when gates close | strong decay, RMS of `dg` |
# | `dg` from `dalpha` or back by a division by `alpha` | NaN at the first reset | `-inf` among the gates |
# | tests shorter than a chunk | all green | lengths beside the chunk: 15, 16, 17, 33 |
# | `o.sum().backward()` sends a `do` of strides 0, taken as contiguous | garbage | strided `do` |
# | two inputs are the same tensor, and a launcher goes by identity | `gla(q, q, v, g)` is wrong | aliased inputs |
#
# Each of them is planted in the list of bugs in [`tests/mutants.py`](../tests/mutants.py) or has been made here.

# %% [markdown]
# ## Summary
#
# - The adjoint of a scan is the same recurrence from the other end, with `q` and `do` in place of `k` and `v`, and
#   every gate on the same arrow.
# - Keeping every state costs `T K V` numbers a head and direction; keeping those at chunk edges and computing the rest
#   again costs about 1/C of that, and C states for the chunk that is being worked on; inverting the scan is no way out.
# - `dg = revcumsum(q dq - k dk)` is true and useless under strong decay: it subtracts two large sums that share all but
#   a tiny rest.
# - `E = exp(M g)` and `dg = M^T (E dE)` need no subtraction. What was written without a difference in the forward pass
#   is accurate in the backward pass as well.
# - gradcheck, an elementwise bound and an RMS limit have different blind spots; use all three, at lengths that cross a
#   chunk.
#
# Next: [5. From an image to logits](05_from_an_image_to_logits.ipynb), where the operator becomes a model.

# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. A gate is a memory
#
# **Time** 45 minutes with the exercises; the cells run in half a minute · **Prerequisites** PyTorch tensors, the
# matrix product, the exponential · **Device** a laptop CPU
#
# **The question.** A Transformer keeps every token it has seen, and pays for it with the square of their number. How
# can a model read a whole picture with a memory that never grows, and who decides what that memory forgets?
#
# We start from one number that fades, make it a matrix that stores pairs, and end with the operator of ViG: two scans
# over a photograph, Equation 6 of the [paper](https://arxiv.org/abs/2405.18425). All symbols stand in [one
# table](../docs/notation.md).

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # Triton's interpreter runs the fused kernels here, on CPU tensors; no GPU is used

import torch
import torch.nn.functional as F
from exercises import LAYERS, check
from figures import ch01

import vig_ref
from vig_ref import tolerance

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## One number that fades
#
# The smallest memory is one number $S$. At every token it fades by a factor $\alpha$, the **forget gate**, and takes
# in the token:
#
# $$S_t = \alpha\, S_{t-1} + x_t \qquad 0 \le \alpha \le 1$$


# %%
def scan(x, alpha):
    S, memories = 0.0, []
    for x_t, alpha_t in zip(x, alpha.expand(len(x)), strict=True):
        S = alpha_t * S + x_t  # S_t = alpha_t S_t-1 + x_t
        memories.append(S)
    return torch.stack(memories)


x = torch.zeros(60)
x[5] = 1  # a single 1, then nothing
ch01.impulse({f"α = {a}": scan(x, torch.tensor(a)) for a in (1.0, 0.99, 0.957, 0.8, 0.0)}, t_write=5)

# %% [markdown]
# *What is left of a single 1. With α = 1 the memory never forgets, with α = 0 it holds the present token and nothing
# else.*
#
# Put the recurrence into itself a few times, and the loop becomes a sum: $S_t = \sum_{j \le t} \alpha^{t-j} x_j$. What
# was written $n$ tokens ago weighs $\alpha^n$. Let us check that claim on random numbers before we use it.

# %%
x, alpha = torch.randn(60), torch.tensor(0.9)
t = torch.arange(60)
weights = (alpha ** (t[:, None] - t)).tril()  # row t, column j: alpha^(t-j) for j <= t
print("loop = sum:", torch.allclose(scan(x, alpha), weights @ x, atol=1e-6))

# %% [markdown]
# ### Gates are kept as logarithms
#
# A product of many gates soon leaves the range of floating-point numbers; a sum of their logarithms does not. So every
# function of `vig_ref` takes the **log gate** $g = \ln \alpha$, a number from $-\infty$ (forget all) to 0 (keep all),
# and what was written $n$ tokens ago weighs $e^{n g}$.
#
# **Exercise 1.** After how many tokens is half of a memory gone? That number is the *half-life* of a gate, and a
# better intuition than $\alpha$ itself.


# %%
def half_life(g: float) -> float:
    """The number of tokens n, not necessarily whole, after which a memory with log gate g has faded to 1/2."""
    ...  # your turn


check(half_life)

# %% [markdown]
# ## Where the gate comes from, and why it is divided by 16
#
# In ViG the gate is not a constant: each token computes its own, from its own content. The network produces any real
# number $x$, and Equation 5 squeezes it into a gate:
#
# $$\alpha = \mathrm{sigmoid}(x)^{1/\tau}, \quad \tau = 16 \qquad\text{that is}\qquad g = \mathrm{logsigmoid}(x) / 16$$
#
# **Predict first.** A new network produces $x \approx 0$. What is the half-life with $\tau = 1$, and with $\tau = 16$?
# An image of 224 × 224 pixels in patches of 16 has 14 patches a row, so the patch *above* is 14 tokens back. How much
# of it is left in the two cases?

# %%
for tau in (1, 16):
    g = F.logsigmoid(torch.tensor(0.0)) / tau
    left = (14 * g).exp()
    print(f"τ = {tau:2}: α = {g.exp():.4f}, half-life {-0.6931 / g:4.1f} tokens, left of the patch above {left:.5f}")

# %%
x = torch.linspace(-8, 8, 200)
ch01.gates(x, {"sigmoid(x)": F.logsigmoid(x), "sigmoid(x)$^{1/16}$": F.logsigmoid(x) / 16})

# %% [markdown]
# *The gate and its half-life, over what the network computes. The dashed line is one row of patches.*
#
# With $\tau = 1$ a new network is blind to the row above it, and would have to find $x \approx 3$ before half of that
# row is left. With $\tau = 16$ it starts at a half-life of 16 tokens, sees its neighbourhood in the picture at
# once, and from there can move to forget faster or more slowly. The paper says it in one clause: $\tau$ is there "to
# encourage the model to have a slower forgetting rate".
#
# ### A gate that the data decides
#
# Why let the token choose? Take one line of pixels of a photograph. Two memories, one of brightness and one that
# counts, give a running mean. A constant gate smears across every edge. A gate that closes where the brightness jumps
# starts afresh there, and remembers one object at a time.

# %%
image = ch01.photograph("china.jpg", 224)  # [224, 224, 3]
x = image[30].mean(-1)  # one line, its brightness  [224]
jump = (x - x.roll(1)).abs()
fixed = torch.tensor(0.95)
decided = torch.exp(-40 * (jump - 0.12).clamp_min(0))  # 1 while little changes, near 0 at an edge
gates = {"gate 0.95": fixed, "gate from data": decided}
means = {name: scan(x, a) / scan(torch.ones_like(x), a) for name, a in gates.items()}
ch01.one_row(image, 30, x, means)

# %% [markdown]
# *Sky, the tip of the roof, sky again. The constant gate lags behind at both edges; the gate that looks at the data
# does not.*
#
# ## A memory of pairs
#
# A number stores one thing. To store many and find them again, a memory needs addresses. Take a matrix $S$ of K rows
# and V columns. A **key** $k_t$ (K numbers) says where, a **value** $v_t$ (V numbers) says what, and a **query** $q_t$
# (K numbers) asks:
#
# $$\text{write: } S_t = S_{t-1} + k_t^\top v_t \qquad \text{read: } o_t = q_t S_t \qquad\text{(Eq. 4)}$$
#
# As in the paper, $q_t, k_t, v_t$ are rows, so that $k_t^\top v_t$ is a column times a row: a matrix.

# %%
k, v = torch.tensor([0.0, 1.0, 0.5]), torch.tensor([3.0, -1.0, 2.0, 0.5])
ch01.outer_product(k, v)

# %% [markdown]
# *One pair, written: every row of the state gets the value, times its number in the key.*
#
# Reading with the same key gives $k_t S = (k_t \cdot k_t)\, v_t$: for a key of length 1, the value itself.

# %%
k = F.normalize(k, dim=0)
S = torch.outer(k, v)  # write  [K, V]
print("read with k:", k @ S)
print("written    :", v)

# %% [markdown]
# ### Interference
#
# A second pair lies on top of the first. Reading with $k_j$ then gives
#
# $$k_j S = v_j + \sum_{i \ne j} (k_j \cdot k_i)\, v_i$$
#
# If all keys are at right angles, the sum vanishes, but only K directions can be at right angles to each other.
# **Predict**: random keys of length 1 in K dimensions have $(k_j \cdot k_i)^2 = 1/K$ on average, so $n$ pairs should
# give an error of $\sqrt{(n-1)/K}$, measured against the values. ViG-T has K = 32. When is the noise as loud as the
# memory?

# %%
K, V, counts = 32, 64, [4, 8, 16, 32, 64, 128, 196]
measured = []
for n in counts:
    k, v = F.normalize(torch.randn(20, n, K), dim=-1), torch.randn(20, n, V)  # 20 memories of n pairs
    S = k.mT @ v  # n writes at once: the sum of k_t^T v_t  [20, K, V]
    measured.append((k @ S - v).norm() / v.norm())
ch01.interference(counts, ((torch.tensor(counts) - 1) / K).sqrt(), torch.stack(measured), K)

# %% [markdown]
# *A memory of K rows holds about K pairs; with all 196 patches of an image in it, the noise is 2.5 times louder than
# the value.*
#
# So a memory of fixed size *must* forget, or it becomes noise. That is the second reason for a gate.
#
# ## A gate for every row: Equation 5
#
# Now both together. A gate of K numbers fades the K *rows* of the state, each at its own rate; then the pair is
# written, then the query reads:
#
# $$S_t = G_t \odot S_{t-1} + k_t^\top v_t, \qquad G_t = \alpha_t^\top \mathbf{1}, \qquad o_t = q_t S_t \qquad\text{(Eq. 5)}$$
#
# $G_t$ is $\alpha_t$ as a column, repeated over the V columns. Nobody forms it: broadcasting does the same.


# %%
def gla(q, k, v, g):
    """Eq. 5 for one head: q, k, g [T, K], v [T, V]; returns o [T, V] and all states."""
    S, o, states = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), [], []
    for t in range(len(q)):
        alpha = g[t].exp()
        S = alpha[:, None] * S + k[t, :, None] * v[t, None, :]  # S_t = G_t * S_t-1 + k_t^T v_t   [K, V]
        o.append(q[t] @ S)  # o_t = q_t S_t   [V]
        states.append(S)
    return torch.stack(o), states


# %%
alpha = torch.tensor([[1.0, 0.5]]).expand(4, 2)  # row 0 keeps, row 1 halves
k = torch.tensor([[1.0, 1.0], [0, 0], [0, 0], [1, 0]])
v = torch.tensor([[8.0, -4.0, 2.0], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
o, states = gla(k, k, v, alpha.log())
ch01.states(states, list(alpha))

# %% [markdown]
# *A state over four tokens; orange, the gate of a row. The first token writes into both rows; tokens 1 and 2 have k =
# 0 and write nothing; token 3 writes into row 0. Row 1 halves at each step.*
#
# A row that keeps and a row that forgets let one head hold the far and the near at the same time.
#
# **Exercise 2.** Unroll Equation 5 as we unrolled the scalar: with which weight does token $i$ read the value of token
# $j$? Everything in chapter 2 grows out of this line.


# %%
def weight(q, k, g, i: int, j: int):
    """The number A with o_i = ... + A v_j + ... : what token i takes of token j in a scan from the first token.

    q, k, g: [T, K]. 0 if the scan has not met token j when it reads at token i.
    """
    ...  # your turn


check(weight)

# %% [markdown]
# ## Two directions: Equation 6
#
# Language has an order; a picture has none that matters. A scan from the top left gives the first patch nothing to
# read, and the last one everything. ViG therefore scans twice, with the same q, k and v and *two gates*, and takes the
# mean:
#
# $$\overrightarrow{S}_t = \overrightarrow{G}_t \odot \overrightarrow{S}_{t-1} + k_t^\top v_t \qquad
# \overleftarrow{S}_t = \overleftarrow{G}_t \odot \overleftarrow{S}_{t+1} + k_t^\top v_t \qquad
# o_t = \tfrac12 \left( q_t \overrightarrow{S}_t + q_t \overleftarrow{S}_t \right) \qquad\text{(Eq. 6)}$$
#
# In the code the first scan is `fwd`, the second `rev`; *forward* and *backward* are kept for the two passes of
# autograd.
#
# A trick shows the weights: let $v$ be the identity matrix. Then $o = A v = A$, and row $i$ is what token $i$ takes of
# each token.

# %%
T = 6
ones, eye = torch.ones(T, 1), torch.eye(T)  # q = k = 1: only the gates decide
g_fwd, g_rev = torch.full((T, 1), -0.7), torch.full((T, 1), -0.3)
A_fwd = gla(ones, ones, eye, g_fwd)[0]
A_rev = gla(ones, ones, eye, g_rev)[0].T  # by symmetry, here where q = k = 1 and the gate is constant
ch01.three_matrices(A_fwd, A_rev)

# %% [markdown]
# *Weights of six tokens. The forward scan fills the lower triangle, the reverse scan the upper one, and both fill the
# diagonal.*
#
# **Why the diagonal weighs 1 and everything else 1/2.** Both scans write token $t$ at time $t$ and then read, so each
# of them gives the token its own value undimmed: $(1 + 1)/2 = 1$. Any other token is met by one scan before the
# reading, and by the other after it: $(e^{\dots} + 0)/2$. It follows from Equation 6, not from a mask that somebody
# chose. An implementation that adds two strictly triangular halves, or counts the diagonal once, is a different
# operator.
#
# **Exercise 3.** Write the other scan. A loop that begins at the end will do; so will turning all inputs round, and the
# result back.


# %%
def reverse_scan(q, k, v, g):
    """The scan from the last token to the first: S_t = exp(g_t) * S_t+1 + k_t^T v_t, o_t = q_t S_t.

    q, k, g: [T, K], v: [T, V]. Returns o [T, V].
    """
    ...  # your turn


check(reverse_scan)

# %% [markdown]
# ## Over a real photograph
#
# Cut the photograph into 14 × 14 patches of 16 × 16 pixels, as ViG-T does, and read them row by row. That is the
# sequence: T = 196 tokens.

# %%
patches = image.unflatten(0, (14, 16)).unflatten(2, (14, 16)).transpose(1, 2)  # [14, 14, 16, 16, 3]
patches = patches.flatten(0, 1)  # [T, 16, 16, 3], T = 196
ch01.scan_order(image)

# %% [markdown]
# *The sequence, and the two ways through it.*
#
# Note what the flattening does to the plane: the patch to the left is 1 token away, the patch above 14. Which patches
# can a token read? With q = k = 1 the weights are the decay alone. From here on we let the library compute. Its
# tensors have a batch and heads in front: `[B, H, T, K]`.


# %%
def decay(half_life, token):
    """What `token` can read of every patch, by each scan: two tensors [T]."""
    one, v = torch.ones(1, 1, 196, 1), torch.eye(196)[None, None]  # q = k = 1; v = I, so that o = A
    g = one * torch.tensor(0.5).log() / half_life
    return [vig_ref.gla(one, one, v, g, reverse=r, scale=1.0)[0, 0, token] for r in (False, True)]


token = 7 * 14 + 5  # row 7, column 5: turn the knobs here
ch01.readings(image, {f"half-life {n}": decay(n, token) for n in (4, 16, 196)}, token)

# %% [markdown]
# *What the framed patch can read, with the gate as a knob. At a half-life of 4 tokens: its own row. At 16, where a new
# ViG starts: some rows up and down. At 196: the picture. Each scan alone knows only one side of it.*
#
# Now with content. Let keys and queries be the patches' colours, seen from the mean colour, of length 1: then
# $q_i \cdot k_j$ is 1 for equal colours and −1 for opposite ones. A patch of the pagoda then reads what is dark or
# warm like itself, and reads sky with a negative weight: there is no softmax here, and nothing forbids it.

# %%
colour = patches.mean((1, 2))  # [T, 3]
qk = F.normalize(colour - colour.mean(0), dim=1)[None, None]  # queries and keys  [1, 1, T, 3]


def read(half_life, token):
    g = torch.full_like(qk, 0.5).log() / half_life
    v = torch.eye(196)[None, None]
    return [vig_ref.gla(qk, qk, v, g, reverse=r, scale=1.0)[0, 0, token] for r in (False, True)]


ch01.readings(image, {f"half-life {n}": read(n, token) for n in (16, 196)}, token)

# %% [markdown]
# *The same patch with colours as keys: red is a positive weight, blue a negative one. The gate limits how far a token
# reads, the keys choose what.*
#
# ### What the memory still holds
#
# Write all 196 patches into one state, pixels as values (V = 768), and after the last token ask for each by its key.
# Paint what comes back. **Predict**: which part of the picture survives a half-life of 56 tokens, four rows? And what
# happens when K is not 196 but 96, as many as the three heads of ViG-T have together, so that the keys cannot all be
# at right angles?


# %%
def recall(keys, half_life):
    """Scan all patches, then read each by its key out of the last state."""
    g = torch.full_like(keys, 0.5).log() / half_life
    S = gla(keys, keys, patches.flatten(1) - 0.5, g)[1][-1]  # the state after the last token  [K, 768]
    return (keys @ S).unflatten(1, (16, 16, 3)) + 0.5  # [T, 16, 16, 3]; grey is "nothing"


keys = {"K = 196": torch.eye(196), "K = 96": F.normalize(torch.randn(196, 96), dim=1)}
lives = {"no forgetting": float("inf"), "half-life 56": 56, "half-life 14": 14}
ch01.recalled({row: {name: recall(k, n) for name, n in lives.items()} for row, k in keys.items()})

# %% [markdown]
# *A photograph read back out of the forward scan's last state. Above, keys at right angles: what was written first is
# gone first, and nothing else is lost. Below, too few rows: without forgetting, 196 patches drown each other; a memory
# that forgets the top keeps the bottom legible.*
#
# Is that an impression, or can it be counted? The error of the last row of patches, against those patches:

# %%
for name, n in (lives | {"half-life 3.5": 3.5}).items():
    errors = [((recall(k, n) - patches)[-14:].norm() / (patches[-14:] - 0.5).norm()).item() for k in keys.values()]
    print(f"{name:14} K = 196: {errors[0]:.2f}   K = 96: {errors[1]:.2f}")

# %% [markdown]
# With room for every key, each bit of forgetting is a loss. With too little room there is a best gate in between, and
# it depends on the image: one more reason to let the model choose it.
#
# The reverse scan's last state, the one at the first patch, holds the mirror image of this: the top of the picture.
# Step through both, patch by patch: **[the scan over an image](../docs/animations/scan.html)** (a page that needs no
# network). One frame of it:

# %%
ch01.scan_frame(step=104)

# %% [markdown]
# *At patch 104 the forward state holds the patches before it, the reverse state those after it, both fading with
# distance; the token reads the mean.*
#
# ## The same call, three layers
#
# `vig_ref` has this operator three times: `naive` is the loop that you have read, `chunked` makes it matrix products,
# which is [chapter 2](02_from_a_loop_to_matmuls.ipynb), and `fused` is one Triton kernel, which is [chapter
# 3](03_one_kernel_two_directions.ipynb). All of them have the same signature. Does our loop agree? (`LAYERS` names those
# that can run here: Triton, and with it `fused`, is published for Linux only.) `tolerance.draw`
# makes seeded inputs whose gates are as in ViG.

# %%
x = tolerance.draw(B=1, H=1, T=50, K=8, V=16, dtype=torch.float64)
mine = gla(*(t[0, 0] for t in (x.q, x.k, x.v, x.g_fwd)))[0]


def compare(layer, mine):
    for backend in LAYERS:
        o = layer(backend)[0, 0]
        print(f"{backend:8} equal: {torch.allclose(o, mine)}  largest difference {(o - mine).abs().max():.0e}")


compare(lambda backend: vig_ref.gla(x.q, x.k, x.v, x.g_fwd, scale=1.0, backend=backend), mine)

# %% [markdown]
# And both directions. One thing is new: `scale`. The released code multiplies queries by $K^{-1/2}$, which the paper
# does not mention, and so does the library unless told otherwise ([paper against code](../docs/paper_vs_code.md)).

# %%
q, k, v, g_fwd, g_rev = (t[0, 0] for t in x[:5])
o_fwd = gla(q, k, v, g_fwd)[0]
o_rev = gla(q.flip(0), k.flip(0), v.flip(0), g_rev.flip(0))[0].flip(0)  # your reverse_scan does this, too
mine = 8**-0.5 * (o_fwd + o_rev) / 2  # Eq. 6
compare(lambda backend: vig_ref.bidirectional_gla(*x[:5], backend=backend), mine)

# %% [markdown]
# ## Common mistakes
#
# | mistake | what you see |
# |---|---|
# | **Gate on the columns**: `alpha[None, :] * S`. | An error if K ≠ V. If K = V nothing stops you, and the model still trains. Test with K ≠ V. |
# | **α where g is expected.** | The "log gate" 0.9 means α = 2.46: the state grows instead of fading. Positive gates are outside the contract of `vig_ref.gla` and are not looked for. The next cell shows it. |
# | **The two gates swapped.** | Shapes fit, and a model learns as well as before; it is another function of the image nevertheless ([verification](../docs/verification.md)). |
# | **A half too many.** | The released plain ViG halves o twice at inference ([paper against code](../docs/paper_vs_code.md)). A normalisation behind it hides the factor: compare the operator, not the model. |
# | **The diagonal counted twice, or once too few.** | Small and everywhere. Gates of −∞ leave the diagonal alone: then o must be exactly scale (q · k) v. |
# | **q, k and v turned round, the gate not.** | The reverse scan fades with the wrong token's gate; with constant gates no test notices. Exercise 3's checker does. |

# %%
one, alpha = torch.ones(1, 1, 196, 1), torch.full((1, 1, 196, 1), 0.9)
for name, g in (("g = ln 0.9", alpha.log()), ("g = 0.9, a gate taken for its logarithm", alpha)):
    print(f"{name}: the last o is {vig_ref.gla(one, one, one, g, scale=1.0, backend='naive')[0, 0, -1, 0]:.3g}")

# %% [markdown]
# ## Summary
#
# - A gate makes a memory of fixed size: what was written $n$ tokens ago weighs $e^{g_{t-n+1} + \dots + g_t}$, and a
#   log gate $g$ has a half-life of $\ln 2 / (-g)$ tokens.
# - Dividing by 16 gives a new network a half-life of 16 tokens, about a row of patches, where it would have had 1.
# - $S$ stores pairs: write $k^\top v$, read $q S$. About K pairs fit; beyond that, forgetting keeps the rest legible.
# - ViG scans twice with two gates and takes the mean. A token sees itself with weight 1, everything else with 1/2
#   times the decay.
#
# The loop takes T steps, one after the other, each far too small for the hardware. How to get the same numbers from a
# few matrix products: [chapter 2, From a loop to matmuls](02_from_a_loop_to_matmuls.ipynb).

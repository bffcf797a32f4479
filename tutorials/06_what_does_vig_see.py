# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6. What does ViG see
#
# **Time** 35 minutes with the exercises; the cells run in a minute · **Prerequisites** chapters
# [1](01_a_gate_is_a_memory.ipynb) and [5](05_from_an_image_to_logits.ipynb) · **Device** a laptop CPU
#
# **The question.** Papers on vision models show attention maps and receptive fields (Figures 5 and 6 of this one).
# ViG has no softmax and stores no attention. So what is such a map here, what does it show of the architecture and
# what of a trained model, and is it a reason for what the model answers?
#
# No released weights come with this project. What an *untrained* model shows is what the architecture can reach; what
# training adds, we look at in a small model that learns handwritten digits in this notebook.

# %%
import copy
import json
import math
import os
from pathlib import Path

import sklearn.datasets
import torch
import torch.nn.functional as F
from torch.testing import assert_close

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from exercises import LAYERS, check
from figures import ch06

import vig_ref
from vig_ref import demo, roadmap, see

torch.set_num_threads(1)  # small tensors: a second thread waits more than it works
CHINA, FLOWER = (Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg" for name in ("china", "flower"))

# %% [markdown]
# (Without a GPU, `TRITON_INTERPRET` lets Triton's interpreter run the fused layer's kernels on the CPU.)
#
# ## A scan is a matrix
#
# Unroll the recurrence of Eq. 6. Token i meets what token j wrote, faded by every gate that came after:
#
# $$A_{fwd}[i, j] = \tfrac{scale}{2}\; q_i \cdot \Big(k_j \odot \exp \sum_{m=j+1}^{i} g_{fwd}[m]\Big) \quad (j \le i)$$
#
# $$A_{rev}[i, j] = \tfrac{scale}{2}\; q_i \cdot \Big(k_j \odot \exp \sum_{m=i}^{j-1} g_{rev}[m]\Big) \quad (j \ge i)$$
#
# and $o = (A_{fwd} + A_{rev})\,v$. Row $i$ of these matrices is the *map* of token $i$: how much of each token's
# value it takes. The operator never forms them, and that is its point; to look at them we do, in
# [`see.attention_matrix`](../vig_ref/see.py).

# %%
torch.manual_seed(0)
B, H, T, K, V = 1, 2, 12, 4, 3
q, k, g_fwd, g_rev = torch.randn(4, B, H, T, K, dtype=torch.float64)
g_fwd, g_rev = F.logsigmoid(g_fwd), F.logsigmoid(g_rev)
v = torch.randn(B, H, T, V, dtype=torch.float64)
A_fwd = see.attention_matrix(q, k, g_fwd, reverse=False, scale=K**-0.5 / 2)  # [B, H, T, T]
A_rev = see.attention_matrix(q, k, g_rev, reverse=True, scale=K**-0.5 / 2)
for backend in LAYERS:
    o = vig_ref.bidirectional_gla(q, k, v, g_fwd, g_rev, backend=backend)
    assert_close((A_fwd + A_rev) @ v, o, rtol=1e-12, atol=1e-14)
    print(f"(A_fwd + A_rev) v is the {backend} layer's o, {list(o.shape)}")

# %% [markdown]
# Three things that a softmax would forbid. The weights may be negative. A row sums to anything. And a token meets
# itself in both scans, so that the diagonal of the sum counts twice: weight 1 where the others have 1/2.

# %%
A = A_fwd + A_rev
sums = A.sum(-1)
print(f"{(A < 0).double().mean():.0%} of the weights are negative; rows sum to {sums.min():.2f} up to {sums.max():.2f}")
itself = torch.diagonal(A, dim1=2, dim2=3)
assert_close(itself, K**-0.5 * (q * k).sum(-1))  # scale q_i . k_i, no gate in between

# %% [markdown]
# ### Exercise 1
#
# Write the map of one token in the forward scan: row $i$ of $A_{fwd}$ for one head, without a loop over time if you
# can. `cumsum` of the gates is your friend; the gates here are finite.

# %%
def forward_map(q, k, g, i, scale):
    """Row i of scale * q_i . (k_j exp(g_j+1 + ... + g_i)), zero for j > i. q, k, g: [T, K]; returns [T]."""
    ...  # your turn


check(forward_map)

# %% [markdown]
# ## Maps over photographs
#
# ViG-T, untrained and awake ([chapter 5](05_from_an_image_to_logits.ipynb) says why), 196 tokens.
# `see.attention_maps` takes the inputs of one block's mixer and forms both matrices.

# %%
torch.manual_seed(0)
model = vig_ref.create_model("vig_tiny", backend="chunked").eval()
vig_ref.wake(model)
photographs = {"china": see.photograph(CHINA, 224), "flower": see.photograph(FLOWER, 224)}
maps = {name: see.attention_maps(model, see.normalised(image), block=-1) for name, image in photographs.items()}
print({name: list(m.fwd.shape) for name, m in maps.items()})

# %%
ch06.matrices(maps["china"])

# %% [markdown]
# *The magnitude of A in the last block, head 0, for the photograph of the temple: forward below the diagonal, reverse
# above it, both together. A line of 14 tokens is a row of patches.*
#
# **Predict.** An untrained gate is $0.5^{1/16} = 0.958$. How much of a weight is left for the patch to the left, and
# for the patch right above, which is as near in the picture but 14 tokens earlier in the scan? Then measure: the mean
# $|A_{fwd}[i, i - d]|$ over all tokens, at distance d.

# %%
alpha = 0.5 ** (1 / 16)
print(f"predicted: {alpha:.3f} to the left, {alpha**14:.3f} from above, {alpha**98:.3f} from half an image above")
distances = range(1, 196)
A = torch.cat([maps[name].fwd for name in maps]).abs()  # [2, 3, 196, 196]
measured = [A.diagonal(-d, dim1=2, dim2=3).mean().item() for d in distances]
ch06.reach(distances, measured, alpha)

# %% [markdown]
# *The mean weight at each distance in the scan, and the decay of the gates alone, put through its first point:
# without training, how far a token reads is how far the gates let it.*
#
# Now single tokens, as in Figure 5 of the paper:

# %%
ch06.tokens(photographs, maps, {"china": (8, 4), "flower": (6, 6)})

# %% [markdown]
# *What the framed token reads: forward (before it in row-major order), reverse (after it), merged. Red adds, blue
# subtracts. The token's weight on itself is left out of the range of colours; it would outshine the rest.*
#
# Two things meet in these maps. The bands along the rows are the gates and the order of the scan. The colours are q ·
# k: both are linear in the patch, so that alike patches meet with one sign and unlike ones with the other, and the
# temple parts from the sky. None of it was learned. Keep that in mind before a map of a trained model: *that a
# picture of weights separates an object from its background is no sign of training.*
#
# ### The gate is the knob
#
# The same q and k, and gates of our own: a half-life of 3, 14 and 196 tokens.

# %%
x = see.normalised(photographs["china"])
seen = []
hook = model.blocks[-1].mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
with torch.no_grad():
    model(x)
    hook.remove()
    mixer = model.blocks[-1].mixer
    q, k, _, g, _ = mixer.project(mixer.local(seen[0]))

merged = {}
for half_life in (3, 14, 196):
    g = torch.full_like(g, -math.log(2) / half_life)
    merged[half_life] = sum(see.attention_matrix(q, k, g, reverse=r, scale=32**-0.5 / 2) for r in (False, True))
ch06.knob(photographs["china"], merged, token=(8, 4))

# %% [markdown]
# *The merged map of one token under three gates: the longer the half-life, the more the map is q · k alone.
# [The explorer](../docs/explorer.md) does this for every patch, with a slider.*
#
# ## Which pixels matter: the effective receptive field
#
# A map is about one block. Over the whole network, ask for the gradient: how much does the middle token of the last
# map move if a pixel does?
#
# $$\mathrm{ERF}[y, x] = \sum_{\text{colours}} \Big|\frac{\partial}{\partial\, \text{pixel}[y, x]} \sum_{n}
# s_n\, z_{\text{middle}}[n]\Big|, \quad \text{divided by its maximum}$$
#
# (Figure 6 of the paper. The measure is a gradient at these images, not a property of the weights alone; a residual
# path from a pixel to its own token is always in it. The signs $s_n = \pm 1$ are drawn once: below, a trap says why.)
#
# **Predict.** Three rows of the paper's Table 3: one scan (GLA), two scans (BidGLA), and ViG, with its local branch.
# The middle token of 14x14 is (7, 7). Its patch and its overlap end with pixel row 127. Which part of the image has
# gradient *exactly* 0 in a model with one scan?

# %%
names = {"GLA": "patch_embed", "BidGLA": "direction_wise", "ViG": "gate_2d"}
both = torch.cat([see.normalised(image) for image in photographs.values()])
fields = {}
for name, row in names.items():
    torch.manual_seed(0)
    untrained = roadmap.create_row(row, backend="chunked")
    vig_ref.wake(untrained)
    fields[name] = see.effective_receptive_field(untrained, both)  # [224, 224]
    print(f"{name:7} exactly 0 in {(fields[name] == 0).float().mean():.1%} of the pixels")
below, beside = 96 * 224, 16 * 96  # below row 127; and in the token's own row, what is right of column 127
print(f"predicted for GLA: {(below + beside) / 224**2:.1%}")

# %%
ch06.fields(fields)

# %% [markdown]
# *The effective receptive field of the middle token over both photographs, untrained, on a logarithmic scale. One
# scan is blind to what comes later; two scans see everything; the 3x3 branch puts weight on the neighbours in two
# dimensions.*
#
# Numbers for it: the smallest part of the image that holds half of the response, 90 % and 99 % of it. Half needs no
# more than the token's own patch with its overlap, 25x25 pixels or 1.2 % of the image, to which the residual path
# leads; in ViG, somewhat more. The rest is in the order of the paper's pictures.

# %%
for name, field in fields.items():
    half, most, all_but = (see.share_of_pixels(field, share) for share in (0.5, 0.9, 0.99))
    print(f"{name:7} half of the response in {half:.1%} of the pixels, 90 % in {most:.1%}, 99 % in {all_but:.1%}")
recorded = json.loads(Path("../docs/results/erf.json").read_text())["share_of_pixels_that_hold"]
print("on record, one photograph, turned four times:", {n: f"{recorded[n]['0.5']:.1%}" for n in ("GLA", "ViG")})

# %% [markdown]
# ### A field of nothing
#
# Why not simply sum the channels? A LayerNorm's outputs sum to a constant (without training, to 0). ViG-H, like DeiT,
# ends in one: the gradient of the sum is 0, and what a computer returns is 0 or rounding, as the machine adds. Divided by
# its maximum, rounding makes a picture like any other. ViG ends in an RMSNorm, and its sum has a gradient; but its *stem* ends in a
# LayerNorm, so that the sum misses the path past all blocks: the picture looks right, and its middle is too dim. A
# second precision gives rounding away; random signs leave neither out.

# %%
for dtype in (torch.float32, torch.float64):
    torch.manual_seed(0)
    other = vig_ref.create_model("vig_h_tiny", backend="chunked").to(dtype).eval()
    vig_ref.wake(other)
    pixels = see.normalised(see.photograph(CHINA, 64)).to(dtype).requires_grad_()
    (last,) = other.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)
    stem = copy.deepcopy(model.patch_embed).to(dtype)(pixels)
    for name, token in {"ViG-H's last map": last[0, :, 1, 1], "ViG's stem": stem[0, 1, 1]}.items():
        largest = []
        for weights in (torch.ones(len(token)), see.signs(len(token))):
            (gradient,) = torch.autograd.grad(token @ weights.to(dtype), pixels, retain_graph=True)
            largest.append(gradient.abs().max().item())
        print(f"{name} in {dtype}: largest gradient of the sum {largest[0]:.0e}, with signs {largest[1]:.0e}")
        assert largest[0] < (1e-5 if dtype == torch.float32 else 1e-13) * largest[1]

# %% [markdown]
# ### Exercise 2
#
# Write that measure yourself: the smallest share of the pixels that holds a given share of the response.

# %%
def smallest_share(field, share):
    """The smallest number of pixels that together hold `share` of field.sum(), divided by the number of all pixels."""
    ...  # your turn


check(smallest_share)

# %% [markdown]
# ## A model that has learned something
#
# The model and the training are those of `vig-ref demo`: 1797 scans of handwritten digits, 8x8 pixels, in patches of
# 2x2. That makes a grid of 4x4, T = 16 tokens, three blocks of two heads. One digit in five is held out. Eight epochs
# take a quarter of a minute or so.

# %%
data = demo.load("cpu")
epochs = 8
learner = demo.Learner(data, backend="chunked", steps=epochs * (len(data.x) // demo.BATCH))
before = copy.deepcopy(learner.model).eval()
history = demo.train(learner, epochs)
after = learner.model.eval()
first, last = (history[n]["test_accuracy"] for n in (0, -1))
print(f"held-out digits read rightly: {first:.0%} after one epoch, {last:.0%} at the end")
print(f"and with o = 0, the global branch switched off: {learner.accuracy_without_global_branch():.0%}")

# %% [markdown]
# Without its global branch the trained model is far worse: the maps below are of something that it uses. First its
# gates. They began all alike, at 0.958.

# %%
@torch.no_grad()
def gates(model, block):
    """alpha of both directions over all held-out digits, each a flat tensor."""
    mixer, seen = model.blocks[block].mixer, []
    hook = mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(data.x_test)
    hook.remove()
    *_, g_fwd, g_rev = mixer.project(mixer.local(seen[0]))
    return {"fwd": g_fwd.exp().flatten(), "rev": g_rev.exp().flatten()}


ch06.gates({(when, n): gates(m, n) for when, m in (("before", before), ("after", after)) for n in range(3)})

# %% [markdown]
# *Forget gates before and after training, per block and direction: the middle line is the median, the box holds four
# fifths, the whiskers 98 %. Training spreads them, more in later blocks, and differently in the two directions, which
# a shared gate could not do.*
#
# Now its maps, before and after, for the first held-out digits:

# %%
examples = data.x_test[:4]
shown = {"before": see.attention_maps(before, examples, -1), "after": see.attention_maps(after, examples, -1)}
ch06.digits(examples, shown, token=5, head=0)

# %% [markdown]
# *Four held-out digits and the merged map of token 5 (row 1, column 1, framed) in the last block, head 0: before
# training and after it, each with a range of colours of its own.*
#
# ## Is a map a reason?
#
# It is tempting to say: the model read *this*, so it answered *that*. Test it. If the patches with the largest
# weights are why the model answers, then the answer should suffer when they are painted over, and suffer more than
# with other patches. Sum a map over the tokens that read: how much is token j read by others?

# %%
def erased(images, patches):
    """Images with these patches of 2x2 pixels, [B, n] of 16, painted as empty paper."""
    mask = torch.zeros(len(images), 16).scatter_(1, patches, 1).reshape(-1, 1, 4, 4)
    return torch.where(F.interpolate(mask, scale_factor=2) > 0, -1.0, images)


def read_by_others(model, block):
    """For each held-out digit, sum over heads and over i != j of |A[i, j]|: [B, 16]."""
    m = see.attention_maps(model, data.x_test, block)
    return ((m.fwd + m.rev).abs() * (1 - torch.eye(16))).sum(dim=(1, 2))


orders = {
    "map, first block": read_by_others(after, 0),
    "map, last block": read_by_others(after, -1),
    "map of the untrained model": read_by_others(before, -1),
    "most ink": F.avg_pool2d(data.x_test, 2).flatten(1),
}

# %% [markdown]
# **Predict** before you run it: in which order do the five curves lie?

# %%
counts = (0, 1, 2, 3, 4, 6, 8)


@torch.no_grad()
def survived(weight):
    """The share of digits read rightly when the n patches of the largest weight are painted over, for each n."""
    pictures = [erased(data.x_test, weight.topk(n, dim=1).indices) for n in counts]
    return [(after(x).argmax(1) == data.y_test).float().mean().item() for x in pictures]


curves = {name: survived(weight) for name, weight in orders.items()}
r = torch.Generator().manual_seed(0)
draws = torch.tensor([survived(torch.rand(360, 16, generator=r)) for _ in range(20)])
curves["chance"] = draws.mean(0).tolist()
ch06.erasing(counts, curves)

# %% [markdown]
# *Held-out digits read rightly after n of 16 patches are painted over, chosen in five ways; chance is the mean of
# twenty draws. The lower a curve, the more the chosen patches mattered.*

# %%
for name, weight in orders.items():
    ink = torch.corrcoef(torch.stack([weight.flatten(), orders["most ink"].flatten()]))[0, 1]
    print(f"{name:27} {curves[name][3]:.0%} right with three patches gone; correlation with ink {ink:+.2f}")
print(f"{'chance':27} {draws[:, 3].mean():.0%}, ± {draws[:, 3].std():.0%} from draw to draw")
order = ("most ink", "map of the untrained model", "map, first block", "chance")
assert [curves[name][3] for name in order] == sorted(curves[name][3] for name in order)

# %% [markdown]
# Painting over ink hurts most, which is no surprise and needs no map. The trained model's first map beats chance. Its
# last one, the one that is usually shown, beats it by a few points up to four patches and not beyond, though it goes with
# the ink more than the first. And the map of the *untrained* model, which knows nothing of digits, beats both.
#
# So at least here the map of one block is a fact about that block, what its operator multiplies with which v, and no
# explanation of the answer. The values, the gate, the MLPs, the residual path and the other blocks have their say
# too. One small model on small images cannot tell what holds for a ViG trained on ImageNet; the experiment, however,
# costs little there too, and a picture without it shows less than it seems to.
#
# ### Exercise 3
#
# Write the choice that was tested: the n tokens that *other* tokens read most, over all heads.

# %%
def most_read(A_fwd, A_rev, n):
    """Indices of the n most-read tokens, most first. A_fwd, A_rev: [H, T, T], rows read columns; returns [n]."""
    ...  # your turn


check(most_read)

# %% [markdown]
# ## Common mistakes
#
# - **Looking at the diagonal.** A token's weight on itself passes no gate and counts twice; on one scale with the
#   rest it makes them all invisible. `vig-ref see` sets the range of colours by the others.
# - **Forgetting the sign.** Magnitudes are fine for "how much"; but blue patches are subtracted, and a map drawn from
#   $|A|$ alone shows the temple and the sky alike.
# - **The wrong row.** A is read by rows: `A[i]` is what token i takes. `A[:, j]` is what token j gives.
# - **A model that is the identity.** timm's ResNet50 sets the last norm of every residual branch to 0, so that an
#   untrained one has a receptive field of a few pixels. For a comparison of architectures this must be off
#   (`zero_init_last=False`), as `wake` must be on for ViG: from the released start the global branch is silent, and
#   the field is that of the local branch.
# - **A field of nothing.** See above: the plain sum over channels behind a LayerNorm, drawn as if it said something.
# - **A picture of an untrained model without the word "untrained".**
#
# ## Summary
#
# - Unrolled, both scans are matrices, triangular and without a softmax; $o = (A_{fwd} + A_{rev})v$, in every layer.
# - Without training, a token's reach is the half-life of its gates, and alike patches stand out already. Over the
#   whole network one scan is blind to the later half of the image, exactly; two scans see all of it; the local branch
#   adds two dimensions.
# - Training spreads the gates, and differently in the two directions.
# - Whether a map is a reason can be tested. Here it was not one.
#
# **Next:** [7. The roadmap](07_the_roadmap.ipynb), where the parts are added one by one and each has to show what it
# is good for.

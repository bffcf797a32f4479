"""What must hold whatever the right answer is: laws of the operator, on every layer, without an oracle.

A law needs no trust in an oracle, and sees errors that the oracle would share. It cannot see an error that obeys the
law too: most of these hold for any scale, say. Where rounding enters, two results may differ by the sum of what
`vig_ref.tolerance` allows each; where it does not, bits are compared.
"""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import CHUNK, LAYERS, Case, device_of
from test_exact import dyadic
from vig_ref import gla
from vig_ref.tolerance import NAMES, REGIMES, Inputs, bounds, evaluate

on_every_layer = pytest.mark.parametrize("layer", LAYERS)
#: The interpreter takes a second for some ten short sequences: fewer and smaller examples than elsewhere.
few = settings(max_examples=max(2, settings.default.max_examples // 7))
small = st.builds(
    Case,
    B=st.just(1),
    H=st.integers(1, 2),
    T=st.integers(2, 34),
    K=st.sampled_from((1, 3, 5)),
    V=st.sampled_from((1, 4)),
    regime=st.sampled_from(sorted(REGIMES)),
    seed=st.integers(0, 2**16),
)
SCALE = 0.5


class Results(NamedTuple):
    """Float64 copies of the result and its gradients by name, and how far each may be from the truth."""

    value: dict[str, Tensor]
    bound: dict[str, Tensor]

    def map(self, function) -> "Results":
        """The same rearrangement of every tensor."""
        return Results(*({name: function(t) for name, t in part.items()} for part in self))


def run(layer: str, x: Inputs, chunk: int | None = None, **options) -> Results:
    got = evaluate(LAYERS[layer].bidirectional_gla, x, scale=SCALE, **options)
    value = {name: t.double() for name, t in got.items()}
    return Results(value, bounds(x, value, scale=SCALE, chunk=chunk or CHUNK[layer]))


def agree(a: Results, b: Results, names=NAMES):
    for name in names:
        assert ((a.value[name] - b.value[name]).abs() <= a.bound[name] + b.bound[name]).all(), name


def inputs(layer: str, case: Case) -> Inputs:
    return case.inputs(torch.float32, device_of(layer))


@on_every_layer
@few
@given(case=small)
def test_time_reversal_swaps_the_directions(layer, case):
    x = inputs(layer, case)
    q, k, v, g_fwd, g_rev, do = (t.flip(2) for t in x)
    mirrored = run(layer, Inputs(q, k, v, g_rev, g_fwd, do)).map(lambda t: t.flip(2))
    for part in mirrored:
        part["dg_fwd"], part["dg_rev"] = part["dg_rev"], part["dg_fwd"]
    agree(run(layer, x), mirrored)


@on_every_layer
@pytest.mark.parametrize("name", ["q", "k", "v"])
@few
@given(case=small)
def test_linear_in(layer, name, case):
    """f(a + b) = f(a) + f(b); a and b have few digits, so that their sum is not rounded."""
    x = inputs(layer, case)
    a = (getattr(x, name) * 8).round() / 8
    b = a.flip(2) * 4
    whole, *parts = (run(layer, x._replace(**{name: t})) for t in (a + b, a, b))
    agree(whole, Results(*({"o": p["o"] + r["o"]} for p, r in zip(*parts, strict=True))), ["o"])


def agrees_with_attention(layer: str, x: Inputs, weight: Tensor) -> dict[str, Tensor]:
    """(q k^T * weight) v in float64, and its gradients in q, k and v. Returns all that the layer gave."""
    q, k, v = (t.double().requires_grad_() for t in x[:3])
    o = SCALE * (q @ k.mT * weight.to(q.device)) @ v
    grads = torch.autograd.grad(o, (q, k, v), x.do.double())
    names = NAMES[:4]
    exact = dict(zip(names, (o.detach(), *grads), strict=True))
    got = run(layer, x)
    agree(got, Results(exact, {name: torch.zeros_like(t) for name, t in exact.items()}), names)
    return got.value


@on_every_layer
@few
@given(case=small)
def test_without_forgetting_it_is_linear_attention(layer, case):
    x = inputs(layer, case)
    keep = torch.zeros_like(x.q)
    x = x._replace(g_fwd=keep, g_rev=keep)
    agrees_with_attention(layer, x, (1 + torch.eye(case.T)) / 2)


@on_every_layer
@few
@given(case=small)
def test_with_nothing_but_resets_only_the_token_itself_is_left(layer, case):
    x = inputs(layer, case)
    none = torch.full_like(x.q, -torch.inf)
    x = x._replace(g_fwd=none, g_rev=none)
    got = agrees_with_attention(layer, x, torch.eye(case.T))
    assert (got["dg_fwd"] == 0).all()
    assert (got["dg_rev"] == 0).all()


@given(case=small, chunk_sizes=st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_chunk_size_changes_rounding_only(case, chunk_sizes):
    x = case.inputs(torch.float32)
    agree(*(run("chunked", x, chunk=C, chunk_size=C) for C in chunk_sizes))


@on_every_layer
@few
@given(case=small, r=st.randoms(use_true_random=False))
def test_sequences_are_independent(layer, case, r):
    """Permuting a batch and its heads permutes the result, to the last bit."""
    x = inputs(layer, Case(**vars(case) | {"B": 2, "T": case.T // 2}))
    b, h = r.sample(range(2), 2), r.sample(range(case.H), case.H)
    permuted = run(layer, Inputs(*(t[b][:, h] for t in x))).value
    for name, t in run(layer, x).value.items():
        assert torch.equal(permuted[name], t[b][:, h]), name


@on_every_layer
@few
@given(case=small, cut=st.integers(1, 33))
def test_a_reset_separates_two_sequences(layer, case, cut):
    """Packed with a gate of 0 between them, each has the result and the gradients that it has alone."""
    x = inputs(layer, case)
    cut = min(cut, case.T - 1)
    x.g_fwd[:, :, cut] = -torch.inf
    x.g_rev[:, :, cut - 1] = -torch.inf
    left = run(layer, Inputs(*(t[:, :, :cut] for t in x)))
    right = run(layer, Inputs(*(t[:, :, cut:] for t in x)))
    apart = [{name: torch.cat([a[name], b[name]], 2) for name in NAMES} for a, b in zip(left, right, strict=True)]
    agree(run(layer, x), Results(*apart))


@on_every_layer
@few
@given(case=small, reverse=st.booleans(), t=st.integers(0, 33))
def test_a_scan_knows_nothing_of_what_it_has_not_met(layer, case, reverse, t):
    """Other tokens after token t change no bit of the results up to t; `reverse` makes "after" mean "before".

    With the fused layer their gates may change the rounding: its fast path measures the decays of a chunk from its
    middle, so that a gate between a token and the middle enters the token's result, and leaves it again.
    """
    x, other = (inputs(layer, Case(**vars(case) | {"seed": seed})) for seed in (case.seed, case.seed + 1))
    t = min(t, case.T - 1)
    met = slice(t, None) if reverse else slice(0, t + 1)

    def scan(inputs):
        tensors = [*inputs[:3], inputs.g_rev if reverse else inputs.g_fwd]
        return gla(*tensors, reverse=reverse, scale=SCALE, backend=layer)[:, :, met]

    def bound(inputs):
        """Of one scan: the other one's gates reset, it is twice the mean, less the token itself."""
        none = torch.full_like(inputs.g_fwd, -torch.inf)
        alone = inputs._replace(g_fwd=none) if reverse else inputs._replace(g_rev=none)
        return 2 * run(layer, alone).bound["o"][:, :, met]

    mixed = Inputs(*(new.clone() for new in other))
    for old, new in zip(x, mixed, strict=True):
        new[:, :, met] = old[:, :, met]
    assert torch.equal(scan(mixed._replace(g_fwd=x.g_fwd, g_rev=x.g_rev)), scan(x))
    if layer == "fused":
        assert ((scan(mixed) - scan(x)).abs() <= bound(mixed) + bound(x)).all()
    else:
        assert torch.equal(scan(mixed), scan(x))


@on_every_layer
@few
@given(case=small)
def test_gradients_of_a_product(layer, case):
    """o is linear in q, in k and in v: sum(q dq) = sum(k dk) = sum(v dv) = sum(o do), for each sequence."""
    x = inputs(layer, case)
    value, bound = run(layer, x)
    pairs = {"o": x.do, "dq": x.q, "dk": x.k, "dv": x.v}
    sums = {name: (t.double() * value[name]).sum((2, 3)) for name, t in pairs.items()}
    error = {name: (t.double().abs() * bound[name]).sum((2, 3)) for name, t in pairs.items()}
    for name in ("dq", "dk", "dv"):
        assert ((sums[name] - sums["o"]).abs() <= error[name] + error["o"]).all(), name


@on_every_layer
@few
@given(case=small)
def test_the_first_gate_of_a_scan_decays_nothing(layer, case):
    """There is no state yet: the gradient of this gate is 0, and not only nearly."""
    got = run(layer, inputs(layer, case)).value
    assert (got["dg_fwd"][:, :, 0] == 0).all()
    assert (got["dg_rev"][:, :, -1] == 0).all()


# --- a scan is a product in a monoid ---------------------------------------------------------------------------------


class Summary(NamedTuple):
    """What a stretch of tokens does to a state: S -> decay * S + state."""

    decay: Tensor
    state: Tensor

    def then(self, later: "Summary") -> "Summary":
        return Summary(later.decay * self.decay, later.decay * self.state + later.state)


def summary(layer: str, x: Inputs, reverse: bool) -> Summary:
    """Read off a layer: K more tokens that add nothing and forget nothing ask for one row of the state each.

    For gates of test_exact.dyadic, so that the decay is a power of two. A GPU's own exp may miss it by a bit.
    """
    _, H, _, K = x.q.shape
    nothing = x.q.new_zeros(1, H, K, K)
    rows = torch.eye(K, device=x.q.device).expand(1, H, K, K)
    g = x.g_rev if reverse else x.g_fwd
    tensors = [(torch.zeros_like(x.q), rows), (x.k, nothing), (x.v, x.v.new_zeros(1, H, K, x.v.shape[3])), (g, nothing)]
    joined = [torch.cat(pair[::-1] if reverse else pair, 2) for pair in tensors]
    o = gla(*joined, reverse=reverse, scale=1.0, backend=layer)
    decay = torch.exp2((g.sum(2) / math.log(2)).round().cpu()).to(g.device)
    return Summary(decay[..., None], o[:, :, :K] if reverse else o[:, :, -K:])


@on_every_layer
@few
@given(cuts=st.tuples(st.integers(0, 30), st.integers(0, 30)), seed=st.integers(0, 99), reverse=st.booleans())
def test_stretches_of_tokens_form_a_monoid(layer, cuts, seed, reverse):
    """Composition is associative and has an identity, the empty stretch. This is what allows chunks and parallel scans.

    On dyadic inputs, so exactly; and each product is what the layer gives for the joined stretch.
    """
    i, j = sorted(cuts)
    x = Inputs(*(t.to(device_of(layer)) for t in dyadic(30, 3, 4, seed)))
    parts = [Inputs(*(t[:, :, piece] for t in x)) for piece in (slice(0, i), slice(i, j), slice(j, 30))]
    a, b, c = (summary(layer, part, reverse) for part in (parts[::-1] if reverse else parts))
    whole = summary(layer, x, reverse)
    identity = Summary(torch.ones_like(a.decay), torch.zeros_like(a.state))
    for other in (a.then(b).then(c), a.then(b.then(c)), identity.then(whole), whole.then(identity)):
        assert all(map(torch.equal, other, whole))

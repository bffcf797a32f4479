"""The checks of `vig-ref verify`: what each layer must hold, in every arithmetic that it has.

A check is a function of a layer and an `Effort`. It returns an `Outcome`: a ratio that is at most 1 if all is well (for
what must hold to the last bit 0, else infinity), and in words what was found. All bounds are `vig_ref.tolerance`'s.

`python -m vig_ref.checks --device cpu` prints the fused layer's outcomes as lines of JSON; see `vig_ref.agreement`.
"""

import argparse
import functools
import itertools
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vig_ref import agreement
from vig_ref.agreement import ARITHMETICS, Layer, Measure, measure
from vig_ref.model import create_model
from vig_ref.tolerance import NAMES, REGIMES, Inputs, evaluate, nearest, reference

SCALE = 0.5  # a power of two: exact in every arithmetic
#: [T, K, V]. One token; a chunk and one token more; lengths off every chunk; K and V off every tile, then ViG-T's own.
SHAPES = [(1, 17, 3), (17, 17, 3), (49, 17, 3), (65, 32, 64), (130, 17, 3)]
DEEP_SHAPES = [(2, 1, 1), (16, 3, 5), (64, 8, 100), (63, 100, 17), (196, 32, 64), (197, 60, 70)]
#: For the fused layer on a GPU, which has the time. B, H, T, K, V.
SEGMENTS = (1, 1, 1000, 32, 64)  # one sequence, in several segments
#: Enough sequences for two programs each, with both heads; the second half ends inside a chunk. On an H200, with
#: bfloat16, halves are uneven in the backward pass.
HALVES = [(48, 4, 275, 32, 64), (96, 4, 275, 16, 32)]
LAW_SHAPE = (1, 1, 33, 17, 3)  # B, H, T, K, V: three chunks of the fused layer, the last of one token
#: Numbers of parameters of the released models.
PARAMETERS = {
    "vig_tiny": 5_834_536, "vig_small": 22_615_144, "vig_base": 89_022_184,
    "vig_h_tiny": 28_600_680, "vig_h_small": 50_051_688, "vig_h_base": 88_904_360,
}  # fmt: skip
LARGEST = sys.float_info.max  # JSON has no infinity


class Effort(NamedTuple):
    """How much a run does: `deep` or not, interpreted or on a GPU."""

    deep: bool = False
    quick: bool = False  # a few small cases of everything, for the tests of this command
    device: str = "cpu"

    def shapes(self, layer: Layer) -> list[tuple[int, int, int, int, int]]:
        """B, H, T, K, V."""
        short = SHAPES[:2] if self.quick else SHAPES + DEEP_SHAPES * self.deep
        return [(1, 1, *shape) for shape in short] + [SEGMENTS, *HALVES] * self.long(layer)

    def repeats(self, layer: Layer) -> int:
        """Runs that must agree to the last bit: where threads race, a rare difference needs many."""
        return (200 if self.compiled(layer) else 3) * (5 if self.deep else 1)

    def long(self, layer: Layer) -> bool:
        """Whether there is time for sequences that the fused layer cuts."""
        return self.compiled(layer) and not self.quick

    def compiled(self, layer: Layer) -> bool:
        """Whether it runs as kernels on a GPU, thousands of threads at once."""
        return layer.name == "fused" and self.device == "cuda"


class Outcome(NamedTuple):
    """What a check found. `tensors` are the measures of an agreement, for the record."""

    ratio: float
    says: str
    tensors: dict[str, Measure] | None = None


class Check(NamedTuple):
    """A check with its name, and what it is one of."""

    group: str
    name: str
    function: Callable[[Layer, Effort], Outcome]


# --- agreement with the oracle ---------------------------------------------------------------------------------------


def agree(layer: Layer, x: Inputs) -> dict[str, Measure]:
    """A layer against the oracle on one input."""
    return measure(layer, evaluate(layer.function, x, scale=SCALE), x, SCALE)


def worst_of(measures: Iterable[tuple[str, dict[str, Measure]]]) -> Outcome:
    """The worst of several agreements: for each tensor, and in words for all of them."""
    cases = dict(measures)
    tensors = {}
    for name in NAMES:
        found = [case[name] for case in cases.values()]
        tensors[name] = max(found, key=lambda m: m.ratio)._replace(rms=max(m.rms for m in found))
    label, name = max(itertools.product(cases, NAMES), key=lambda key: cases[key[0]][key[1]].worst)
    ratio = cases[label][name].worst
    return Outcome(ratio, f"{len(cases)} cases, worst {name} at {label}", tensors)


def regime(layer: Layer, effort: Effort, name: str) -> Outcome:
    """All shapes under one kind of gates."""
    cases = {f"B={B} H={H} T={T} K={K} V={V}": (B, H, T, K, V) for B, H, T, K, V in effort.shapes(layer)}
    return worst_of((label, agree(layer, layer.draw(*shape, regime=name))) for label, shape in cases.items())


def one_of_three(x: Tensor) -> Tensor:
    """A slice of a wider tensor with the heads last, as q, k, v of one projection are: no stride is a default one."""
    wide = torch.cat([x + 1, x, x - 1], dim=3).transpose(1, 2).contiguous().transpose(1, 2)
    return wide[..., x.shape[3] : 2 * x.shape[3]]


def every_second(x: Tensor) -> Tensor:
    """No stride is 1."""
    return x.repeat_interleave(2, dim=3)[..., ::2]


def expanded(x: Tensor) -> Tensor:
    """All strides 0 but the last: what `.sum().backward()` sends back."""
    return x[:1, :1, :1].expand_as(x)


def layouts(layer: Layer, effort: Effort) -> Outcome:
    """Tensors that are not contiguous; B, H, T, K, V are all different, so that no axis passes for another."""
    x = layer.draw(2, 3, 17, 5, 7)
    cases = {}
    for layout, gradient in ((one_of_three, expanded), (every_second, one_of_three)):
        y = Inputs(*map(layout, x))._replace(do=gradient(x.do))
        cases[f"{layout.__name__}, gradient {gradient.__name__}".replace("_", " ")] = agree(layer, y)
    return worst_of(cases.items())


def exact_integers(layer: Layer, effort: Effort) -> Outcome:
    """Inputs -1, 0, 1 and gates that keep all or forget all: nothing is rounded, so every bit must be the oracle's."""
    x = layer.draw(*LAW_SHAPE, regime="moderate")
    g_fwd, g_rev = (torch.where(g < -1, -torch.inf, 0.0).to(g) for g in (x.g_fwd, x.g_rev))
    q, k, v, do = (t.round().clamp(-1, 1) for t in (x.q, x.k, x.v, x.do))
    x = Inputs(q, k, v, g_fwd, g_rev, do)
    got, exact = evaluate(layer.function, x, scale=SCALE), reference(x, scale=SCALE)
    return bitwise({name: (got[name], exact[name].to(got[name].dtype)) for name in NAMES}, "the oracle's bits")


def bitwise(pairs: dict[str, tuple[Tensor, Tensor]], what: str) -> Outcome:
    """Equal to the last bit (but for the sign of 0), or failed."""
    wrong = [name for name, pair in pairs.items() if not torch.equal(*pair)]
    return Outcome(math.inf if wrong else 0.0, f"differ: {', '.join(wrong)}" if wrong else what)


# --- laws that need no oracle ----------------------------------------------------------------------------------------


class Result(NamedTuple):
    """Inputs, what a layer makes of them, and how far it may be off."""

    x: Inputs
    got: dict[str, Tensor]
    bound: dict[str, Tensor]


def result(layer: Layer, x: Inputs) -> Result:
    got = evaluate(layer.function, x, scale=SCALE)
    return Result(x, got, agreement.bounds(layer, x, reference(x, scale=SCALE), SCALE))


def law(pairs: dict[str, tuple[Tensor, Tensor, Tensor]], says: str) -> Outcome:
    """Pairs that must be equal within the third: the largest ratio."""
    ratios = {name: nearest(one.double(), other.double(), bound)[0] for name, (one, other, bound) in pairs.items()}
    name = max(ratios, key=ratios.__getitem__)
    return Outcome(ratios[name], f"{says}; worst {name}")


def law_inputs(layer: Layer, **options: Any) -> Inputs:
    return layer.draw(*LAW_SHAPE, regime="moderate", **options)


def flip(layer: Layer, effort: Effort) -> Outcome:
    """Time reversed and gates swapped: the result is reversed, and the gradients with it."""
    x = law_inputs(layer)
    q, k, v, g_fwd, g_rev, do = (t.flip(2) for t in x)
    one, other = result(layer, x), result(layer, Inputs(q, k, v, g_rev, g_fwd, do))
    swapped = dict(zip(NAMES, (*NAMES[:4], *NAMES[:3:-1]), strict=True))
    return law(
        {n: (one.got[n], other.got[m].flip(2), one.bound[n] + other.bound[m].flip(2)) for n, m in swapped.items()},
        "reversed input, reversed result",
    )


def closed_form(layer: Layer, x: Inputs, weights: Tensor, says: str) -> Outcome:
    """o = scale (weights * q k^T) v, and its gradients by autograd, where the gates leave only fixed `weights`."""
    q, k, v = (t.detach().double().requires_grad_() for t in x[:3])
    o = SCALE * (weights.to(q) * (q @ k.mT)) @ v
    expected = (o.detach(), *torch.autograd.grad(o, (q, k, v), x.do.double()))
    _, got, bound = result(layer, x)
    return law({n: (got[n], e, bound[n]) for n, e in zip(NAMES[:4], expected, strict=True)}, says)


def keep_all(layer: Layer, effort: Effort) -> Outcome:
    """Gates of 0: linear attention, half of each pair from each scan, and all of the diagonal."""
    x = law_inputs(layer)
    x = x._replace(g_fwd=torch.zeros_like(x.g_fwd), g_rev=torch.zeros_like(x.g_rev))
    T = x.q.shape[2]
    return closed_form(layer, x, (torch.ones(T, T) + torch.eye(T)) / 2, "(q k^T) v, the diagonal once, all else half")


def forget_all(layer: Layer, effort: Effort) -> Outcome:
    """Gates of -inf: each token sees itself alone."""
    x = law_inputs(layer)
    x = x._replace(g_fwd=torch.full_like(x.g_fwd, -torch.inf), g_rev=torch.full_like(x.g_rev, -torch.inf))
    return closed_form(layer, x, torch.eye(x.q.shape[2]), "scale (q . k) v")


def causal(layer: Layer, effort: Effort) -> Outcome:
    """One scan alone, the other's gates at -inf: what it has not met yet changes no bit."""
    x, other = law_inputs(layer), law_inputs(layer, seed=1)
    cut = 20  # inside a chunk
    pairs = {}
    for g, seen, unseen in (("g_rev", slice(cut), slice(cut, None)), ("g_fwd", slice(cut, None), slice(cut))):
        one = x._replace(**{g: torch.full_like(x.g_fwd, -torch.inf)})
        two = Inputs(*(t.clone() for t in one))
        for name in {"q", "k", "v", "g_fwd", "g_rev"} - {g}:
            getattr(two, name)[:, :, unseen] = getattr(other, name)[:, :, unseen]
        o, changed = (layer.function(*y[:5], scale=SCALE)[:, :, seen] for y in (one, two))
        pairs["fwd" if g == "g_rev" else "rev"] = (o, changed)
    return bitwise(pairs, "no bit depends on what a scan has not met")


def packing(layer: Layer, effort: Effort) -> Outcome:
    """A gate of -inf between two sequences: each comes out as if it were alone."""
    x, cut = law_inputs(layer), 20
    x.g_fwd[:, :, cut] = x.g_rev[:, :, cut - 1] = -torch.inf
    whole = result(layer, x)
    left, right = (result(layer, Inputs(*(t[:, :, part] for t in x))) for part in (slice(cut), slice(cut, None)))
    pairs = {}
    for name in NAMES:
        alone, bound = (torch.cat([a[name], b[name]], 2) for a, b in zip(left[1:], right[1:], strict=True))
        pairs[name] = (whole.got[name], alone, whole.bound[name] + bound)
    return law(pairs, "two sequences in one, as if alone")


def sums(layer: Layer, effort: Effort) -> Outcome:
    """o is linear in q, in k and in v: sum(q dq) = sum(k dk) = sum(v dv) = <o, do>."""
    x, got, bound = result(layer, law_inputs(layer))
    parts = {"dq": x.q, "dk": x.k, "dv": x.v, "o": x.do}
    total = {name: (got[name].double() * t.double()).sum() for name, t in parts.items()}
    allowed = {name: (bound[name] * t.double().abs()).sum() for name, t in parts.items()}
    return law(
        {name: (total[name], total["o"], allowed[name] + allowed["o"]) for name in ("dq", "dk", "dv")},
        "sum(q dq) = sum(k dk) = sum(v dv) = <o, do>",
    )


def first_gate(layer: Layer, effort: Effort) -> Outcome:
    """The first gate of a scan fades an empty state: its gradient is 0, not nearly 0."""
    got = evaluate(layer.function, law_inputs(layer), scale=SCALE)
    first = {"dg_fwd": got["dg_fwd"][:, :, 0], "dg_rev": got["dg_rev"][:, :, -1]}
    return bitwise({name: (g, torch.zeros_like(g)) for name, g in first.items()}, "exactly 0")


# --- memory, autograd, repeatability ---------------------------------------------------------------------------------


def repeatable(layer: Layer, effort: Effort) -> Outcome:
    """The same bits every time; on a GPU with many programs at once."""
    n = effort.repeats(layer)
    cases = [law_inputs(layer) if effort.device == "cpu" else layer.draw(8, 12, *SHAPES[-1])]
    if effort.long(layer):
        cases += [layer.draw(*sizes, regime=name) for sizes in HALVES for name in ("vig", "reset")]  # on both paths
    for x in cases:
        first = evaluate(layer.function, x, scale=SCALE)
        for _ in range(n):
            again = evaluate(layer.function, x, scale=SCALE)
            outcome = bitwise({name: (first[name], again[name]) for name in NAMES}, "")
            if outcome.ratio:
                return outcome
    return Outcome(0.0, f"{n * len(cases)} runs more, the same bits")


def framed(x: Tensor) -> Tensor:
    """The values of x in the middle of memory that is NaN on every side."""
    inside = (slice(1, -1),) * 4
    return x.new_full([size + 2 for size in x.shape], torch.nan)[inside].copy_(x)


def red_zones(layer: Layer, effort: Effort) -> Outcome:
    """Inputs lie inside NaN and fresh memory starts as NaN: what reads either is NaN. No input is written to."""
    x = Inputs(*map(framed, law_inputs(layer)))
    before = [t.clone() for t in x]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operations without a deterministic form; only the filling is wanted
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            got = evaluate(layer.function, x, scale=SCALE)
        finally:
            torch.use_deterministic_algorithms(False)
    outcome = worst_of([("NaN around", measure(layer, got, x, SCALE))])
    written = bitwise({name: (getattr(x, name), t) for name, t in zip(Inputs._fields, before, strict=True)}, "")
    return Outcome(max(outcome.ratio, written.ratio), written.says or "nothing read outside, nothing written to inputs")


def subsets(layer: Layer, effort: Effort) -> Outcome:
    """Every set of inputs that want a gradient gets those, the right ones, and no others."""
    x = layer.draw(1, 1, 5, 17, 3)
    _, got, bound = result(layer, x)
    worst, sizes = 0.0, (1, 5) if effort.quick else range(1, 6)
    sets = [s for n in sizes for s in itertools.combinations(range(5), n)]
    for wanted in sets:
        leaves = [t.clone().requires_grad_(n in wanted) for n, t in enumerate(x[:5])]
        layer.function(*leaves, scale=SCALE).backward(x.do)
        for n, (leaf, name) in enumerate(zip(leaves, NAMES[1:], strict=True)):
            if (leaf.grad is not None) != (n in wanted):
                return Outcome(math.inf, f"{name}: a gradient {'missing' if n in wanted else 'that nobody asked for'}")
            if leaf.grad is not None:
                worst = max(worst, nearest(leaf.grad, got[name].double(), 2 * bound[name])[0])
    return Outcome(worst, f"{len(sets)} subsets, each with its gradients and no others")


def self_check(layer: Layer, effort: Effort) -> Outcome:
    """Can this checker fail? Each tensor 1 % off, then with one NaN, must be refused, and only that tensor."""
    x = layer.draw(*LAW_SHAPE)
    right = evaluate(layer.function, x, scale=SCALE)
    tensors, least = {}, math.inf
    for name in NAMES:
        broken = right[name].clone()
        broken[0, 0, 1, 1] = torch.nan
        off = [measure(layer, right | {name: wrong}, x, SCALE) for wrong in (right[name] * 0.99, right[name] * 1.01)]
        nan = measure(layer, right | {name: broken}, x, SCALE)
        others = max(m.worst for found in (*off, nan) for other, m in found.items() if other != name)
        least = min(least, nan[name].worst, *(found[name].worst for found in off), math.inf if others <= 1 else 0)
        tensors[name] = off[0][name]
    return Outcome(1 / least if least else math.inf, f"1 % off is refused, {least:.2g} times over at least", tensors)


CHECKS = (
    *(Check("agreement", name, functools.partial(regime, name=name)) for name in REGIMES),
    Check("agreement", "layouts", layouts),
    Check("agreement", "exact integers", exact_integers),
    Check("law", "flip", flip),
    Check("law", "keep all", keep_all),
    Check("law", "forget all", forget_all),
    Check("law", "causal", causal),
    Check("law", "packing", packing),
    Check("law", "sums", sums),
    Check("law", "first gate", first_gate),
    Check("memory", "red zones", red_zones),
    Check("memory", "repeatable", repeatable),
    Check("autograd", "subsets", subsets),
    Check("checker", "self-check", self_check),
)


# --- running them ----------------------------------------------------------------------------------------------------


def run(layers: Iterable[Layer], effort: Effort) -> Iterator[dict[str, Any]]:
    """One row for every check of every layer, as soon as it is known."""
    for layer, check in itertools.product(layers, CHECKS):
        function = functools.partial(check.function, layer, effort)
        yield row(layer.name, layer.arithmetic, check.group, check.name, function)


def row(layer: str, arithmetic: str, group: str, name: str, function: Callable[[], Outcome]) -> dict[str, Any]:
    """The outcome as JSON has it. A check that raises has failed, and says so."""
    start = time.perf_counter()
    try:
        outcome = function()
    except Exception as error:
        outcome = Outcome(math.inf, f"{type(error).__name__}: {error}")
    tensors = {n: {k: finite(v) for k, v in m._asdict().items()} for n, m in (outcome.tensors or {}).items()}
    return {
        "layer": layer, "arithmetic": arithmetic, "group": group, "check": name,
        "passed": outcome.ratio <= 1, "ratio": finite(outcome.ratio), "says": outcome.says, "tensors": tensors,
        "seconds": round(time.perf_counter() - start, 3),
    }  # fmt: skip


def finite(x: float) -> float:
    """Infinity and NaN, neither of which passes, as the largest number."""
    return x if math.isfinite(x) else LARGEST


def parameter_counts() -> Iterator[dict[str, Any]]:
    """The presets against the released models; built without memory, in a moment."""
    for name in PARAMETERS:
        yield row("model", name, "model", "parameters", functools.partial(count, name))


def count(name: str) -> Outcome:
    with torch.device("meta"):
        n = sum(p.numel() for p in create_model(name).parameters())
    expected = PARAMETERS[name]
    return Outcome(0.0 if n == expected else math.inf, f"{n:,} parameters" + f", not {expected:,}" * (n != expected))


def main() -> None:
    """Print the fused layer's rows as lines of JSON."""
    parser = argparse.ArgumentParser(prog="python -m vig_ref.checks", description=main.__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arithmetics", nargs="+", default=list(ARITHMETICS))
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    effort = Effort(options.deep, options.quick, options.device)
    for line in run(agreement.layers("fused", options.device, options.arithmetics), effort):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

"""`vig-ref bench ops`: how long the operator takes, and how much memory, beside what else one could use.

Compared are the layers of this project; `sdpa`, PyTorch's softmax attention with H heads of V channels, which is what a
DeiT of the same width runs; `fla`, the chunked kernels of flash-linear-attention where that is installed, given both
directions as one batch of twice the size; and `floor`, the time in which this device copies as many bytes as every
input and every result has together: nothing that reads its inputs from memory is faster.

q, k, v are bfloat16, log gates float32 of the kind that a ViG computes; all are laid out token by token as in a model.
Layers are compared with the oracle first; if one is wrong, nothing is timed. What the times mean, and the count of
bytes behind them (`vig-ref bench traffic`): docs/performance.md.
"""

import argparse
import functools
import gc
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vig_ref import agreement, bench_models, bench_report, machine, tolerance, traffic
from vig_ref.bench_report import IMPLS, PEER_PACKAGES, Report, Row, quartiles
from vig_ref.cli import make_folders, read_record, sizes
from vig_ref.tolerance import REGIMES, Inputs
from vig_ref.traffic import PASSES
from vig_ref.verify import write_json


class Shape(NamedTuple):
    """Sizes of the operator, by the name of the model and the image that they come from."""

    name: str
    B: int
    H: int
    T: int
    K: int = 32
    V: int = 64

    @property
    def tokens(self) -> int:
        """Tokens of all sequences: one for each image and head."""
        return self.B * self.H * self.T


#: T224 is ViG-T at 224x224; b1 is a batch of one; H-T s1 is the first stage of ViG-H-T.
GPU_SHAPES = [
    Shape("T224", 256, 3, 196), Shape("T512", 64, 3, 1024), Shape("T1024", 16, 3, 4096), Shape("T2048", 4, 3, 16384),
    Shape("T2048b1", 1, 3, 16384), Shape("H-T s1", 64, 3, 3136, 16, 32),
]  # fmt: skip
CPU_SHAPES = [Shape("T64b1", 1, 3, 16), Shape("T224b1", 1, 3, 196), Shape("T512b1", 1, 3, 1024)]
NAMED = {shape.name: shape for shape in GPU_SHAPES + CPU_SHAPES}
#: The naive layer launches some ten kernels a token; its backward pass keeps every state, and takes time T squared.
NAIVE_T, NAIVE_TOKENS = 1024, 200_000
#: Inputs of successive calls differ, until they are together this many bytes: a GPU's cache (50 MB) has none of them.
ROTATED = 200e6
#: Calls that are queued behind one pause of the GPU, so that they then run without waiting for the host; and the time
#: that the host may take for that, in seconds: a GPU queues about a thousand kernels, at some microseconds each.
QUEUED, QUEUING = 20, 0.004
#: Seconds that a row may take, within CALLS. The middle half of the calls is written down as the spread.
SECONDS = {"cpu": 0.5, "cuda": 0.3}
CALLS = {"cpu": (3, 50), "cuda": (5, 200)}
COPIED = {"cpu": 64e6, "cuda": 512e6}  # bytes that the copy reads, and writes
CLOCK = 2e9  # cycles in a second, or more; for the length of a pause
#: A peer is not held to our bounds; with an RMS error this many times our limit it is another function.
PEER = 10


# --- what is compared ------------------------------------------------------------------------------------------------


class Impl(NamedTuple):
    """One way to compute o from (q, k, v, g_fwd, g_rev). `layer` is None if it is not ours."""

    name: str
    function: Callable[..., Tensor]
    layer: agreement.Layer | None = None

    @property
    def leaves(self) -> int:
        """Inputs that have a gradient; softmax attention has no gates."""
        return 3 if self.name == "sdpa" else 5


def implementation(name: str, device: str) -> Impl:
    if name == "sdpa":
        return Impl(name, softmax_attention)
    if name == "fla":
        return Impl(name, flash_linear_attention)
    (layer,) = agreement.layers(name, device, ["bfloat16"])
    return Impl(name, layer.function, layer)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_rev: Tensor, *, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def flash_linear_attention(q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_rev: Tensor, *, scale: float) -> Tensor:
    """It scans in one direction, tokens before heads: the reversed sequences are further entries of the batch."""
    from fla.ops.gla import chunk_gla  # pyright: ignore[reportMissingImports]

    q, k, v, g_fwd, g_rev = (x.transpose(1, 2) for x in (q, k, v, g_fwd, g_rev))
    both = [torch.cat([x, y.flip(1)]) for x, y in ((q, q), (k, k), (v, v), (g_fwd, g_rev))]
    o_fwd, o_rev = chunk_gla(*both, scale=scale / 2)[0].chunk(2)
    return (o_fwd + o_rev.flip(1)).transpose(1, 2)


def why_not(name: str, shape: Shape, device: str) -> str | None:
    """Why an implementation is left out at a shape, or None."""
    if name == "naive" and (shape.T > NAIVE_T or shape.tokens > NAIVE_TOKENS):
        return "too many tokens for a loop over them"
    if name == "fla":
        return "needs a GPU" if device == "cpu" else None if has_fla() else "flash-linear-attention is not installed"
    if name != "fused":
        return None
    if not agreement.has_triton():
        return "Triton is not installed"
    if device == "cpu":
        return "the time of Triton's interpreter says nothing about a GPU"
    interpreted = agreement.fused_mode(device) == agreement.INTERPRETER
    return "TRITON_INTERPRET is set" if interpreted else None


def has_fla() -> bool:
    return importlib.util.find_spec("fla") is not None


def inputs(shape: Shape, device: str, sets: int = 1) -> list[Inputs]:
    """Seeded inputs that need gradients: `[B, H, T, D]`, in memory `[B, T, H, D]`."""
    r = torch.Generator(device).manual_seed(0)
    q, k, g_fwd, g_rev, v, do = (
        torch.randn(sets, shape.B, shape.T, shape.H, D, generator=r, device=device)
        for D in (shape.K,) * 4 + (shape.V,) * 2
    )
    q, k, v, do = (x.bfloat16() for x in (q, k, v, do))
    g_fwd, g_rev = (REGIMES["vig"](g) for g in (g_fwd, g_rev))
    columns = (x.transpose(2, 3).unbind() for x in (q, k, v, g_fwd, g_rev, do))
    found = [Inputs(*six) for six in zip(*columns, strict=True)]
    for x in found:
        for leaf in x[:5]:
            leaf.requires_grad_()
    return found


def rotated(shape: Shape, device: str) -> list[Inputs]:
    """Inputs for successive calls: see ROTATED."""
    bytes_a_set = traffic.BF16 * shape.tokens * (shape.K + shape.V) * 2
    return inputs(shape, device, min(math.ceil(ROTATED / bytes_a_set), CALLS["cuda"][1]) if device == "cuda" else 1)


# --- are they right? -------------------------------------------------------------------------------------------------


def check(shape: Shape, impl: Impl, device: str) -> Row:
    """A part of what a whole batch gave, the result and the gradients, against the oracle."""
    (x,) = inputs(shape, device)
    scale = shape.K**-0.5
    part, exact = oracle(shape, device)
    got = {name: part_of(t) for name, t in tolerance.evaluate(impl.function, x, scale=scale).items()}
    limit = tolerance.RMS_LIMIT["bfloat16"]
    ratios = list(tolerance.rms_ratios(got, exact, limit if impl.layer else PEER * limit).values())
    if impl.layer:
        bound = agreement.bounds(impl.layer, part, exact, scale)
        ratios += [tolerance.nearest(got[name], exact[name], bound[name])[0] for name in tolerance.NAMES]
    return {"shape": shape.name, "impl": impl.name, "passed": max(ratios) <= 1, "ratio": float(f"{max(ratios):.3g}")}


@functools.lru_cache(maxsize=1)
def oracle(shape: Shape, device: str) -> tuple[Inputs, dict[str, Tensor]]:
    """A part of the inputs, and what the naive layer makes of it in float64: a loop over all tokens, twice."""
    (x,) = inputs(shape, device)
    part = Inputs(*(part_of(t.detach()) for t in x))
    return part, tolerance.reference(part, scale=shape.K**-0.5)


def part_of(x: Tensor) -> Tensor:
    """The last image's first and last heads: `[1, 1 or 2, T, D]`."""
    return x[-1:, :: max(1, x.shape[1] - 1)]


# --- how long do they take? ------------------------------------------------------------------------------------------


def call(impl: Impl, backward: bool, scale: float) -> Callable[[Inputs], Any]:
    """One pass as a function of the inputs."""

    def forward_only(x: Inputs) -> Tensor:
        with torch.no_grad():
            return impl.function(*x[:5], scale=scale)

    def both(x: Inputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(impl.function(*x[:5], scale=scale), x[: impl.leaves], x.do)

    return both if backward else forward_only


def times(function: Callable[[Any], Any], sets: list, device: str) -> list[float]:
    """Milliseconds of single calls, after a warm-up, each with the next of the sets."""
    return (cuda_times if device == "cuda" else cpu_times)(function, sets)


def cpu_times(function: Callable[[Any], Any], sets: list) -> list[float]:
    function(sets[0])
    found: list[float] = []
    least, most = CALLS["cpu"]
    while len(found) < least or (len(found) < most and sum(found) < 1000 * SECONDS["cpu"]):
        start = time.perf_counter()
        function(sets[len(found) % len(sets)])
        found.append(1000 * (time.perf_counter() - start))
    return found


def cuda_times(function: Callable[[Any], Any], sets: list) -> list[float]:
    """The GPU first pauses until the host has queued a group of calls: what is measured is the GPU, not the host."""
    function(sets[-1])  # compiles, tunes, allocates
    torch.cuda.synchronize()
    start = time.perf_counter()
    function(sets[0])
    on_host = time.perf_counter() - start
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    least, most = CALLS["cuda"]
    calls = min(max(round(SECONDS["cuda"] / seconds), least), most)
    queued = min(QUEUED, max(1, int(QUEUING / on_host)))
    found = []
    for first in range(0, calls, queued):
        group = [sets[n % len(sets)] for n in range(first, min(first + queued, calls))]
        if first == 0:
            queued_times(function, group, on_host)  # so that memory for a whole group is there
        found += queued_times(function, group, on_host)
    return found


def queued_times(function: Callable[[Any], Any], group: list, on_host: float) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(group) + 1)]
    torch.cuda._sleep(int(CLOCK * min(0.001 + 1.5 * len(group) * on_host, 0.5)))
    kept = []  # else every call would write to the same memory, which the cache holds
    events[0].record()
    for x, event in zip(group, events[1:], strict=True):
        kept.append(function(x))
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def bandwidth(device: str) -> list[float]:
    """Bytes a millisecond, reads and writes together, of a copy that no cache holds: quartiles, ascending."""
    source = torch.zeros(int(COPIED[device]), dtype=torch.uint8, device=device)
    pair = (torch.empty_like(source), source)
    found = times(lambda x: x[0].copy_(x[1]), [pair], device)
    return sorted(2 * source.numel() / ms for ms in quartiles(found))


def row(shape: Shape, impl: str, which: str, ms: list[float], mib: float | None) -> Row:
    """`ms` are quartiles, ascending."""
    low, middle, high = (float(f"{x:.4g}") for x in ms)
    found = {"shape": shape.name, "impl": impl, "pass": which, "ms": middle, "ms_low": low, "ms_high": high, "mib": mib}
    return found | dict(zip("BHTKV", shape[1:], strict=True))


def measured(shape: Shape, impl: Impl, device: str) -> list[Row]:
    """Both passes of an implementation; softmax attention has queries and keys as wide as values."""
    shaped = shape._replace(K=shape.V) if impl.name == "sdpa" else shape
    sets = rotated(shaped, device)
    rows = []
    for which in PASSES:
        function = call(impl, which != "forward", shaped.K**-0.5)
        ms = quartiles(times(function, sets, device))
        mib = machine.mebibytes(functools.partial(function, sets[0]), device)
        rows.append(row(shape, impl.name, which, ms, mib))
    return rows


def floor(shape: Shape, speed: list[float]) -> list[Row]:
    """Every input and result once, at the speed of the copy."""
    count = {which: shape.tokens * n for which, n in traffic.floor(shape.K, shape.V).items()}
    return [row(shape, "floor", p, sorted(count[p] / b for b in speed), None) for p in PASSES]


# --- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=("ops", "limits", "models", "traffic"),
        help="time the operator, see what limits the fused layer, time whole models, or only count bytes",
    )  # fmt: skip
    timed = parser.add_argument_group("of ops, limits and models")
    timed.add_argument("--device", choices=("cuda", "cpu"), help=f"here the default is {default_device()}")
    timed.add_argument("--out", type=Path, help="folder for what is written (out/bench)")
    timed.add_argument("--record", type=Path, metavar="FILE", help="also write this JSON; of ops a picture, too")
    timed.add_argument("--report", type=Path, metavar="FILE", help="only print such a record as Markdown tables")
    names = ", ".join(NAMED)
    ops = parser.add_argument_group("of ops and limits")
    ops.add_argument("--shapes", nargs="+", type=parse_shape, metavar="SHAPE", help=f"B,H,T,K,V, or one of {names}")
    models = parser.add_argument_group("of models only")
    square = "PIXELS,BATCH, the side of square images and how many"
    models.add_argument("--images", nargs="+", type=bench_models.parse_case, metavar="SIZE", help=square)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_shape(text: str) -> Shape:
    if text in NAMED:
        return NAMED[text]
    return Shape(text, *sizes(text, 5, f"five sizes B,H,T,K,V or one of {', '.join(NAMED)}"))


def run(options: argparse.Namespace) -> int:
    """1 if a layer is wrong, else 0."""
    own = dict.fromkeys(("device", "out", "record", "report"), ("ops", "limits", "models"))
    own |= {"shapes": ("ops", "limits"), "images": ("models",)}
    for name, owners in own.items():
        if getattr(options, name) is not None and options.what not in owners:
            listed = " and ".join(owners).replace(" and ", ", ", len(owners) - 2)
            of = f"--{name} is an option of vig-ref bench {listed}"
            raise SystemExit(f"vig-ref bench {options.what}: {of}; leave it out")
    options.device = options.device or default_device()
    options.out = options.out or Path("out/bench")
    if options.what == "traffic":
        print(traffic.table())
        return 0
    if options.what == "models":
        return bench_models.run(options)
    if options.what == "limits":
        from vig_ref import bench_limits  # which times with the functions of this file

        return bench_limits.run(options)
    if options.report:
        found = read_record("vig-ref bench ops", options.report, "rows")
        print(bench_report.markdown(found, options.report.with_suffix(".png")))
        return 0
    machine.prepare("vig-ref bench", options.device)
    make_folders("vig-ref bench ops", options.out, options.record)
    if options.device == "cpu":
        print("On a CPU: small shapes, naive and chunked. This says nothing about a GPU.\n")
    found = bench(options)
    wrong = [c for c in found["checks"] if not c["passed"]]
    for c in wrong:
        print(f"FAILED: {c['impl']} at {c['shape']} is {c['ratio']:.3g} times its bound off", file=sys.stderr)
    if wrong:
        print("The speed of a wrong layer is not told, nor of others beside it: see vig-ref verify.", file=sys.stderr)
        return 1
    for path in bench_report.destinations(options, "ops.json"):
        write_json(found, path)
        bench_report.draw(found, path.with_suffix(".png"))
    print(bench_report.table(found))
    print(f"\nwritten: {options.out / 'ops.json'}, ops.png")
    return 0


def bench(options: argparse.Namespace) -> Report:
    """Check everything, then time everything; without `rows` if a check fails."""
    device = options.device
    shapes = options.shapes or (GPU_SHAPES if device == "cuda" else CPU_SHAPES)
    pairs = [(s, name) for s in shapes for name in IMPLS if name != "floor"]
    reasons = {pair: why_not(pair[1], pair[0], device) for pair in pairs}
    left_out = [missing(s, name, reason) for (s, name), reason in reasons.items() if reason]
    pairs = [(s, implementation(name, device)) for (s, name), reason in reasons.items() if not reason]
    circumstances = machine.circumstances(command(options), device, PEER_PACKAGES)
    result = {**circumstances, "left_out": left_out, "checks": [], "rows": []}
    for s, impl in progress("checking", [pair for pair in pairs if pair[1].name != "sdpa"]):
        found = attempt(left_out, s, impl, lambda s=s, impl=impl: check(s, impl, device))
        if found and impl.layer:
            result["checks"].append(found)
        elif found and not found["passed"]:
            left_out.append(missing(s, impl.name, f"its RMS error is {PEER * found['ratio']:.3g} times our limit"))
    if not all(c["passed"] for c in result["checks"]):
        return result
    speed = bandwidth(device)
    result["copy_gb_per_s"] = round(speed[1] / 1e6, 1)
    gone = {(m["shape"], m["impl"]) for m in left_out}
    for s, impl in progress("timing", [pair for pair in pairs if (pair[0].name, pair[1].name) not in gone]):
        result["rows"] += attempt(left_out, s, impl, lambda s=s, impl=impl: measured(s, impl, device)) or []
    result["rows"] += [r for s in shapes for r in floor(s, speed)]
    order = [s.name for s in shapes]
    result["rows"].sort(key=lambda r: (order.index(r["shape"]), PASSES.index(r["pass"]), IMPLS.index(r["impl"])))
    return result


def progress(what: str, pairs: list[tuple[Shape, Impl]]) -> Iterable[tuple[Shape, Impl]]:
    bar = tqdm(pairs, desc=what, unit="case", disable=None)
    for s, impl in bar:
        bar.set_postfix_str(f"{impl.name} at {s.name}")
        yield s, impl


def attempt(left_out: list[Row], s: Shape, impl: Impl, function: Callable[[], Any]) -> Any:
    """What the function returns, or None and a reason: the GPU's memory does not suffice, or a peer fails."""
    try:
        return function()
    except torch.OutOfMemoryError:
        left_out.append(missing(s, impl.name, "out of memory"))
    except Exception as error:
        if impl.layer:
            raise
        left_out.append(missing(s, impl.name, f"{type(error).__name__}: {error}".splitlines()[0]))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None


def missing(s: Shape, name: str, reason: str) -> Row:
    return {"shape": s.name, "impl": name, "reason": reason}


def command(options: argparse.Namespace) -> str:
    words = [f"vig-ref bench {options.what}", f"--device {options.device}"]
    if options.shapes:
        words += ["--shapes", *(f'"{s.name}"' if " " in s.name else s.name for s in options.shapes)]
    return " ".join(words)

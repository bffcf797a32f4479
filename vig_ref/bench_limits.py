"""`vig-ref bench limits`: does the fused layer wait for memory, or for its own arithmetic? On a GPU.

It times the shapes of `vig-ref bench ops` in four ways:

    as it is
    inputs in the L2 cache     the batch is one image seen many times, the same in every call
    loads and stores only      the same launches without the arithmetic of their walks: `vig_ref/bench_bare.py`
    both                       the second and the third at once

What "both" takes is neither waiting for inputs nor arithmetic of the walks, but launches, instructions that fetch and
store, results and states on their way to memory, and the kernels for states. Whether results are right is not asked
here: `vig-ref bench ops` and `vig-ref verify` do.
"""

import argparse
import contextlib
from typing import NamedTuple

from tqdm import tqdm

from vig_ref import bench, bench_report, machine
from vig_ref.bench import Shape
from vig_ref.bench_report import Report, Row, quartiles
from vig_ref.cli import make_folders, read_record
from vig_ref.tolerance import Inputs
from vig_ref.traffic import PASSES
from vig_ref.verify import write_json


class Way(NamedTuple):
    """One way to call the fused layer."""

    name: str
    from_memory: bool  # the inputs
    arithmetic: bool


WAYS = (
    Way("as it is", True, True), Way("inputs in the L2 cache", False, True), Way("loads and stores only", True, False),
    Way("both", False, False),
)  # fmt: skip


def one_image(x: Inputs) -> Inputs:
    """The first image of a batch, as often as there are images: a stride of 0."""
    return Inputs(*(t.detach()[:1].expand(t.shape).requires_grad_(t.requires_grad) for t in x))


def measured(shape: Shape, device: str) -> list[Row]:
    """Both passes, each in all ways."""
    from vig_ref.bench_bare import without_arithmetic  # needs Triton

    impl = bench.implementation("fused", device)
    sets = bench.rotated(shape, device)
    rows = []
    for which in PASSES:
        function = bench.call(impl, which != "forward", shape.K**-0.5)
        for way in WAYS:
            with contextlib.nullcontext() if way.arithmetic else without_arithmetic():
                ms = quartiles(bench.times(function, sets if way.from_memory else [one_image(sets[0])], device))
            rows.append(bench.row(shape, way.name, which, ms, None))
    return rows


def run(options: argparse.Namespace) -> int:
    if options.report:
        print(markdown(read_record("vig-ref bench limits", options.report, "rows")))
        return 0
    machine.prepare("vig-ref bench limits", options.device)
    shapes = options.shapes or bench.GPU_SHAPES
    if reason := bench.why_not("fused", shapes[0], options.device):
        advice = "; this needs an NVIDIA GPU" if options.device == "cpu" else ""
        raise SystemExit(f"vig-ref bench limits: {reason}{advice}")
    make_folders("vig-ref bench limits", options.out, options.record)
    found: Report = {**machine.circumstances(bench.command(options), options.device), "rows": []}
    for shape in tqdm(shapes, desc="timing", unit="shape", disable=None):
        found["rows"] += measured(shape, options.device)
    for path in bench_report.destinations(options, "limits.json"):
        write_json(found, path)
    print(markdown(found))
    print(f"\nwritten: {options.out / 'limits.json'}")
    return 0


def markdown(found: Report) -> str:
    """For the terminal and the documentation: a table a pass."""
    versions = [f"torch {found['versions']['torch']}", f"Triton {found['versions']['triton']}"]
    rows = ((f"{r['impl']}, {r['pass']} at {r['shape']}", r["ms_low"], r["ms"], r["ms_high"]) for r in found["rows"])
    first = f"{bench_report.circumstances(found, *versions)}. Medians. {bench_report.spread(rows, 'calls')}"
    columns = bench_report.medians(way.name for way in WAYS)
    return "\n".join([first, *bench_report.milliseconds(found, columns)])

"""`vig-ref verify`: what to run on your own machine and GPU before you trust the kernels.

Every layer, in every arithmetic that it has here, goes through the checks of `vig_ref.checks`. The result is a table, a
`report.json`, and `report.html`, a page to look at. What the checks mean: docs/verification.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vig_ref import agreement, checks, machine, report
from vig_ref.agreement import ARITHMETICS, AVAILABLE, LAYERS
from vig_ref.cli import make_folders, read_record

DTYPES = ("float64", "float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda runs the fused layer compiled")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype of q, k, v (default: all that a layer has)")
    parser.add_argument("--out", type=Path, default=Path("out/verify"), help="folder for what is written (out/verify)")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--deep", action="store_true", help="more shapes and repetitions; many minutes on a CPU")
    effort.add_argument("--quick", action="store_true", help="two small shapes: does it run? No ground for trust")
    parser.add_argument("--record", type=Path, metavar="FILE", help="also write the largest error / bound by kind")
    parser.add_argument("--report", type=Path, metavar="FILE", help="only print such a record as a Markdown table")


def run(options: argparse.Namespace) -> int:
    """1 if any check fails, else 0."""
    if options.report:
        print(report.markdown(read_record("vig-ref verify", options.report, "errors")))
        return 0
    machine.prepare("vig-ref verify", options.device)
    make_folders("vig-ref verify", options.out, options.record)
    result = verify(options)
    write_json(result, options.out / "report.json")
    (options.out / "report.html").write_text(report.page(result), encoding="utf-8")
    if options.record:
        write_json(report.record(result), options.record)
    print(report.table(result), end="\n\n")
    for failure in report.failures(result):
        print(f"FAILED: {failure}", file=sys.stderr)
    print(f"{report.verdict(result)}, in {result['seconds']:.0f} s; see {options.out / 'report.html'}")
    return 0 if result["passed"] else 1


def verify(options: argparse.Namespace) -> report.Report:
    """Run every check; the fused layer's in processes of their own, at the same time."""
    start = time.perf_counter()
    wanted = [getattr(torch, name) for name in ([options.dtype] if options.dtype else DTYPES)]
    arithmetics = [name for name, how in ARITHMETICS.items() if how.dtype in wanted]
    missing = left_out(options.device, arithmetics)
    fused = [] if "fused" in missing else fused_rows(options, arithmetics)
    layers = [layer for name in ("naive", "chunked") for layer in agreement.layers(name, options.device, arithmetics)]
    effort = checks.Effort(options.deep, options.quick, options.device)
    total = len(checks.PARAMETERS) + len(checks.CHECKS) * sum(
        a in arithmetics for name in LAYERS if name not in missing for a in AVAILABLE[name, options.device]
    )
    done = []
    with tqdm(desc="verifying", total=total, unit="check", disable=None) as progress:
        for rows in (checks.parameter_counts(), checks.run(layers, effort), *fused):
            try:
                for row in rows:
                    done.append(row)
                    progress.update()
            except RuntimeError as error:  # a process of the fused layer died
                missing["fused"] = str(error)
    return {
        "passed": len(done) == total and all(row["passed"] for row in done), "not_run": total - len(done),
        "missing": missing, "seconds": round(time.perf_counter() - start, 1), "rows": done,
        **machine.circumstances(command(options), options.device),
    }  # fmt: skip


def left_out(device: str, arithmetics: list[str]) -> dict[str, str]:
    """Layers that cannot run here, with the reason."""
    if not agreement.has_triton():
        return {"fused": agreement.NO_TRITON}
    if not set(arithmetics) & set(AVAILABLE["fused", device]):
        return {"fused": f"fused: not run, because on {device} it has {', '.join(AVAILABLE['fused', device])} only"}
    return {}


def fused_rows(options: argparse.Namespace, arithmetics: list[str]) -> list[Iterator[dict[str, Any]]]:
    """One process for each arithmetic, all at once: most of the time on a GPU goes into compiling kernels."""
    effort = ["--deep"] * options.deep + ["--quick"] * options.quick
    return [
        agreement.own_process("vig_ref.checks", [*effort, "--arithmetics", arithmetic], options.device)
        for arithmetic in AVAILABLE["fused", options.device]
        if arithmetic in arithmetics
    ]


def command(options: argparse.Namespace) -> str:
    words = ["vig-ref verify", f"--device {options.device}"] + [f"--dtype {options.dtype}"] * bool(options.dtype)
    return " ".join(words + ["--deep"] * options.deep + ["--quick"] * options.quick)


def write_json(data: Any, path: Path) -> None:
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")

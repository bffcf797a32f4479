"""`vig-ref bench models`: images a second of a whole ViG-T, beside the DeiT of its width and depth.

Both compute in bfloat16 autocast, as PyTorch runs them ("eager") and compiled into CUDA graphs ("compiled"):

    inference    logits, without gradients
    training     logits, cross entropy and the gradients of all parameters; no optimizer, which is the same for both

The clock is the host's, and runs until the GPU is done: what Python and the launches cost is in it. DeiT-T is timm's,
whose attention is `F.scaled_dot_product_attention`. Weights are random; the ViG is one that `wake` has initialised, so
that its global branch counts.

Before inference is timed, the ViG's logits are compared with those that another layer computes in float32. That is a
rough check: behind a norm it cannot see by which factor o is wrong. `vig-ref verify` and `vig-ref bench ops` can.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vig_ref import bench_report, machine
from vig_ref.bench_report import Report, Row
from vig_ref.cli import make_folders, read_record, sizes
from vig_ref.machine import import_timm
from vig_ref.model import VIG_TINY, ViG, create_model, wake
from vig_ref.verify import write_json

MODELS = ("ViG-T", "DeiT-T")
PASSES = ("inference", "training")
#: How a model is run; a CPU has no graphs to launch.
HOW = {"cuda": ("eager", "compiled"), "cpu": ("eager",)}
#: The layer that is compared with, another one than "auto".
REFERENCE = {"cuda": "chunked", "cpu": "naive"}
#: Rounds, and how long one takes at least, in seconds.
ROUNDS, SECONDS = 5, 0.2
#: Calls before the first one that counts: they compile, capture a graph, and replay it.
WARM_UP = 3
#: Error of the logits, relative to their root mean square. In bfloat16 the chunked layer has 0.4 to 0.5 % on images of
#: 64 to 512 pixels; without one direction it is 2 to 10 %, and without the operator 20 %.
LIMIT = 0.01


class Case(NamedTuple):
    """Pixels of a side of the square images, and how many there are."""

    pixels: int
    batch: int


#: On a GPU about as many pixels in each.
CASES = {"cuda": [Case(224, 256), Case(512, 64), Case(1024, 16), Case(2048, 4)], "cpu": [Case(64, 2)]}


class WrongLogits(Exception):
    pass


def build(name: str, pixels: int) -> nn.Module:
    """A seeded model for images of that size."""
    torch.manual_seed(0)
    if name == "DeiT-T":
        timm, _ = import_timm()
        return timm.create_model("deit_tiny_patch16_224", img_size=pixels)
    model = create_model("vig_tiny", img_size=pixels)
    wake(model)
    return model


def error(got: Tensor, model: ViG, images: Tensor) -> float:
    """Of the logits of the first and the last image."""
    backend, model.backend = model.backend, REFERENCE[images.device.type]
    exact = model(images[[0, -1]])
    model.backend = backend
    return ((got[[0, -1]].float() - exact).square().mean() / exact.square().mean()).sqrt().item()


def rates(function: Callable[[], Any], batch: int, device: str) -> list[float]:
    """Images a second, a number a round."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(WARM_UP)
    calls = math.ceil(SECONDS / seconds(1))
    return [calls * batch / seconds(calls) for _ in range(ROUNDS)]


def measured(case: Case, name: str, how: str, which: str, device: str) -> Row:
    """A row of the report. Memory is that of an eager call: a graph keeps its own from one call to the next."""
    model = build(name, case.pixels).to(device).train(which == "training")
    images = torch.randn(case.batch, 3, case.pixels, case.pixels, device=device)
    labels = torch.arange(case.batch, device=device) % 1000
    # This mode is the one with CUDA graphs.
    function: Any = model if how == "eager" else torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def inference() -> Tensor:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            return function(images)

    def training() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(function(images), labels)
        loss.backward()
        model.zero_grad(set_to_none=True)

    found: Row = {**case._asdict(), "model": name, "how": how, "pass": which}
    if which == "inference" and isinstance(model, ViG):
        got = [inference() for _ in range(WARM_UP)][-1]
        with torch.no_grad():
            off = error(got, model, images)
        if not off <= LIMIT:
            raise WrongLogits(f"{how} ViG-T at {case.pixels} pixels: an error of {off:.2g}, limit {LIMIT}")
        found["error"] = float(f"{off:.2g}")
    one_pass = inference if which == "inference" else training
    quartiles = bench_report.quartiles(rates(one_pass, case.batch, device))
    low, middle, high = (float(f"{x:.4g}") for x in quartiles)
    mib = machine.mebibytes(one_pass, device) if how == "eager" else None
    return found | {"images_per_s": middle, "low": low, "high": high, "mib": mib}


def run(options: argparse.Namespace) -> int:
    """1 if the logits of a ViG are wrong, else 0."""
    if options.report:
        print(markdown(read_record("vig-ref bench models", options.report, "rows")))
        return 0
    machine.prepare("vig-ref bench", options.device)
    make_folders("vig-ref bench models", options.out, options.record)
    if options.device == "cpu":
        print("On a CPU: small images, no compiler. This says nothing about a GPU.\n")
    found: Report = {**machine.circumstances(command(options), options.device, ("timm",)), "left_out": [], "rows": []}
    timm, reason = import_timm()
    if not timm:
        found["left_out"].append(f"DeiT-T: {reason}")
    names = MODELS if timm else MODELS[:1]
    cases = options.images or CASES[options.device]
    # Eager rows first: the host's time counts most there, and the compiler's helper processes would share it.
    todo = [(c, name, how, which) for how in HOW[options.device] for c in cases for which in PASSES for name in names]
    for case, name, how, which in tqdm(todo, desc="timing", unit="row", disable=None):
        try:
            found["rows"].append(measured(case, name, how, which, options.device))
        except WrongLogits as wrong:
            print(f"FAILED: {wrong}. The speed of a wrong model is not told: see vig-ref verify.", file=sys.stderr)
            return 1
        except Exception as failure:
            if name == "ViG-T" and not isinstance(failure, torch.OutOfMemoryError):
                raise
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
            found["left_out"].append(f"{name} at {case.pixels} pixels, {how} {which}: {reason}")
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    for path in bench_report.destinations(options, "models.json"):
        write_json(found, path)
    print(markdown(found))
    print(f"\nwritten: {options.out / 'models.json'}")
    return 0


def command(options: argparse.Namespace) -> str:
    words = ["vig-ref bench models", f"--device {options.device}"]
    if options.images:
        words += ["--images", *(f"{c.pixels},{c.batch}" for c in options.images)]
    return " ".join(words)


def markdown(found: Report) -> str:
    """For the terminal and the documentation: a table a pass, a line for each case and way to run it."""
    versions = [f"{name} {found['versions'][name]}" for name in ("torch", "triton", "timm")]
    rows = (
        (f"{r['model']} {r['pass']} at {r['pixels']}, {r['how']}", r["low"], r["images_per_s"], r["high"])
        for r in found["rows"]
    )
    first = f"{bench_report.circumstances(found, *versions)}. Medians of rounds."
    lines = [f"{first} {bench_report.spread(rows, 'rounds')}"]
    for which in PASSES:
        lines += ["", f"{which.capitalize()}, images a second, and MiB beyond the model and the images:", ""]
        lines += ["| pixels | batch | run | ViG-T | DeiT-T | ViG-T / DeiT-T | ViG-T, MiB | DeiT-T, MiB |"]
        lines += ["|" + "---|" * 8]
        table: dict[tuple, dict[str, Row]] = {}
        for r in found["rows"]:
            if r["pass"] == which:
                table.setdefault((r["pixels"], r["batch"], r["how"]), {})[r["model"]] = r
        for case, of in table.items():
            speeds, memory = ([of[m][what] if m in of else None for m in MODELS] for what in ("images_per_s", "mib"))
            ratio = of["ViG-T"]["images_per_s"] / of["DeiT-T"]["images_per_s"] if len(of) == len(MODELS) else None
            numbers = [*map(bench_report.number, speeds), bench_report.number(ratio, 2)]
            cells = [*case, *numbers, *map(bench_report.number, memory)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines + [line for reason in found["left_out"] for line in ("", f"Left out: {reason}.")])


def parse_case(text: str) -> Case:
    case = Case(*sizes(text, 2, "PIXELS,BATCH, such as 224,256"))
    if case.pixels % VIG_TINY.patch_size:
        expected = f"PIXELS that are a multiple of the patch size {VIG_TINY.patch_size}, such as 224,256"
        raise argparse.ArgumentTypeError(f"expected {expected}; got {text!r}")
    return case

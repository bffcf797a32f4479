"""Do the layers agree? Each one's result and five gradients against the float64 oracle, as a table.

The question is asked of one element at a time: |X - X64| / bound, with the bound of `vig_ref.tolerance`. A ratio of 1
or less is agreement as close as the arithmetic allows; in float32 a layer that is wrong by one percent has a ratio of
thousands. In reduced precision the second gate sees it: the RMS over a whole tensor, which counts here as well.

`python -m vig_ref.agreement --device cpu` prints the fused layer's rows as lines of JSON: a Triton kernel is either
interpreted or compiled for the whole life of a process, so that this layer gets a process of its own.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from vig_ref import tolerance
from vig_ref.tolerance import NAMES, REGIMES

LAYERS = ("naive", "chunked", "fused")
INTERPRETER = "Triton interpreter"
#: Small enough for Triton's interpreter, and awkward: T is no multiple of any chunk, K is not V, K is under one tile.
SHAPE = {"B": 1, "H": 2, "T": 49, "K": 8, "V": 16}
SCALE = SHAPE["K"] ** -0.5
NO_TRITON = (
    "fused: not run, because Triton is not installed. It is published for Linux only (pip install 'triton>=3.6');\n"
    "the other layers compute the same function."
)


class Arithmetic(NamedTuple):
    """What a layer computes with: the dtype of q, k, v, the rounding of its products, and how to ask for it."""

    dtype: torch.dtype
    dot: str = "ieee"  # a key of tolerance.DOT_UNIT
    options: dict[str, Any] = {}  # noqa: RUF012  (never written to)


ARITHMETICS = {
    "float64": Arithmetic(torch.float64),
    "float32": Arithmetic(torch.float32),
    "float32 with tf32 products": Arithmetic(torch.float32, "tf32", {"precision": "tf32"}),
    "float16": Arithmetic(torch.float16, "float16"),
    "bfloat16": Arithmetic(torch.bfloat16, "bfloat16"),
}
PLAIN = ("float64", "float32", "float16", "bfloat16")
#: What each layer has. The interpreter does not imitate reduced precision; the tensor cores' float64 is not used.
AVAILABLE = {
    ("naive", "cpu"): PLAIN, ("naive", "cuda"): PLAIN, ("chunked", "cpu"): PLAIN, ("chunked", "cuda"): PLAIN,
    ("fused", "cpu"): ("float64", "float32"),
    ("fused", "cuda"): ("float32", "float32 with tf32 products", "float16", "bfloat16"),
}  # fmt: skip


class Layer(NamedTuple):
    """One implementation of the operator in one arithmetic, on one device."""

    name: str
    arithmetic: str  # a key of ARITHMETICS
    device: str
    function: Callable[..., Tensor]
    chunk: int  # see tolerance.bounds

    @property
    def dtype(self) -> torch.dtype:
        return ARITHMETICS[self.arithmetic].dtype

    def draw(self, *sizes: int, **options: Any) -> tolerance.Inputs:
        """`tolerance.draw` for this layer; the gates of half precision inputs are float32, as a ViG has them."""
        gate_dtype = torch.promote_types(self.dtype, torch.float32)
        return tolerance.draw(*sizes, dtype=self.dtype, gate_dtype=gate_dtype, device=self.device, **options)


class Measure(NamedTuple):
    """How near one tensor of a result comes to its bound, at the element that comes nearest, and as a whole."""

    ratio: float  # error / bound: at most 1 passes, infinite if anything is NaN
    error: float
    bound: float
    rms: float  # error / limit in the root mean square: at most 1 passes

    @property
    def worst(self) -> float:
        return max(self.ratio, self.rms)


def layers(name: str, device: str, arithmetics: Iterable[str] = tuple(ARITHMETICS)) -> list[Layer]:
    """The layer called `name` in those of the arithmetics that it has on `device`."""
    module = importlib.import_module(f"vig_ref.{name}")
    chunk = {"naive": 1, "chunked": 64}.get(name) or module.CHUNK
    return [
        Layer(name, a, device, functools.partial(module.bidirectional_gla, **ARITHMETICS[a].options), chunk)
        for a in AVAILABLE[name, device]
        if a in arithmetics
    ]


def bounds(layer: Layer, x: tolerance.Inputs, exact: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """`tolerance.bounds` for a layer."""
    return tolerance.bounds(x, exact, scale=scale, chunk=layer.chunk, dot=ARITHMETICS[layer.arithmetic].dot)


def measure(layer: Layer, got: dict[str, Tensor], x: tolerance.Inputs, scale: float) -> dict[str, Measure]:
    """A result and its gradients against the oracle, by name, under both gates of `vig_ref.tolerance`."""
    exact = tolerance.reference(x, scale=scale)
    bound = bounds(layer, x, exact, scale)
    kind = tolerance.rms_kind(x, ARITHMETICS[layer.arithmetic].dot)
    rms = tolerance.rms_ratios(got, exact, tolerance.RMS_LIMIT[kind])
    return {name: Measure(*tolerance.nearest(got[name], exact[name], bound[name]), rms[name]) for name in NAMES}


def compare(layer: Layer) -> list[dict[str, Any]]:
    """One row for each gate regime: the ratios by name, and the element that came nearest to its bound."""
    label = f"fused ({fused_mode(layer.device)})" if layer.name == "fused" else layer.name
    rows = []
    for regime in REGIMES:
        x = layer.draw(**SHAPE, regime=regime)
        measures = measure(layer, tolerance.evaluate(layer.function, x, scale=SCALE), x, SCALE)
        ratios = {name: m.ratio for name, m in measures.items()}
        worst = max(ratios, key=ratios.__getitem__)
        nearest = {"worst": worst, "error": measures[worst].error, "bound": measures[worst].bound}
        nearest["rms"] = max(m.rms for m in measures.values())
        rows.append({"layer": f"{label}, {layer.arithmetic}", "regime": regime, "ratios": ratios, **nearest})
    return rows


def fused_mode(device: str) -> str:
    """How this process runs the kernels: what Triton made of them, not what was asked for."""
    from vig_ref.fused.launch import INTERPRETED

    return INTERPRETER if INTERPRETED else f"compiled, {torch.cuda.get_device_name(device)}"


def own_process(module: str, arguments: list[str], device: str) -> Iterator[Any]:
    """Start `python -m module` in a process that interprets kernels on the CPU and compiles them for a GPU, and yield
    what it prints, lines of JSON. An exported TRITON_INTERPRET has no say in it.

    Raises:
        RuntimeError: the process failed; its error output is the text.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", module, *arguments, "--device", device]
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by _lines; a pipe that nobody reads would fill up)
    return _lines(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True), errors)


def _lines(process: subprocess.Popen, errors: IO[str]) -> Iterator[Any]:
    with process, errors:
        try:
            yield from map(json.loads, process.stdout or ())
            process.wait()
        finally:
            process.kill()  # where the reader left early
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"the fused layer could not be compared:\n{errors.read()}")


def has_triton() -> bool:
    """Whether Triton is installed; it is not imported, since that decides how this process runs kernels."""
    return importlib.util.find_spec("triton") is not None


def compare_fused(device: str) -> list[dict[str, Any]]:
    """`compare` for the fused layer, in a process of its own."""
    return list(own_process("vig_ref.agreement", [], device))


def compare_all(device: str = "cpu") -> dict[str, Any]:
    """Every layer that can run here: the rows, the layers left out with the reason, and the largest ratio of all."""
    plain = [layer for name in ("naive", "chunked") for layer in layers(name, device, ["float32"])]
    rows = [row for layer in plain for row in compare(layer)]
    missing = {}
    if has_triton():
        rows += compare_fused(device)
    else:
        missing["fused"] = NO_TRITON
    largest = max(max(row["rms"], *row["ratios"].values()) for row in rows)
    return {"shape": SHAPE, "agree": largest <= 1, "largest_ratio": largest, "missing": missing, "rows": rows}


def table(agreement: dict[str, Any]) -> str:
    """`compare_all` for the terminal, under 100 columns."""
    shape = " ".join(f"{name}={size}" for name, size in agreement["shape"].items())
    lines = [f"Agreement with the float64 oracle: largest |error| / bound, at most 1 ({shape})"]
    layer = None
    for row in agreement["rows"]:
        if row["layer"] != layer:
            layer = row["layer"]
            columns = "".join(f"{name:>8}" for name in NAMES)
            lines += ["", layer, f"  {'gates':<10}{columns}   nearest to its bound"]
        ratios = "".join(f"{row['ratios'][name]:8.2g}" for name in NAMES)
        sign = "<=" if max(row["ratios"].values()) <= 1 else "> "
        lines.append(f"  {row['regime']:<10}{ratios}   {row['worst']:<6} {row['error']:.1e} {sign} {row['bound']:.1e}")
    for reason in agreement["missing"].values():
        lines += ["", reason]
    verdict = "all agree" if agreement["agree"] else "THE LAYERS DISAGREE"
    return "\n".join([*lines, "", f"{verdict}: the largest ratio is {agreement['largest_ratio']:.2g}"])


def main() -> None:
    """Print the rows of the fused layer as lines of JSON; float64 is for `vig-ref verify`."""
    parser = argparse.ArgumentParser(prog="python -m vig_ref.agreement", description=main.__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    for layer in layers("fused", device, set(ARITHMETICS) - {"float64"}):
        for row in compare(layer):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

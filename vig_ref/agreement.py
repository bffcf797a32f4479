"""Do the layers agree? Each one's result and five gradients against the float64 oracle, as a table.

The question is asked of one element at a time: |X - X64| / bound, with the bound of `vig_ref.tolerance`. A ratio of 1
or less is agreement as close as the arithmetic allows; a layer that is wrong by one percent has a ratio of thousands.

`python -m vig_ref.agreement --layer fused --device cpu` prints one layer's rows as JSON: a Triton kernel is either
interpreted or compiled for the whole life of a process, so that the demo gives the fused layer a process of its own.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Layer(NamedTuple):
    """One implementation of the operator in one arithmetic."""

    name: str
    function: Callable[..., Tensor]
    chunk: int  # tokens under one running sum of gates; T for the naive layer
    dtype: torch.dtype = torch.float32
    dot: str = "ieee"  # arithmetic of the matrix products, a key of tolerance.DOT_UNIT


def compare(layer: Layer, device: str = "cpu") -> list[dict[str, Any]]:
    """One row for each gate regime: the ratios by name, and the element that came nearest to its bound."""
    rows = []
    for regime in REGIMES:
        x = tolerance.draw(**SHAPE, regime=regime, dtype=layer.dtype, gate_dtype=torch.float32, device=device)
        got = tolerance.evaluate(layer.function, x, scale=SCALE)
        ratios = tolerance.worst_ratios(got, x, scale=SCALE, chunk=layer.chunk, dot=layer.dot)
        rows.append({"layer": layer.name, "regime": regime, "ratios": ratios, **_nearest(got, x, layer, ratios)})
    return rows


def _nearest(got: dict[str, Tensor], x: tolerance.Inputs, layer: Layer, ratios: dict[str, float]) -> dict[str, Any]:
    """The worst result in plain numbers: its name, and the error and the bound where they are closest."""
    name = max(ratios, key=ratios.__getitem__)
    exact = tolerance.reference(x, scale=SCALE)
    bound = tolerance.bounds(x, exact, scale=SCALE, chunk=layer.chunk, dot=layer.dot)[name]
    error = (got[name].double() - exact[name]).abs()
    worst = torch.where(error == 0, 0.0, error / bound).argmax()
    return {"worst": name, "error": error.flatten()[worst].item(), "bound": bound.flatten()[worst].item()}


def layers(name: str, device: str) -> list[Layer]:
    """The layer called `name` in every arithmetic that it has on `device`; the label says how it is run."""
    function = importlib.import_module(f"vig_ref.{name}").bidirectional_gla
    if name == "naive":
        return [Layer("naive, float32", function, chunk=SHAPE["T"])]
    if name == "chunked":
        return [Layer("chunked, float32", function, chunk=64)]
    from vig_ref.fused import CHUNK

    label = f"fused ({fused_mode(device)})"
    variants = [Layer(f"{label}, float32", function, CHUNK)]
    if device != "cpu":  # the interpreter does not imitate reduced precision
        tf32 = functools.partial(function, precision="tf32")
        variants += [
            Layer(f"{label}, float32 with tf32 products", tf32, CHUNK, dot="tf32"),
            Layer(f"{label}, float16", function, CHUNK, torch.float16, "float16"),
            Layer(f"{label}, bfloat16", function, CHUNK, torch.bfloat16, "bfloat16"),
        ]
    return variants


def fused_mode(device: str) -> str:
    """How this process runs the kernels: what Triton made of them, not what was asked for."""
    from triton.runtime.interpreter import InterpretedFunction

    from vig_ref.fused import kernels

    if isinstance(kernels.forward_kernel, InterpretedFunction):
        return INTERPRETER
    return f"compiled, {torch.cuda.get_device_name(device)}"


def compare_fused(device: str) -> list[dict[str, Any]]:
    """`compare` for the fused layer, in a process that is told which of the two to be: interpreted on the CPU, compiled
    on a GPU. An exported TRITON_INTERPRET has no say in it.

    Raises:
        RuntimeError: the process failed; its error output is the text.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "vig_ref.agreement", "--layer", "fused", "--device", device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the fused layer could not be compared:\n{done.stderr}")
    return json.loads(done.stdout)


def has_triton() -> bool:
    """Whether Triton is installed; it is not imported, since that decides how this process runs kernels."""
    return importlib.util.find_spec("triton") is not None


def compare_all(device: str = "cpu") -> dict[str, Any]:
    """Every layer that can run here: the rows, the layers left out with the reason, and the largest ratio of all."""
    rows = [row for name in ("naive", "chunked") for layer in layers(name, device) for row in compare(layer, device)]
    missing = {}
    if has_triton():
        rows += compare_fused(device)
    else:
        missing["fused"] = NO_TRITON
    largest = max(max(row["ratios"].values()) for row in rows)
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


def main(argv: list[str] | None = None) -> None:
    """Print one layer's rows as JSON."""
    parser = argparse.ArgumentParser(prog="python -m vig_ref.agreement", description=main.__doc__)
    parser.add_argument("--layer", choices=LAYERS, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    variants = layers(options.layer, options.device)
    print(json.dumps([row for layer in variants for row in compare(layer, options.device)]))


if __name__ == "__main__":
    main()

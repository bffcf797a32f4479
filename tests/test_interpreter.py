"""Tests are fast for what they compute: neither Triton's interpreter nor Python's works in vain.

What `tests/interpreter.py` leaves out is not missed: the same bits as from Triton's interpreter as it is.
"""

import contextlib
import resource

import pytest
import torch
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as of_triton

import interpreter
from cases import interpreted
from vig_ref import fused
from vig_ref.fused import launch
from vig_ref.tolerance import NAMES, draw, evaluate


def evaluated(T, regime):
    return evaluate(fused.bidirectional_gla, draw(1, 1, T, 3, 33, regime=regime), scale=0.5)


@interpreted
@pytest.mark.parametrize("many", [1, 10**9], ids=["halves", "segments"])
@pytest.mark.parametrize("regime", ["vig", "reset"])
def test_bits_are_those_of_the_interpreter_as_it_is(regime, many, monkeypatch):
    """Every kernel, those for segments and halves among them, on its fast path and on the other."""
    monkeypatch.setattr(launch, "SEGMENT", 32)
    monkeypatch.setattr(launch, "MANY", many)
    hurried = evaluated(37, regime)
    monkeypatch.setattr(of_triton, "_patch_lang", interpreter._replace)
    monkeypatch.setattr(of_triton, "_get_np_dtype", interpreter._dtype)
    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", interpreter._fits)
    as_it_is = evaluated(37, regime)
    assert all(torch.equal(hurried[name], as_it_is[name]) for name in NAMES)


@interpreted
def test_the_language_is_replaced_once_a_launch_and_put_back(monkeypatch):
    evaluated(17, "vig")  # Triton leaves its own library's view of the language replaced after the first use
    replaced, replace = [], interpreter._replace
    monkeypatch.setattr(interpreter, "_replace", lambda kernel: replaced.append(kernel.__name__) or replace(kernel))
    evaluated(17, "vig")
    assert replaced == ["forward_kernel", "backward_kernel", "backward_kernel"]
    assert tl.core.is_builtin(tl.load)


@triton.jit
def arithmetic_kernel(x, y, z, OPERATION: tl.constexpr):
    i = tl.arange(0, 4)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(z + i, a + b if OPERATION == "add" else a - b if OPERATION == "sub" else a * b)


@interpreted
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    ("operation", "a", "b", "fits"),
    [
        ("add", 2**31 - 2, 1, True),
        ("add", 2**31 - 1, 1, False),
        ("add", -(2**31), -1, False),
        ("sub", -(2**31) + 1, 1, True),
        ("sub", -(2**31), 1, False),
        ("mul", 2**16, -(2**15), True),
        ("mul", 2**16, 2**15, False),
        ("mul", 2**31 - 1, 2**31 - 1, False),
    ],
)
def test_integers_that_do_not_fit_are_refused(operation, a, b, fits, place):
    """In no test of the kernels does an offset leave its 32 bits."""
    x, y = torch.zeros(2, 4, dtype=torch.int32)
    x[place], y[place] = a, b
    z = torch.empty_like(x)
    with contextlib.nullcontext() if fits else pytest.raises(of_triton.InterpreterError, match="OverflowError"):
        arithmetic_kernel[1,](x, y, z, operation)
        assert z[place] == {"add": a + b, "sub": a - b, "mul": a * b}[operation]


@interpreted
def test_dtypes_are_those_of_the_interpreter():
    scalars = [getattr(tl, name) for name in ("int1", "int8", "uint16", "int32", "int64", "bfloat16", "float32")]
    pointers = [tl.pointer_type(scalar) for scalar in scalars]
    for dtype in (*scalars, *pointers, *(tl.block_type(element, [2, 4]) for element in (*scalars, *pointers))):
        assert of_triton._get_np_dtype(dtype) == interpreter._dtype(dtype), dtype


def test_a_loop_of_calls_maps_no_memory():
    """At any depth: tests/conftest.py has made room for the frames."""

    def faults(depth):
        if depth:
            return faults(depth - 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(1000):
            large_frame()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def large_frame():
        return [], [], [], [], [], [], [], [], [], [], [], [], [], [], [], []

    assert max(map(faults, range(200))) < 500

"""Tests are fast for what they compute: neither Triton's interpreter nor Python's does things again and again.

What `tests/interpreter.py` leaves out is not missed: the same bits as from Triton's interpreter as it is.
"""

import resource

import pytest
import torch
import triton.language as tl
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

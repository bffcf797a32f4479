"""Triton's interpreter without work that it does in vain; results, and how they are computed, stay Triton's.

- A launch in the interpreter replaces the functions of `triton.language` by its own and puts the old ones back behind
  it. Each call of a function inside a kernel replaces them once more, though they are replaced: it searches the
  language for functions that are left, some hundreds of times for a program of four chunks, and finds none. That is a
  third to a half of the time of an interpreted kernel. Here that search is left out.
- Each integer sum, difference and product of two numbers or blocks is computed once more in 64 bits, as if by a kernel,
  to see whether it fits: two fifths of the time that is left. The interpreter then never looks at what was seen. Here
  numpy computes it, and what does not fit is refused.
- A table from Triton's dtypes to numpy's is made anew each time that one is looked up.
"""

import functools
import inspect

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as of_triton

_replace = of_triton._patch_lang
_fits = TritonSemantic.binary_op_sanitize_overflow_impl
_dtype = of_triton._get_np_dtype
_of_scalar = functools.cache(_dtype)
#: The methods of `TritonSemantic` that ask for the check.
ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@functools.cache
def _languages(function):
    """The modules of the language that a function sees."""
    return [x for x in function.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]


def _replace_what_is_left(function):
    """As Triton's, if it has anything to do: a function of the language that is not replaced is marked as built in."""
    languages = _languages(function)
    if not languages or any(tl.core.is_builtin(language.load) for language in languages):
        return _replace(function)
    return None  # a call inside a kernel drops it; a launch always has something to do


def _fits_by_numpy(_, lhs, rhs, operation):
    """Of integers below 64 bits."""
    kind = lhs.type.scalar
    if kind.int_bitwidth < 64:
        exact = ARITHMETIC[operation.__name__](*(x.handle.data.astype(np.int64) for x in (lhs, rhs)))
        if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
            raise OverflowError(f"{kind}, {operation.__name__}: a result has more bits")


def _dtype_from_table(dtype):
    """A block has the dtype of its elements. Pointers are all alike, and cannot be looked up."""
    scalar = dtype.scalar
    return _dtype(scalar) if scalar.is_ptr() else _of_scalar(scalar)


def hurry():
    """From now on in this process, which must interpret kernels and compile none."""
    of_triton._patch_lang = _replace_what_is_left
    of_triton._get_np_dtype = _dtype_from_table
    TritonSemantic.binary_op_sanitize_overflow_impl = _fits_by_numpy

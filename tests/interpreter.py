"""Triton's interpreter without work that it does again and again.

A launch in the interpreter replaces the functions of `triton.language` by its own and puts the old ones back behind it.
Each call of a function inside a kernel replaces them once more, though they are replaced: it searches the language for
functions that are left, some hundreds of times for a program of four chunks, and finds none. That is a third to a half
of the time of an interpreted kernel. Here that search is left out; what is computed, and how, stays Triton's.
"""

import functools
import inspect

import triton.language as tl
from triton.runtime import interpreter as of_triton

_replace = of_triton._patch_lang


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


def hurry():
    """From now on in this process."""
    of_triton._patch_lang = _replace_what_is_left

"""`check(answer)`: says whether an exercise of the tutorials is solved and, if not, what is wrong.

A chapter's checkers are in `chNN.py`. A checker has the name of the function that the reader writes, takes that
function, and raises `NotYet` with a sentence if something is not right:

    @exercise
    def half_life(answer):
        expect(answer(-0.1), 6.93, "half_life(-0.1)", rtol=1e-2, likely={"divide log(2) by the gate.": math.log(2)})

Beside it stand answers that look right and are not. The tests hold that each is refused, with these words:

    @wrong(half_life, "forgets the gate", says="divided")
    def _(g):
        return math.log(2)
"""

import importlib
import pkgutil
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vig_ref.agreement import has_triton

Answer = Callable[..., Any]


class NotYet(Exception):
    """An answer is not right; the message says in what."""


class Wrong(NamedTuple):
    """A wrong answer to an exercise, the mistake in words, and a pattern that the checker's message must hold."""

    answer: Answer
    mistake: str
    says: str


#: The layers that can run here.
LAYERS = ("naive", "chunked", *(["fused"] if has_triton() else []))
CHECKERS: dict[str, Callable[[Answer], None]] = {}
WRONG: dict[str, list[Wrong]] = {}


class Verdict:
    """Truthy if the answer is right; `message` is what `check` printed."""

    def __init__(self, right: bool, message: str):
        self.right, self.message = right, message

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"Verdict({self.right}, {self.message!r})"

    def _ipython_display_(self) -> None:
        """Nothing: `check` has printed the message already."""


def exercise(checker: Callable[[Answer], None]) -> Callable[[Answer], None]:
    """Registers a checker under its own name."""
    CHECKERS[checker.__name__] = checker
    return checker


def wrong(checker: Callable[[Answer], None], mistake: str, says: str = "") -> Callable[[Answer], Answer]:
    """Registers a wrong answer to that exercise; `says` is a regular expression for the message it must get."""

    def register(answer: Answer) -> Answer:
        WRONG.setdefault(checker.__name__, []).append(Wrong(answer, mistake, says))
        return answer

    return register


def find(name: str) -> Callable[[Answer], None]:
    """The checker with that name; a chapter's checkers are imported when they are looked for."""
    for module in pkgutil.iter_modules(__path__):
        if name in CHECKERS:
            break
        importlib.import_module(f"{__name__}.{module.name}")
    if name not in CHECKERS:
        raise LookupError(f"no exercise is called {name!r}; there are {', '.join(sorted(CHECKERS))}")
    return CHECKERS[name]


def check(answer: Answer) -> Verdict:
    """Prints and returns whether the answer is right; it never raises because of a wrong answer."""
    verdict = judge(answer, answer.__name__)
    print(f"Right: {verdict.message}" if verdict else f"Not yet: {verdict.message}")
    return verdict


def judge(answer: Answer, name: str) -> Verdict:
    def called(*args: Any, **kwargs: Any) -> Any:
        result = answer(*args, **kwargs)
        if result is None:
            raise NotYet(f"{name} returns None. Write your answer in place of `...`, and end it with `return`.")
        return result

    checker = find(name)
    try:
        checker(called)
    except NotYet as error:
        return Verdict(False, str(error))
    except AssertionError as error:
        return Verdict(False, str(error) or f"{name} fails: {traceback.extract_tb(error.__traceback__)[-1].line}")
    except Exception as error:  # whatever a reader's code may raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(False, f"{name} raised {type(error).__name__}: {error}  (at `{last.line}`)")
    return Verdict(True, f"{name} does what was asked.")


def expect(
    got: Any, want: Any, name: str, *, rtol: float = 1e-5, atol: float = 1e-8, likely: dict[str, Any] | None = None
) -> None:
    """Raises `NotYet` unless `got` is close to `want`: first the type, then the shape, then the largest difference.

    Args:
        got: what the answer returned, a number or a tensor.
        want: what is right.
        name: what `got` is, for the message: "S after token 3", "half_life(-0.1)".
        likely: sentences about mistakes, each with the value that the mistake leads to.
    """
    try:
        mine = torch.as_tensor(got).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(f"{name}: expected a number or a tensor, got {type(got).__name__}.") from None
    right = torch.as_tensor(want).detach().double()
    if mine.shape != right.shape:
        raise NotYet(f"{name}: expected the shape {list(right.shape)}, got {list(mine.shape)}.")
    if torch.allclose(mine, right, rtol=rtol, atol=atol, equal_nan=True):
        return
    for sentence, value in (likely or {}).items():
        value = torch.as_tensor(value).detach().double()
        if value.shape == mine.shape and torch.allclose(mine, value, rtol=rtol, atol=atol, equal_nan=True):
            raise NotYet(f"{name}: {sentence}")
    raise NotYet(f"{name}: {difference(mine, right)}")


def difference(mine: torch.Tensor, right: torch.Tensor) -> str:
    """Where two tensors of one shape differ most, and a guess at what kind of difference it is."""
    if mine.dim() == 0:
        return f"expected {right.item():.6g}, got {mine.item():.6g}."
    error = (mine - right).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    index = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    at = tuple(index)
    text = f"at index {index} expected {right[at].item():.6g}, got {mine[at].item():.6g}"
    if mine.isfinite().all():
        factor = (mine * right).sum() / right.square().sum()
        if factor and torch.allclose(mine, factor * right, rtol=1e-4):
            return f"{text}; all values are {factor.item():.4g} times what they should be."
        if mine.dim() >= 1 and torch.allclose(mine.flip(-2 if mine.dim() > 1 else -1), right, rtol=1e-4, atol=1e-8):
            return f"{text}; the values are right but in reversed order."
    return f"{text}; {int((error > 1e-8).sum())} of {error.numel()} values differ."


def registered() -> list[str]:
    """The names of all exercises, of every chapter that is there."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(CHECKERS)


__all__ = ["NotYet", "Verdict", "check", "exercise", "expect", "wrong"]

"""Set-up of all tests: the Triton interpreter where there is no GPU, one thread a worker, and Hypothesis' profiles."""

import functools
import os

import torch

# Triton decides at import whether a process interprets kernels or compiles them. Without a GPU it can but interpret.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import HealthCheck, Phase, settings
from torch._subclasses.fake_tensor import FakeTensor

import interpreter
from vig_ref import parts
from vig_ref.fused import launch

torch.set_num_threads(1)
if launch.INTERPRETED:
    interpreter.hurry()

COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fast", max_examples=5, **COMMON)
settings.register_profile("ci", max_examples=12, derandomize=True, **COMMON)
settings.register_profile("deep", max_examples=1000, **COMMON)
settings.load_profile("fast")  # what plain pytest runs; --hypothesis-profile overrides it
# For tests/mutants.py, which asks whether a bug is seen, not which example shows it best.
phases = (Phase.explicit, Phase.generate)
settings.register_profile("mutants", max_examples=3, derandomize=True, phases=phases, **COMMON)


FAILED_FILES = pytest.StashKey[set]()


def pytest_addoption(parser):
    parser.addoption("--one-failure-a-file", action="store_true", help="after a failure, skip the rest of that file")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    refuse_unknown_skip(report)
    if report.failed:
        item.session.stash.setdefault(FAILED_FILES, set()).add(item.path)
    return report


def pytest_runtest_setup(item):
    """For tests/mutants.py: which files see a bug is the question, not how often."""
    if item.config.getoption("--one-failure-a-file") and item.path in item.session.stash.get(FAILED_FILES, ()):
        pytest.skip("another test of this file has failed")


def with_room(function, /, **arguments):
    __tracebackhide__ = True
    return function(**arguments)


# Room for 2 ** 17 pointers, a megabyte, of which no byte is touched.
with_room.__code__ = with_room.__code__.replace(co_stacksize=2**17)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Calls a test from a frame so large that Python takes a new chunk of two megabytes for it and for what it calls.

    Python keeps frames in chunks of 16 kB, and gives a chunk back to the system when its first frame returns. Where a
    loop of many calls happens to begin at the end of a chunk, each call maps memory and unmaps it: in interpreted
    kernels below pytest and Hypothesis that was most of a test's time.
    """
    test = pyfuncitem.obj
    pyfuncitem.obj = functools.partial(with_room, test)
    try:
        return (yield)
    finally:
        pyfuncitem.obj = test


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


#: Why a test may be skipped: what a machine or an installation lacks, and nothing else.
ALLOWED_SKIPS = (
    "needs a CUDA GPU",
    "needs a machine without a GPU",
    "there is a GPU",
    "kernels are compiled for CUDA tensors here",
    "the compiled layer takes no float64",
    "needs the extra '",
    "needs chromium",
    "another test of this file has failed",
    "Triton before 3.7 cannot interpret loops",
)


def refuse_unknown_skip(report):
    """A skip for a reason that is not listed above, or for none, is a failure."""
    if report.skipped and not any(reason in report.longrepr[2] for reason in ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"{report.longrepr[2]!r} is not in ALLOWED_SKIPS of tests/conftest.py"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    refuse_unknown_skip(report)
    return report


@pytest.fixture(autouse=True)
def red_zones():
    """Under every test: what a kernel writes to starts as NaN and lies between canaries, which nothing may change."""
    canary, margin, memories = 12345.0, 4096, []  # a state of the largest tile fits in the margin

    def guarded(allocate):
        def allocate_between_canaries(*arguments):
            x = allocate(*arguments)
            if any(x is argument for argument in arguments):  # a share of o, in o: it is guarded already
                return x
            memory = x.new_full((x.numel() + 2 * margin,), canary)
            memory.narrow(0, margin, x.numel()).fill_(torch.nan)  # as fake tensors on a GPU that is not there can, too
            if not isinstance(memory, FakeTensor):
                memories.append(memory)
            return memory.as_strided(x.shape, x.stride(), margin)

        return allocate_between_canaries

    with pytest.MonkeyPatch.context() as patch:
        names = ("_empty", "_parts", "_states", "_share", "_entering", "_nothing", "_decays", "_meeting")
        for module, name in [*((launch, name) for name in names), (parts, "_empty")]:
            patch.setattr(module, name, guarded(getattr(module, name)))
        yield
    for memory in memories:
        assert (memory[:margin] == canary).all(), "a kernel wrote before the beginning of its result"
        assert (memory[-margin:] == canary).all(), "a kernel wrote behind the end of its result"

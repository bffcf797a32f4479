"""Set-up of all tests: the Triton interpreter where there is no GPU, one thread a worker, and Hypothesis' profiles."""

import os

import torch

# Triton decides at import whether a process interprets kernels or compiles them. Without a GPU it can but interpret.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)

COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fast", max_examples=5, **COMMON)
settings.register_profile("ci", max_examples=30, derandomize=True, **COMMON)
settings.register_profile("deep", max_examples=1000, **COMMON)
# For tests/mutants.py, which asks whether a bug is seen, not which example shows it best.
phases = (Phase.explicit, Phase.generate)
settings.register_profile("mutants", max_examples=3, derandomize=True, phases=phases, **COMMON)


FAILED_FILES = pytest.StashKey[set]()


def pytest_addoption(parser):
    parser.addoption("--one-failure-a-file", action="store_true", help="after a failure, skip the rest of that file")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.session.stash.setdefault(FAILED_FILES, set()).add(item.path)
    return report


def pytest_runtest_setup(item):
    """For tests/mutants.py: which files see a bug is the question, not how often."""
    if item.config.getoption("--one-failure-a-file") and item.path in item.session.stash.get(FAILED_FILES, ()):
        pytest.skip("another test of this file has failed")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))

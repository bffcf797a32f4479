"""Tests that are skipped say why, and the reasons are those of a list: a test must not disappear unnoticed."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ALLOWED_SKIPS

SKIPS = f"""
import pytest

def test_with_a_listed_reason(): pytest.skip({ALLOWED_SKIPS[0]!r})
def test_without_one(): pytest.skip()
@pytest.mark.skip(reason="I am tired")
def test_with_another(): pass
"""


def test_only_listed_reasons_are_accepted(tmp_path):
    """Seen from outside, in a run of its own: for a test and for a whole file."""
    (tmp_path / "test_some.py").write_text(SKIPS)
    (tmp_path / "test_whole_file.py").write_text("import pytest; pytest.importorskip('no_such_module')")
    for name in ("conftest.py", "interpreter.py"):
        (tmp_path / name).write_text(Path(__file__).with_name(name).read_text())
    command = [sys.executable, "-m", "pytest", "--continue-on-collection-errors", "-rA"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    for outcome in ("FAILED test_some.py::test_without_one", "ERROR test_some.py::test_with_another",
                    "ERROR test_whole_file.py", "1 failed, 1 skipped, 2 errors"):  # fmt: skip
        assert outcome in done.stdout, done.stdout
    assert "'Skipped: I am tired' is not in ALLOWED_SKIPS" in done.stdout

"""The page explorer.md shows what the naive layer computes: its data. The JavaScript that reads it: test_site.py."""

import base64
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vig_ref import naive

FOLDER = Path(__file__).parent.parent / "docs" / "explorer"
spec = importlib.util.spec_from_file_location("precompute", FOLDER / "precompute.py")
precompute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(precompute)
TAUS = ["0", "1", "2", "4", "8", "16", "32", "64", "∞"]


def committed():
    text = (FOLDER / "data.js").read_text()
    return json.loads(text.partition("const EXPLORER = ")[2].strip().removesuffix(";"))


def stored(setting):
    """A setting's weights and what a byte can be wrong by, `[T, T]` and `[T, 1]`."""
    scale = np.frombuffer(base64.b64decode(setting["scale"]), np.float32).astype(np.float64)[:, None]
    weights = np.frombuffer(base64.b64decode(setting["weights"]), np.int8).reshape(len(scale), -1)
    return weights * scale, scale


def by_the_naive_layer(tau):
    """A_fwd and A_rev, `[T, T]`: with v the identity, a scan's result is its matrix."""
    head = precompute.head(precompute.photograph())
    v = torch.eye(head.q.shape[2], dtype=torch.float64)[None, None]
    scans = zip(head.gates(tau), (False, True), strict=True)
    return [naive.gla(head.q, head.q, v, g, reverse=reverse, scale=0.5)[0, 0].numpy() for g, reverse in scans]


@pytest.mark.parametrize("name", TAUS)
def test_committed_weights_are_those_of_the_naive_layer(name):
    (setting,) = (s for s in committed()["settings"] if s["tau"] == name)
    A_fwd, A_rev = by_the_naive_layer(math.inf if name == "∞" else float(name))
    weights, step = stored(setting)
    assert (abs(weights - A_fwd - A_rev) <= 0.51 * step).all()  # half a step, and the rounding of the scale
    assert not np.triu(A_fwd, 1).any()
    assert not np.tril(A_rev, -1).any()
    np.testing.assert_allclose(np.diag(A_fwd), np.diag(A_rev))
    totals = np.frombuffer(base64.b64decode(setting["totals"]), np.float32).reshape(2, -1)
    others = [abs(A - np.diag(np.diag(A))).sum(1) for A in (A_fwd, A_rev)]
    np.testing.assert_allclose(totals, others, rtol=1e-6, atol=1e-6)


def test_what_the_page_says_of_the_head():
    """A token reads itself with weight 1 and others with 1/2 at most; mean gates as stored."""
    assert [s["tau"] for s in committed()["settings"]] == TAUS
    head = precompute.head(precompute.photograph())
    assert head.q.shape == (1, 1, 14 * 14, 27)
    for tau, setting in zip(precompute.TAUS, committed()["settings"], strict=True):
        weights, _ = stored(setting)
        np.testing.assert_allclose(np.diag(weights), 1, rtol=1e-6)
        assert abs(weights - np.diag(np.diag(weights))).max() <= 0.5
        assert setting["mean_alpha"] == pytest.approx(torch.cat(head.gates(tau)).exp().mean().item(), abs=1e-4)


def test_size():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 600_000

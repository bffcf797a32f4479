"""`vig-ref bench limits`: bare launches read and write what the fused layer's do, and every time is under its name."""

import functools
import json

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from cases import interpreted
from test_bench import shown_record
from vig_ref import bench, bench_limits, bidirectional_gla, cli
from vig_ref.bench import GPU_SHAPES, Shape
from vig_ref.bench_bare import without_arithmetic
from vig_ref.bench_limits import WAYS
from vig_ref.fused import launch
from vig_ref.tolerance import draw, evaluate
from vig_ref.traffic import PASSES

FUSED = functools.partial(bidirectional_gla, backend="fused")


def both_passes(x):
    return evaluate(FUSED, x, scale=0.5).values()


def requests(x, monkeypatch):
    """Of both passes: how often each byte address of an input is read, and how many numbers of other memory are read,
    and written."""
    read, written = [], [0]
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store

    def loading(self, pointers, mask, *rest):
        read.append(np.broadcast_to(pointers.data, mask.data.shape)[mask.data])
        return load(self, pointers, mask, *rest)

    def storing(self, pointers, value, mask, *rest):
        written[0] += int(mask.data.sum())
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", loading)
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_store", storing)
        both_passes(x)
    addresses = np.concatenate([np.ravel(a) for a in read])
    of_inputs = np.zeros_like(addresses, bool)
    for t in x:
        of_inputs |= (t.data_ptr() <= addresses) & (addresses < t.data_ptr() + t.nbytes)
    return *np.unique(addresses[of_inputs], return_counts=True), int((~of_inputs).sum()), written[0]


@interpreted
@pytest.mark.parametrize(
    ("segment", "many"), [(64, 1), (32, 1), (32, 10**9)], ids=["one piece", "halves", "segments"]
)
@pytest.mark.parametrize("sizes", [(5, 6), (16, 32), (32, 64)])
def test_bare_launches_read_and_write_what_the_fused_layer_does(sizes, segment, many, monkeypatch):
    monkeypatch.setattr(launch, "SEGMENT", segment)
    monkeypatch.setattr(launch, "MANY", many)
    x = draw(1, 2, 53, *sizes, regime="vig", dtype=torch.float32)
    addresses, times, others, written = requests(x, monkeypatch)
    with without_arithmetic():
        bare = requests(x, monkeypatch)
    assert np.array_equal(addresses, bare[0])
    assert np.array_equal(times, bare[1])
    assert (others, written) == bare[2:]
    assert len(addresses) == sum(t.numel() for t in x)


@interpreted
def test_without_arithmetic_ends_with_the_block():
    x = draw(1, 1, 20, 5, 6, regime="vig", dtype=torch.float32)
    right = both_passes(x)
    with without_arithmetic():
        bare = both_passes(x)
    assert all(t.isfinite().all() for t in bare)
    assert not any(torch.equal(a, b) for a, b in zip(right, bare, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(right, both_passes(x), strict=True))


def test_one_image_is_the_first_many_times():
    (x,) = bench.inputs(Shape("s", 3, 2, 17, 4, 8), "cpu")
    one = bench_limits.one_image(x)
    for t, image in zip(x, one, strict=True):
        assert torch.equal(image, t[:1].expand_as(t))
        assert image.stride(0) == 0
        assert image.is_leaf
        assert image.requires_grad == t.requires_grad


@interpreted
def test_which_way_is_which(tmp_path, monkeypatch, capsys):
    """A run whose clock says what it was given: 1 for several sets of inputs, 2 for the fused layer's own kernels, 4
    for gradients."""
    own = launch.kernels

    def times(function, sets, device):
        backward = isinstance(function(sets[0]), tuple)
        assert (sets[0].q.stride(0) == 0) == (len(sets) == 1)
        return [1.0 + (len(sets) == 2) + 2 * (launch.kernels is own) + 4 * backward] * 3

    monkeypatch.setattr(bench, "why_not", lambda *_: None)
    monkeypatch.setattr(bench, "implementation", lambda *_: bench.Impl("fused", FUSED))
    monkeypatch.setattr(bench, "rotated", lambda shape, device: bench.inputs(shape, device, 2))
    monkeypatch.setattr(bench, "times", times)
    record = tmp_path / "record.json"
    limits = ["bench", "limits", "--device", "cpu"]
    assert cli.main([*limits, "--shapes", "2,1,17,4,8", "--out", str(tmp_path / "out"), "--record", str(record)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(record.read_text())
    assert json.loads((tmp_path / "out" / "limits.json").read_text()) == report
    assert report["command"] == "vig-ref bench limits --device cpu --shapes 2,1,17,4,8"
    assert [(r["pass"], r["impl"], r["ms"]) for r in report["rows"]] == [
        (which, way.name, ms + 4 * (which != "forward"))
        for which in PASSES
        for way, ms in zip(WAYS, (4.0, 3.0, 2.0, 1.0), strict=True)
    ]
    forward, both = printed.split("Forward + backward, milliseconds:")
    assert "| 2,1,17,4,8 | 2, 1, 17, 4, 8 | 4.00 | 3.00 | 2.00 | 1.00 |" in forward
    assert "| 2,1,17,4,8 | 2, 1, 17, 4, 8 | 8.00 | 7.00 | 6.00 | 5.00 |" in both
    assert cli.main([*limits, "--report", str(record)]) == 0
    assert capsys.readouterr().out.strip() in printed


def test_a_cpu_is_refused():
    with pytest.raises(SystemExit, match=r"limits: the time of Triton's .* about a GPU; this needs an NVIDIA GPU"):
        cli.main(["bench", "limits", "--device", "cpu"])


def test_the_page_in_the_docs_shows_the_records():
    if record := shown_record("h200-limits.json", bench_limits.markdown):
        assert [s.name for s in GPU_SHAPES] == list(dict.fromkeys(r["shape"] for r in record["rows"]))
    shown_record("h200-lengths.json", bench_limits.markdown)


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path):
    assert cli.main(["bench", "limits", "--device", "cuda", "--shapes", "2,3,49,32,64", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "limits.json").read_text())["rows"]
    assert [(r["pass"], r["impl"]) for r in rows] == [(which, way.name) for which in PASSES for way in WAYS]

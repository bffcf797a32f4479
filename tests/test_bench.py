"""`vig-ref bench`: what it counts by hand, what it measures on a CPU, and that it tells no speed of a wrong layer."""

import json
import re
import statistics
import sys
import types
from pathlib import Path

import pytest
import torch

from vig_ref import bench, bench_report, chunked, cli, machine, naive, tolerance, traffic
from vig_ref.bench import GPU_SHAPES, NAMED, Shape
from vig_ref.fused import launch

DOCS = Path(__file__).parents[1] / "docs"
SHAPES = ["2,2,17,4,8", "1,2,40,4,8"]
PAGE = (DOCS / "performance.md").read_text()


@pytest.fixture(autouse=True, scope="module")
def hurry():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "SECONDS", {"cpu": 0.02, "cuda": 0.02})
        patch.setattr(bench, "COPIED", {"cpu": 1e6, "cuda": 64e6})
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One real run on the CPU: its folder and its report."""
    out = tmp_path_factory.mktemp("bench")
    assert ops("--shapes", *SHAPES, "--out", str(out / "out"), "--record", str(out / "made" / "record.json")) == 0
    return out, json.loads((out / "made" / "record.json").read_text())


def ops(*arguments):
    return cli.main(["bench", "ops", "--device", "cpu", *arguments])


# --- the count -------------------------------------------------------------------------------------------------------


def test_the_floor_by_hand():
    """q, k 64 B each, v 128, gates 128 each, o 128; backward the inputs again, do, and their gradients."""
    assert traffic.floor(32, 64) == {"forward": 640, "forward+backward": 640 + 512 + 128 + 512}
    assert traffic.floor(16, 32) == {"forward": 320, "forward+backward": 896}


def test_the_fused_layer_by_hand():
    share = 2 * 128  # of o, written by one scan and read by the other, both of which read q, k, v
    scan = 64 + 128 + 128  # what moves a state: k, v, g_rev; or q, do, g_fwd
    state = 2 * 32 * 64 * 2 / 16  # bfloat16, written and read for every chunk of 16 tokens
    forward, backward = 640 + 64 + 64 + 128 + share, 1152 + 2 * scan + 2 * state
    assert traffic.fused(32, 64, 196) == {"forward": forward, "forward+backward": forward + backward}
    meet = 2 * 2 * 32 * 64 * 4 / 1024  # float32, of both scans: written where programs meet, and read
    halves = {"forward": forward + meet, "forward+backward": forward + meet + backward + 2 * meet}
    assert traffic.fused(32, 64, 1024, sequences=launch.MANY) == halves
    assert traffic.fused(32, 64, 1024, sequences=launch.MANY - 1) == traffic.fused(32, 64, 1024) != halves
    states = 2 * 32 * 64 * 4 / 256  # float32, of both scans, of 256 tokens
    enter = scan + 128 + 4 * states  # both gates; what is added, and what enters, are written and read
    forward, backward = forward + enter, backward + enter + states  # S was kept: it is read again
    assert traffic.fused(32, 64, 1024) == {"forward": forward, "forward+backward": forward + backward}


def test_the_naive_layer_by_hand():
    """Forward, K = 32, V = 64, a direction and token: what each operation reads, then what it writes."""
    S, alpha, q, k, o = 8192, 128, 64, 64, 128
    gate = alpha + alpha  # exp
    fade, pair, add = alpha + S + S, k + o + S // 2, S + S // 2 + S
    read = (S + S // 2) + (q + S // 2 + o)  # S in bfloat16, then q S
    collect = (o + o) + (o + o)  # cat, scale
    mean = (o + o + o) + (o + o)  # both directions
    T = 49
    expected = 2 * (gate + fade + pair + add + read + collect) + mean + 2 * S / T  # the last: zeros to begin with
    assert traffic.eager(naive.bidirectional_gla, 32, 64, T)["forward"] == int(expected)


def test_views_and_shapes_cost_nothing_and_expanded_tensors_little():
    x = torch.empty(4, 8, device="meta")
    with traffic.Requests() as requests:
        torch.empty_like(x.transpose(0, 1)[2:].reshape(24))
    assert requests.bytes == 4 * 24 + 4 * 24 + 4 * 24  # reshape copies, empty_like writes
    with traffic.Requests() as requests:
        x.add_(x[:1].expand(4, 8))
    assert requests.bytes == 4 * (32 + 8 + 32)


def test_the_docs_show_the_count(capsys):
    assert cli.main(["bench", "traffic"]) == 0
    assert capsys.readouterr().out.strip() == between_markers("traffic")


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_has_every_row(finished):
    _, report = finished
    rows = {(r["shape"], r["impl"], r["pass"]) for r in report["rows"]}
    impls = ("chunked", "naive", "sdpa", "floor")
    assert rows == {(s, impl, which) for s in SHAPES for impl in impls for which in traffic.PASSES}
    assert {(m["shape"], m["impl"]) for m in report["left_out"]} == {(s, i) for s in SHAPES for i in ("fused", "fla")}
    for r in report["rows"]:
        assert 0 < r["ms_low"] <= r["ms"] <= r["ms_high"]
        assert ",".join(str(r[size]) for size in "BHTKV") == r["shape"]
        assert r["mib"] is None
    assert [(c["shape"], c["impl"], c["passed"]) for c in report["checks"]] == [
        (s, impl, True) for s in SHAPES for impl in ("chunked", "naive")
    ]


def test_a_run_can_be_repeated_from_its_record(finished):
    _, report = finished
    assert {"device", "versions", "date", "command", "copy_gb_per_s"} < report.keys()
    assert report["command"] == "vig-ref bench ops --device cpu --shapes 2,2,17,4,8 1,2,40,4,8"


def test_the_floor_is_the_copys_speed(finished):
    _, report = finished
    floors = [r for r in report["rows"] if r["impl"] == "floor"]
    sizes = [tokens * n for tokens in (2 * 2 * 17, 1 * 2 * 40) for n in (80, 80 + 144)]  # K = 4, V = 8
    for r, size in zip(floors, sizes, strict=True):
        assert size / r["ms"] / 1e6 == pytest.approx(report["copy_gb_per_s"], rel=0.01)


def test_the_picture_and_the_table(finished, capsys):
    out, report = finished
    for path in (out / "out" / "ops.png", out / "made" / "record.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "out" / "ops.json").read_text()) == report
    lines = bench_report.table(report).splitlines()
    assert max(map(len, lines)) <= 105
    assert sum("naive" in line for line in lines) == 4


def test_the_report_option_prints_the_record(finished, capsys):
    out, _ = finished
    assert cli.main(["bench", "ops", "--report", str(out / "made" / "record.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| 2,2,17,4,8 | 2, 2, 17, 4, 8 |") == 2
    assert "| shape | B, H, T, K, V | chunked | naive | sdpa | floor |" in printed
    assert "fused at 2,2,17,4,8, 1,2,40,4,8: the time of Triton's interpreter says nothing about a GPU" in printed
    assert "](results/record.png)" in printed


def test_a_report_of_a_gpu():
    """Ratios, the time of the counted bytes, and memory; from numbers that are easy to divide."""
    s = Shape("T", 1, 1, 1024, 32, 64)
    rows = [
        bench.row(s, impl, which, [0.9 * ms, ms, 1.2 * ms], mib)
        for which in traffic.PASSES
        for impl, ms, mib in (("fused", 0.004, 8.0), ("sdpa", 0.008, 4.0), ("floor", 0.001, None))
    ]
    report = {
        "device": "GPU", "date": "2026-01-01T00", "command": "c", "copy_gb_per_s": 1024.0, "left_out": [], "rows": rows,
        "versions": {"torch": "1", "triton": "2", "flash-linear-attention": "missing", "fla-core": "3"},
    }  # fmt: skip
    text = bench_report.markdown(report, Path("nowhere.png"))
    for counted in ("0.00186", "0.00544"):  # 1,856 and 5,440 bytes a token
        assert f"| T | 1, 1, 1024, 32, 64 | 0.00400 | 0.00800 | 0.00100 | {counted} | 4.0 | 0.50 |" in text
    assert "| T | 1, 1, 1024, 32, 64 | 8.00 | 4.00 |" in text
    assert "In the row that varies most, sdpa forward+backward at T, half of the calls are within 20 % of it." in text
    assert "flash-linear-attention 3" in text
    assert "nowhere" not in text
    line = next(line for line in bench_report.table(report).splitlines() if "fused" in line)
    assert line.split() == ["T", "forward", "fused", "0.00400", "0.00360", "to", "0.00480", "8.00", "4.0", "0.50"]


# --- it refuses ------------------------------------------------------------------------------------------------------

RIGHT = chunked.bidirectional_gla


def one_percent_off(*tensors, **options):
    return 1.01 * RIGHT(*tensors, **options)


def one_gradient_lost(q, k, v, g_fwd, g_rev, **options):
    return RIGHT(q, k, v, g_fwd, g_rev.detach(), **options) + (0 * g_rev.exp().sum()).to(v.dtype)


def last_head_lost(q, k, v, g_fwd, g_rev, **options):
    return torch.cat([RIGHT(q, k, v, g_fwd, g_rev, **options)[:, :-1], v[:, -1:]], dim=1)


@pytest.mark.parametrize("mistake", [one_percent_off, one_gradient_lost, last_head_lost])
def test_no_speed_of_a_wrong_layer(mistake, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(chunked, "bidirectional_gla", mistake)
    monkeypatch.setattr(bench, "times", None)  # nothing is timed
    assert ops("--shapes", SHAPES[0], "--out", str(tmp_path / "out"), "--record", str(tmp_path / "record.json")) == 1
    captured = capsys.readouterr()
    assert "FAILED: chunked at 2,2,17,4,8 is " in captured.err
    assert "naive" not in captured.err
    assert not re.search(r"\d ?ms|floor|written", captured.out)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("text", ["T9", "1,2,3,4", "1,2,3,4,5,6", "0,1,2,3,4", "a,b,c,d,e"])
def test_a_shape_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        ops("--shapes", text)
    assert stop.value.code == 2
    assert f"expected five sizes B,H,T,K,V or one of {', '.join(NAMED)}; got {text!r}" in capsys.readouterr().err


def test_what_is_left_out(monkeypatch):
    assert [s.name for s in GPU_SHAPES if bench.why_not("naive", s, "cuda")] == ["T1024", "T2048", "T2048b1", "H-T s1"]
    monkeypatch.setattr(bench, "has_fla", lambda: False)
    assert bench.why_not("fla", NAMED["T224"], "cuda") == "flash-linear-attention is not installed"
    monkeypatch.setattr(bench.agreement, "has_triton", lambda: False)
    assert bench.why_not("fused", NAMED["T224"], "cuda") == "Triton is not installed"
    for name in ("chunked", "sdpa"):
        assert bench.why_not(name, NAMED["T2048"], "cpu") is None


def test_memory_that_does_not_suffice_is_a_reason_and_so_is_a_peer_that_fails():
    def fail(error):
        raise error

    s, left_out = NAMED["T224"], []
    ours, peer = bench.implementation("chunked", "cpu"), bench.implementation("sdpa", "cpu")
    assert bench.attempt(left_out, s, ours, lambda: fail(torch.OutOfMemoryError("much"))) is None
    assert bench.attempt(left_out, s, peer, lambda: fail(ValueError("no such\nkernel"))) is None
    assert [m["reason"] for m in left_out] == ["out of memory", "ValueError: no such"]
    with pytest.raises(ValueError, match="ours"):
        bench.attempt(left_out, s, ours, lambda: fail(ValueError("ours")))


# --- what it compares ------------------------------------------------------------------------------------------------


def test_inputs_lie_token_by_token_and_sets_differ():
    s = Shape("small", 2, 3, 5, 4, 8)
    first, second = bench.inputs(s, "cpu", 2)
    for x, y, D in zip(first, second, (4, 4, 8, 4, 4, 8), strict=True):
        assert x.shape == (2, 3, 5, D)
        assert x.transpose(1, 2).is_contiguous()
        assert not torch.equal(x, y)
    assert [x.dtype for x in first] == [torch.bfloat16] * 3 + [torch.float32] * 2 + [torch.bfloat16]
    assert [x.requires_grad for x in first] == [True] * 5 + [False]
    assert -0.5 < first.g_fwd.min() < first.g_fwd.max() < 0


def test_flash_linear_attention_is_given_the_same_function(monkeypatch):
    """With a stand-in for the package, which has tokens before heads, one direction, and returns a state as well."""

    def chunk_gla(q, k, v, g, scale):
        q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g))
        return naive.gla(q, k, v, g, reverse=False, scale=scale).transpose(1, 2), None

    for name in ("fla", "fla.ops", "fla.ops.gla"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["fla.ops.gla"].chunk_gla = chunk_gla
    x = tolerance.draw(2, 3, 9, 4, 8, regime="moderate", dtype=torch.float64)
    got = tolerance.evaluate(bench.flash_linear_attention, x, scale=0.5)
    assert max(tolerance.worst_ratios(got, x, scale=0.5, chunk=1).values()) <= 1
    assert bench.check(Shape("small", 2, 3, 17, 4, 8), bench.implementation("fla", "cpu"), "cpu")["passed"]


@pytest.mark.parametrize(("calls", "groups"), [(5, [5]), (45, [20, 20, 5])])
def test_calls_on_a_gpu_are_queued_in_groups_behind_a_pause(calls, groups, monkeypatch):
    """With a stand-in for CUDA, whose events tell how many calls have been made."""
    made, pauses = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(made)

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: pauses.append(len(made)))
    monkeypatch.setattr(bench, "CALLS", {"cuda": (calls, calls)})
    monkeypatch.setattr(bench, "QUEUING", 1e9)
    assert bench.times(made.append, ["a", "b", "c"], "cuda") == [1] * calls
    first = 2 + groups[0]  # compiled, timed by the host, and a group that does not count
    assert made[2:first] == made[first : first + groups[0]]
    assert "".join(made[first:]) == ("abc" * calls)[:calls]
    assert [b - a for a, b in zip(pauses[1:], [*pauses[2:], len(made)], strict=True)] == groups


def test_quartiles_and_median():
    found = [3.0, 1.0, 2.0, 10.0, 4.0]
    low, middle, high = bench.quartiles(found)
    assert (low, middle, high) == (2, statistics.median(found), 4)


@pytest.mark.parametrize(("x", "text"), [(0.07249, "0.0725"), (1234.5, "1,234"), (12.34, "12.3"), (None, ""), (0, "0")])
def test_numbers(x, text):
    assert bench_report.number(x) == text


# --- the committed record --------------------------------------------------------------------------------------------


def between_markers(name):
    shown = re.search(rf"<!-- begin {name} -->\n(.*?)\n<!-- end {name} -->", PAGE, re.DOTALL)
    assert shown, f"docs/performance.md has no markers for {name}"
    return shown[1].strip()


def shown_record(name, markdown):
    """A committed record, which the page shows as `vig-ref bench --report FILE` prints it; None before there is one."""
    path = DOCS / "results" / name
    if not path.exists():
        assert between_markers(name) == "Not recorded yet."
        return None
    record = json.loads(path.read_text())
    assert between_markers(name) == markdown(record)
    return record


def test_the_page_in_the_docs_shows_the_record():
    picture = DOCS / "results" / "h200-ops.png"
    if record := shown_record("h200-ops.json", lambda record: bench_report.markdown(record, picture)):
        assert {s.name for s in GPU_SHAPES} <= {r["shape"] for r in record["rows"]}
        assert all(c["passed"] for c in record["checks"])


def test_memory_is_the_peak_of_what_a_call_asks_for(monkeypatch):
    """The allocator may hand out more, by what calls before left over: T2048b1 once had 0.4 MiB too many."""
    bytes_, peak = {"requested": 5 * 2**20, "allocated": 6 * 2**20}, {}

    def grow():
        bytes_["requested"] += 3 * 2**19
        bytes_["allocated"] += 2**21
        peak.update(bytes_)
        bytes_["requested"] -= 2**19

    def stats():
        return {f"{n}_bytes.all.{k}": x[n] for n in bytes_ for k, x in (("current", bytes_), ("peak", peak))}

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.update(bytes_))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    assert machine.mebibytes(grow, "cuda") == 1.5
    assert machine.mebibytes(grow, "cpu") is None


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path):
    assert cli.main(["bench", "ops", "--device", "cuda", "--shapes", "2,3,49,32,64", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    fused = [r for r in rows if r["impl"] == "fused"]
    assert [r["pass"] for r in fused] == list(traffic.PASSES)
    assert all(r["ms"] > 0 and r["mib"] > 0 for r in fused)

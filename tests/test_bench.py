# Written from the test cells of nbs/1_foundations/02_bench.ipynb by `attnbook export`. Do not edit.
# fmt: off
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
import types
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F

from attnbook.lab.bench import (
    block_mask,
    compare,
    flex,
    floor,
    measure,
    measure_ceilings,
    measure_training,
    naive,
    run_benchmarks,
    sdpa,
    warm_up,
)
from attnbook.lab.calls import call_costs, call_ratios, calls_table
from attnbook.lab.plots import (
    MARKS,
    PALETTE,
    _look_of_point,
    _text_box,
    look,
    looks,
    plot_bars,
    plot_lines,
    roofline,
    style,
)
from attnbook.lab.results import load_results, newest_device, record, results_dir, rows_from, stored_dir
from attnbook.lab.testing import check_raises, device, make_qkv, rel_error


@contextmanager
def own_clock():
    "A clock that nothing moves but `spend(ms)`: what is measured by it does not depend on how busy the machine is."
    now = [0.0]

    def spend(ms):
        now[0] += ms / 1e3

    with mock.patch.object(time, "perf_counter", lambda: now[0]):
        yield spend


def test_measure_knows_how_long_a_nap_is():
    timing = measure(lambda: time.sleep(0.004), warmup_ms=1, rep_ms=30, device="cpu")
    assert 4 <= timing.ms and timing.ms_p20 <= timing.ms <= timing.ms_p80
    assert timing.how == "clock" and timing.peak_bytes is None and timing.samples >= 3


def test_measure_takes_the_median_of_calls_after_the_first():
    with own_clock() as spend:
        naps = itertools.chain([100, 100], itertools.cycle([1, 2, 9, 2, 1]))  # two calls come before the warm-up
        timing = measure(lambda: spend(next(naps)), warmup_ms=15, rep_ms=30, device="cpu")
    assert abs(timing.ms - 2) < 1e-9 and abs(timing.ms_p20 - 1) < 1e-9 and abs(timing.ms_p80 - 9) < 1e-9
    assert timing.samples == 10


def test_measure_on_a_gpu():
    if device() == "cpu":
        return
    x = torch.randn(2**20, device=device())
    for graph in (False, True):
        timing = measure(lambda: x + 1, graph=graph)
        assert timing.peak_bytes == 2**22 and timing.how == ("graph" if graph else "events") and 0 < timing.ms < 1
    slow = lambda: (time.sleep(0.003), x + 1)  # a host that takes its time
    assert measure(slow).ms < 1 < 3 < measure(slow, ahead=False).ms
    timing = measure(lambda: x.sum().item(), graph=True)  # waits for the GPU: can't be captured
    assert timing.how == "events" and "no CUDA graph" in timing.note
    assert torch.randn(3, device=device()).isfinite().all()  # torch's generator works after that


class Spends(torch.autograd.Function):
    "x times a factor; its two directions take the milliseconds that they are told, by `spend`."

    @staticmethod
    def forward(ctx, x, factor, fwd, bwd, spend):
        ctx.factor, ctx.bwd, ctx.spend = factor, bwd, spend
        spend(fwd)
        return x * factor

    @staticmethod
    def backward(ctx, d):
        ctx.spend(ctx.bwd)
        return d * ctx.factor, None, None, None, None


def test_forward_and_backward_are_told_apart():
    with own_clock() as spend:
        t = measure_training(lambda x: Spends.apply(x, 1.0, 2.0, 6.0, spend), (torch.randn(3),), warmup_ms=1, rep_ms=40)
    assert abs(t["fwd"].ms - 2) < 1e-9 and abs(t["bwd"].ms - 6) < 1e-9


def test_gradients_lie_as_the_output_does():
    seen, x = [], torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)

    class Looks(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, d: seen.append(d.stride()) or d)

    measure_training(Looks.apply, (x,), warmup_ms=0, rep_ms=0)
    measure_training(Looks.apply, (x.contiguous(),), warmup_ms=0, rep_ms=0)
    assert set(seen) == {x.stride(), x.contiguous().stride()}


@contextmanager
def results_elsewhere():
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ATTNBOOK_RESULTS=folder):
        yield Path(folder)


WRITER = """
import sys
sys.modules["matplotlib"] = None                                     # the library must not need it
from attnbook.lab.bench import record
for i in range(50):
    record("unittest", "many", device="a test", who=sys.argv[1], i=i, long="x" * 5000)
"""


def test_newest_row_counts():
    with results_elsewhere():
        for ms in (3.0, 2.0):
            record("unittest", "a", device="GPU one", shape=(4, 4), dtype=torch.float16, ms=ms)
        record("unittest", "a", device="GPU two", shape=(4, 4), dtype=torch.float16, ms=torch.tensor(1.0))
        record("unittest", "b", device="GPU one", key=["w"], w=0.5, ms=math.inf, seed=3)
        rows = load_results("unittest", "a")
        assert [(r["device"], r["ms"]) for r in rows] == [("GPU one", 2.0), ("GPU two", 1.0)]
        assert rows[0]["dtype"] == "float16" and rows[0]["key"] == ["dtype", "shape"] and rows[0]["versions"]["torch"]
        assert [r["ms"] for r in load_results("unittest", "a", every=True)] == [3.0, 2.0, 1.0]
        (b,) = load_results("unittest", "b", w=0.5)
        nan = record("unittest", "c", device="GPU one", n=1, window=None, ms=math.nan)
        assert nan["ms"] is None and nan["key"] == ["n", "window"]
        assert b["ms"] is None and b["seed"] == 3 and b["preset"] == "gpu"
        assert len(load_results("unittest", shape=(4, 4))) == 2 and not load_results("unittest", shape=(4, 5))
        assert len(load_results("unittest", device={"GPU one", "GPU two"})) == 4 and not load_results("nothing_here")


def test_where_rows_are_written_and_read():
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
        os.environ.pop("ATTNBOOK_RESULTS", None)
        assert results_dir().parts[-2:] == ("runs", "results") and results_dir() != stored_dir()
        os.environ["ATTNBOOK_RESULTS"] = folder
        record("unittest", "a", device="GPU one", i=1)
        other = Path(folder, "other")
        with mock.patch.dict(os.environ, ATTNBOOK_RESULTS=str(other)):
            record("unittest", "a", device="GPU one", i=2)
        read = lambda: [r["i"] for r in load_results("unittest")]
        assert read() == [1]
        with rows_from(other):
            assert read() == [2]
            with rows_from(other, Path(folder)):
                assert read() == [2, 1]
            with rows_from():
                assert read() == [] == load_results("bench")
        assert read() == [1]


def test_newest_device():
    rows = [
        {"device": f"GPU {name}", "date": f"2026-01-0{day}T00:00:00+00:00", "i": i}
        for i, (name, day) in enumerate((("one", 1), ("two", 3), ("one", 2), ("two", 1), ("one", 3)))
    ]
    for some, want in ((rows[:3], [1]), (rows[:4], [1, 3]), (rows, [0, 2, 4]), (rows[::-1], [3, 1]), ([], [])):
        assert [r["i"] for r in newest_device(r for r in some)] == want


def test_several_processes_may_write_and_none_needs_matplotlib():
    with results_elsewhere() as folder:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        writers = [subprocess.Popen([sys.executable, "-c", WRITER, who], env=env) for who in "ab"]
        assert [w.wait() for w in writers] == [0, 0]
        lines = (folder / "unittest.jsonl").read_text().splitlines()
        assert len(lines) == len(load_results("unittest", "many")) == 100


def test_a_broken_line_costs_one_row():
    with results_elsewhere() as folder, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        record("unittest", "a", device="a test", i=1)
        with open(folder / "unittest.jsonl", "a") as f:
            f.write('{"name": "a", "i"')
        record("unittest", "a", device="a test", i=2)
        assert [r["i"] for r in load_results("unittest")] == [1, 2] and "line 2" in str(seen[-1].message)


def test_record_refuses():
    with results_elsewhere():
        check_raises(
            record,
            [
                ({"chapter": "../x"}, ValueError, ["chapter", "../x"]),
                ({"key": ["speed"]}, ValueError, ["key", "speed"]),
            ],
            chapter="unittest",
            name="a",
            ms=1.0,
        )


def test_floor():
    with results_elsewhere():
        assert floor(1e12, 1e9, device="Unheard of") is None
        for rate in (1e12, 5e14):  # the newer row counts
            record(
                "bench",
                "ceilings",
                key=[],
                device="Test GPU 9",
                copy_bytes_per_s=2e12,
                matmul_flops_per_s={"bfloat16": rate},
            )
        assert floor(1e12, 1e9, torch.bfloat16, "Test GPU") == 2.0  # arithmetic: 1e12 / 5e14
        assert floor(1e11, 1e9, torch.bfloat16, "Test GPU") == 0.5  # traffic: 1e9 / 2e12
        assert floor(None, 1e9, torch.float16, "Test GPU") == 0.5 and floor(1.0, 1.0, torch.float16, "Test GPU") is None


def test_ceilings_can_be_measured():
    small = {"copy_bytes": 2**20, "size": 64} if device() == "cpu" else {}
    found = measure_ceilings(device(), **small)
    assert 1e8 < found["copy_bytes_per_s"] < 1e14
    assert all(1e7 < rate < 1e16 for rate in found["matmul_flops_per_s"].values())


def test_peers_agree():
    q, k, v = make_qkv(heads=4, kv_heads=2, Nq=64, D=32)
    for causal in (False, True):
        want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal, enable_gqa=True)
        peers = [naive(is_causal=causal), sdpa("math", is_causal=causal), sdpa("auto", is_causal=causal)]
        if device() != "cpu":
            peers.append(flex((lambda b, h, i, j: i >= j) if causal else None))
        assert all(rel_error(peer(q, k, v), want) < 1e-5 for peer in peers)


def test_block_mask():
    from torch.nn.attention.flex_attention import create_block_mask

    near = lambda b, h, i, j: ((i - j).abs() < 90) | (j < 3)
    for Nq, Nk, size in ((300, 500, 128), (256, 256, (64, 32))):
        ours, theirs = (
            block_mask(near, Nq, Nk, device(), size),
            create_block_mask(near, None, None, Nq, Nk, device(), size),
        )
        assert torch.equal(ours.to_dense(), theirs.to_dense()) and ours.seq_lengths == theirs.seq_lengths
        assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
        for a, b, n in (
            (ours.kv_indices, theirs.kv_indices, ours.kv_num_blocks),
            (ours.full_kv_indices, theirs.full_kv_indices, ours.full_kv_num_blocks),
        ):
            listed = torch.arange(a.shape[-1], device=a.device) < n[..., None]
            assert torch.equal(a[listed], b[listed])


def test_unknown_backend():
    check_raises(sdpa, [({"backend": "fastest"}, ValueError, ["backend", "fastest", "cudnn"])])


def test_compare():
    x = torch.randn(64, 64, device=device())

    def fails(x):
        raise RuntimeError("out of luck")

    def taking(fwd, bwd, factor):
        return lambda x: Spends.apply(x, factor, fwd, bwd, spend if device() == "cpu" else busy)

    def busy(ms):  # by the GPU's own clock
        torch.cuda._sleep(int(2e6 * ms))

    peers = {
        "quick": taking(1.0, 2.0, 2.0),
        "slow": taking(3.0, 8.0, 2.0),
        "wrong": taking(1.0, 1.0, 3.0),
        "fails": fails,
    }
    with results_elsewhere(), warnings.catch_warnings(), own_clock() if device() == "cpu" else nullcontext() as spend:
        warnings.simplefilter("ignore")
        rows = compare(
            {"n": 64},
            peers,
            (x,),
            grad_out="random",
            flops=64**2,
            rep_ms=20,
            rounds=3,
            warmup_ms=1,
            graph=False,
            chapter="unittest",
            bench="twice",
            seed=1,
        )
        assert load_results("unittest", "twice") == rows
    quick, slow, wrong, broken = rows
    took = [(r["ms_fwd"], r["ms_bwd"]) for r in (quick, slow, wrong)]
    if device() == "cpu":
        assert took == [(1, 2), (3, 8), (1, 1)]
    else:  # its clock is what the power allows
        (a, b), (c, d), _ = took
        assert 0.2 < a < 20 and 2 < c / a < 4 and 3 < d / b < 5
    assert quick["difference"] == slow["difference"] == 0 and abs(wrong["difference"] - 0.5) < 1e-6
    assert broken["ms_fwd"] is None and "out of luck" in broken["note"] and quick["key"] == ["dtype", "method", "n"]
    assert abs(quick["tflops_fwd"] / (64**2 / quick["ms_fwd"] * 1e-9) - 1) < 1e-3 and quick["seed"] == 1


def test_forward_only():
    inputs = torch.ones(3, device=device()), 2
    (row,) = compare({}, {"double": lambda x, n: x * n}, inputs, rep_ms=5, rounds=1, warmup_ms=1)
    assert row["ms_fwd"] > 0 and "ms_bwd" not in row and "date" not in row


def test_warm_up(tmp_path):
    "All jobs run, also those after one that fails."
    warm_up(os.mkdir, [(str(tmp_path / name),) for name in ("a", "a", "b", "c")], workers=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
    warm_up(os.mkdir, [])


def test_run_benchmarks():
    module = types.ModuleType("attnbook.unittest_chapter")
    exec(
        "def bench_b():\n  yield {'n': 1, 'ms': 0.5}\n  yield {'n': 2, 'ms': 0.7}\n"
        "def bench_a():\n  return {'ms': 1.0}",
        vars(module),
    )
    lines = []
    with results_elsewhere(), mock.patch.dict(sys.modules, {module.__name__: module}):
        assert [r["name"] for r in run_benchmarks("unittest_chapter", show=lines.append)] == ["b", "b", "a"]
        assert len(run_benchmarks("unittest_chapter", only="bench_a", show=lines.append)) == 1
        assert len(load_results("unittest_chapter")) == 3 and "n=2; ms 0.7" in lines[1]
        check_raises(
            run_benchmarks, [({"only": "speed"}, ValueError, ["speed", "b, a"])], chapter="unittest_chapter", only=[]
        )
    check_raises(run_benchmarks, [({"chapter": "no_such"}, ValueError, ["unknown chapter", "no_such"])])




def test_time_runs_out():
    "What was begun is finished and recorded; peers and benchmarks that were not reached leave no row."
    module, ran = types.ModuleType("attnbook.unittest_chapter"), []

    def peer(name):
        return lambda x: ran.append(name) or x + 1

    def bench_pair():
        peers = {name: peer(name) for name in ("quick", "late")}
        for n in (1, 2):
            yield from compare(
                {"n": n}, peers, (torch.ones(3, device=device()),), rep_ms=1, rounds=1, warmup_ms=0,
                chapter="unittest_chapter", bench="pair",
            )  # fmt: skip

    def bench_never():
        ran.append("never")

    for f in (bench_pair, bench_never):
        f.__module__ = module.__name__
        setattr(module, f.__name__, f)
    lines, run = [], partial(run_benchmarks, "unittest_chapter", show=lambda line: lines.append(line))
    with results_elsewhere(), mock.patch.dict(sys.modules, {module.__name__: module}):
        with mock.patch.dict(
            compare.__globals__, _time_is_up=lambda: "quick" in ran
        ):  # after the first run of the first
            (row,) = run()
        assert (row["n"], row["method"]) == (1, "quick") and row["ms_fwd"] > 0 and set(ran) == {"quick"}
        assert lines[-1] == "unittest_chapter.never was not reached"
        assert run(seconds=1e-9) == [] and set(ran) == {"quick"}
        rows = run(only="pair", seconds=1000)
        assert [(r["n"], r["method"]) for r in rows] == [(1, "quick"), (1, "late"), (2, "quick"), (2, "late")]
    check_raises(run_benchmarks, [({"seconds": 0}, ValueError, "seconds")], chapter="bench")


def call_row(method, fwd, grad, bwd, **more):
    times = dict(host_us_fwd=fwd, host_us_grad=grad, host_us_bwd=bwd, gpu_us_fwd=5.0, gpu_us_bwd=6.0)
    return dict(key=["N", "method"], N=8, method=method, date="2026", device="x", name="calls") | times | more


@pytest.mark.parametrize(
    "ours, linear, within",
    [
        ((13.0, 13.0, 30.0), None, True),
        ((13.1, 13.0, 30.0), None, False),
        ((13.0, 13.1, 30.0), None, False),
        ((13.0, 13.0, 30.1), None, False),
        ((20.0, 22.0, 50.0), (7.0, 9.0, 20.0), True),
        ((20.0, 22.0, 50.0), (6.0, 9.0, 20.0), False),
    ],
    ids=["at the bars", "forward", "with gradients", "backward", "less the linear layers", "less too little"],
)
def test_bars_of_calls(ours, linear, within):
    rows = [call_row("ours", *ours), call_row("sdpa", 10.0, 10.0, 20.0), call_row("sdpa", 1.0, 1.0, 1.0, N=9)]
    rows += [call_row("linear layers", *linear)] if linear else []
    (found,) = call_ratios(rows)
    assert found["within"] == within and found["peer"] == "sdpa" and found["problem"] == {"N": 8}


def test_compiled_calls_have_another_peer():
    rows = [
        call_row("ours, compiled", 10.0, 10.0, 20.0),
        call_row("flex, compiled", 10.0, 10.0, 20.0),
        call_row("sdpa", 1.0, 1.0, 1.0),
    ]
    assert call_ratios(rows)[0]["within"] and call_ratios(rows)[0]["peer"] == "flex, compiled"
    rows[0]["host_us_bwd"] = 20.1
    assert not call_ratios(rows)[0]["within"]
    assert (
        call_ratios([call_row("ours", None, None, None), rows[2]])
        == []
        == call_ratios([call_row("ours", 1.0, 1.0, 1.0)])
    )


def test_call_costs(tmp_path, monkeypatch):
    "A row for each method, also for one that fails; the host's time is that until a call returns."
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))

    def slow(q, k, v):
        time.sleep(0.002)
        return q * k * v

    def broken(q, k, v):
        raise ValueError("no")

    inputs = [torch.randn(1, 1, 4, 8) for _ in range(3)]
    with pytest.warns(UserWarning, match="broken failed: ValueError: no"):
        rows = list(
            call_costs(
                "halo",
                dict(N=4),
                {"ours": slow, "broken": broken},
                inputs,
                qkv=(1, 1, 4, 8),
                compiled=False,
                calls=2,
                rounds=3,
            )
        )
    by = {r["method"]: r for r in rows}
    assert (
        list(by) == ["ours", "broken", "sdpa"] and by["broken"]["host_us_fwd"] is None and "no" in by["broken"]["note"]
    )
    assert (
        2000 <= by["ours"]["host_us_fwd"] < 50000
        and 2000 <= by["ours"]["host_us_grad"]
        and by["ours"]["host_us_bwd"] < 2000
    )
    assert by["ours"]["gpu_us_fwd"] is None


def test_table_of_calls(tmp_path, monkeypatch):
    "Rows of a GPU make a table, with the multiple of the peer; without them it says so."
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
    with rows_from(tmp_path):
        assert "not measured" in calls_table("halo")
        for method, us in (("ours", 13.0), ("sdpa", 10.0)):
            row = call_row(method, us, us, us)
            row = {k: v for k, v in row.items() if k not in ("key", "date", "device", "name")}
            record("halo", "calls", key=["N", "method"], device="a GPU", preset="gpu", **row)
        table = calls_table("halo")
    assert "1.30 / 1.30 / 1.30 of sdpa" in table and table.count("\n") == 3


def test_one_look_per_method():
    assert look("flex, permuted") == look("flex") and look("naive (PyTorch)") == look("naive") != look("flexible")
    assert set(PALETTE) == set(MARKS) and look("something else") == look("something else")
    assert look("flex")["color"] == PALETTE["flex"]
    assert look("sdpa alone") == look("eager compiled")  # by chance: in one panel they are told apart
    apart = looks(["eager compiled", "ours", "sdpa alone", "flex", "flex, permuted"])
    assert len({tuple(s.values()) for s in apart.values()}) == 4 and apart["flex"] == apart["flex, permuted"]
    assert apart["eager compiled"] == look("eager compiled") and apart["ours"] == look("ours")


def test_plots_draw_with_and_without_rows():
    style()
    rows = [
        {"method": m, "N": n, "ms_fwd": n * c, "floor_ms_fwd": n / 2}
        for m, c in (("ours", 1), ("flex", 2))
        for n in (2, 4, 8)
    ]
    ax = plot_lines(rows, "N")
    assert {t.get_text() for t in ax.texts} == {"ours", "flex", "floor"} and ax.get_ylabel() == "time per call (ms)"
    assert len(plot_bars(rows[:2]).patches) == 2
    for ax in (plot_lines([], "N"), plot_bars([{"ms_fwd": None}])):
        assert "no ms_fwd measured" in ax.texts[0].get_text()
    with results_elsewhere():
        record(
            "bench",
            "ceilings",
            key=[],
            device="Test GPU 9",
            copy_bytes_per_s=2e12,
            matmul_flops_per_s={"bfloat16": 5e14},
        )
        assert len(roofline([("ours", 1e12, 1e9, 3.0)], device="Test GPU 9").lines) == 2
        assert len(roofline([("ours", 1e12, 1e9, 3.0)], device="Unheard of").lines) == 1
        ax = roofline([(f"ours, a name {i}", 1e12, 1e9, 3.0 + 0.1 * i) for i in range(8)], device="Test GPU 9")
        boxes = [_text_box(t) for t in ax.texts]
        assert len(boxes) == 10 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert _look_of_point("sdpa 64²") == _look_of_point("sdpa, at 96²") == look("sdpa")
    assert _look_of_point("flex 64²") == look("flex")
    failed = plot_bars([rows[0], {"method": "flex", "ms_fwd": None}])
    assert "failed" in failed.texts[1].get_text() and [t.get_text() for t in failed.get_yticklabels()] == [
        "ours",
        "flex",
    ]
    plt.close("all")

# Written from the test cells of nbs/4_long_context/ring.ipynb by `attnbook export`. Do not edit.
import os
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

from attnbook.attention import attention_reference
from attnbook.engine import attention
from attnbook.lab.testing import (
    check_against_reference,
    check_compiles,
    check_deterministic,
    check_empty_rows,
    check_opcheck,
    check_raises,
    check_strides,
    check_writes_everything,
    evaluate,
    make_qkv,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.ring import (
    LAYOUTS,
    METHODS,
    Hop,
    Job,
    RingSelfAttention,
    SequenceTransformer,
    SimulatedGroup,
    allgather_attention,
    attend_alone,
    attend_with_lost_peer,
    bert_base,
    bert_large,
    chunk_of,
    comm_bytes,
    errors_on_rank,
    exchange_op,
    high_priority_group,
    hop_kind,
    largest,
    linformer_attention,
    local_positions,
    memory_elements,
    padded_length,
    project,
    rank_pairs,
    ring_attention,
    ring_backward_schedule,
    ring_forward_schedule,
    ring_self_attention,
    sequence_attention_op,
    shard_sequence,
    shard_usp,
    spawn_ranks,
    train_lm,
    train_on_rank,
    ulysses_attention,
    unshard_sequence,
    usp_attention,
)


def test_chunks_cover_the_sequence():
    for layout in LAYOUTS:
        for size, L in ((1, 7), (2, 8), (3, 17), (4, 48), (5, 1)):
            rows = padded_length(L, size, layout) // size
            chunks = [chunk_of(layout, r, size, rows, L) for r in range(size)]
            assert sorted(p for c in chunks for p in c.positions()) == list(range(rows * size))
            for c in chunks:
                at = c.positions()
                assert (np.diff(at) > 0).all() and [c.position(n) for n in range(rows)] == at.tolist()
                assert all(c.count(t) == (at <= t).sum() for t in range(-2, rows * size + 2))

def test_pairs_follow_the_formulas():
    for N in (2, 3, 4, 8):
        L, total = 24 * N, 24 * N * (24 * N + 1) // 2
        c, h = 24, 12
        assert rank_pairs("contiguous", N, L).sum(1).tolist() == [c * c * r + c * (c + 1) // 2 for r in range(N)]
        assert rank_pairs("zigzag", N, L).sum(1).tolist() == [h * (h + 1) + h * h * (2 * N - 1)] * N
        for layout in LAYOUTS:
            assert rank_pairs(layout, N, L).sum() == total and rank_pairs(layout, N, L, False).sum() == L * L
    assert rank_pairs("striped", 4, 48).sum(1).tolist() == [276, 288, 300, 312]
    assert rank_pairs("contiguous", 4, 48).sum(1).tolist() == [78, 222, 366, 510]


def test_formulas():
    shape = dict(heads=12, ranks=8)
    smaller = lambda part, B, L, H: (memory_elements("rsa", batch=B, length=L, width=H, **shape)[part]
                                     < memory_elements("tensor", batch=B, length=L, width=H, **shape)[part])
    for H in (768, 1536):
        for part, edge in (("mlp", 32 * H), ("attention", 16 * H)):               # BL > 32 H and BL > 16 AZ
            assert smaller(part, 1, edge + 1, H) and not smaller(part, 1, edge, H) and smaller(part, edge + 1, 1, H)
    same = dict(ranks=4, batch=2, heads=12, rows=128, head_dim=64, itemsize=4, packet_itemsize=4)
    total = lambda method, **more: sum(comm_bytes(method, **same | more).values())
    unit = 3 * 2 * 12 * 128 * 64 * 4
    assert total("rsa") == total("tensor") == 8 * unit
    assert total("rsa", reduction="reduce_scatter") == total("ring") == 6 * unit
    assert comm_bytes("ring", **same)["fwd"] == 2 * unit and total("ulysses") == 8 * unit // 4
    assert total("linformer", rows=10**6) == total("linformer")
    most = lambda method, ranks: largest("batch", method, length=512, width=768, heads=12, ranks=ranks)
    assert most("rsa", 64) > most("tensor", 12)
    check_raises(lambda **k: comm_bytes(**{**same, **k}), [(dict(method="pigeon"), ValueError, "pigeon")],
                 method="ring")


def test_projection():
    block = {p: dict(causal=0.5, half_k=0.5, half_q=0.5, full=1.0) for p in ("fwd", "dq", "dkv")}
    free = dict(rows=2**14, kv_bytes=1, packet_bytes=1, alpha=0, beta=1e12)
    for N in (2, 4, 8):
        zigzag = project(block, layout="zigzag", ranks=N, **free)
        assert abs(zigzag["fwd"] - N / 2) < 1e-6 and abs(zigzag["bwd"] - N) < 1e-6 and zigzag["efficiency"] > 0.98
        contiguous = project(block, layout="contiguous", ranks=N, **free)
        assert abs(contiguous["fwd"] - (N - 0.5)) < 1e-6 and contiguous["efficiency"] < 0.8
    slow = project(block, layout="zigzag", ranks=4, **free | dict(kv_bytes=2e12))
    assert abs(slow["fwd"] - (3 * 2 + 0.5)) < 1e-6                      # three hops wait for the wire
    assert [hop_kind(Hop(chunk_of("zigzag", 1, 4, 8), chunk_of("zigzag", s, 4, 8), True))
            for s in range(4)] == ["half_k", "causal", "half_q", "half_q"]


def over_ranks(q, k, v, fn, size, layout, length=None, **options):
    "A method over simulated ranks as a function of whole tensors."
    group, L = SimulatedGroup(size), q.shape[2]
    shards = [shard_sequence(t, 2, group, layout, pad=True) for t in (q, k, v)]
    return unshard_sequence(fn(*shards, group=group, layout=layout, length=L, **options), 2, group, layout, length=L)

def test_methods_agree_with_attention():
    for size, L, layout, causal in (
            (2, 16, "zigzag", True), (3, 17, "zigzag", True), (4, 23, "striped", True), (3, 9, "contiguous", True),
            (4, 16, "striped", False), (2, 13, "contiguous", False), (3, 20, "zigzag", False), (1, 7, "zigzag", True)):
        qkv = make_qkv(1, 4, L, 8, kv_heads=2, Dv=12, dtype=torch.float64)
        for fn in METHODS.values():
            if fn is ulysses_attention and size == 3: continue
            op = partial(over_ranks, fn=fn, size=size, layout=layout, is_causal=causal)
            check_against_reference(op, partial(attention_reference, is_causal=causal), qkv, tol=1e-12)

def test_kernels_agree_with_attention():
    for size, L, layout, causal in ((2, 68, "zigzag", True), (3, 37, "zigzag", True), (2, 41, "striped", True),
                                    (3, 35, "contiguous", True), (2, 35, "zigzag", False)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16)[:3 if size == 3 and causal else 1]:
            op = partial(over_ranks, fn=ring_attention, size=size, layout=layout, is_causal=causal, backend="triton")
            qkv, loose = make_qkv(1, 2, L, 16, kv_heads=1, Dv=24), 2e-5 if dtype == torch.float32 else None
            reference = partial(attention_reference, is_causal=causal)
            check_against_reference(op, reference, qkv, dtype=dtype, grad_tol=loose)

def test_local_program_agrees_with_attention():
    for method in (ulysses_attention, allgather_attention):
        op = partial(over_ranks, fn=method, size=2, layout="striped", is_causal=True, backend="triton")
        check_against_reference(op, partial(attention_reference, is_causal=True), make_qkv(1, 2, 37, 16), grad_tol=2e-5)


def test_one_rank_is_the_local_kernel():
    for backend in ("torch", "triton"):
        q, k, v = make_qkv(1, 2, 33, 16)
        same = attention(q, k, v, is_causal=True, backend=backend)
        for group in (None, SimulatedGroup(1)):
            args = (q, k, v) if group is None else ([q], [k], [v])
            out = ring_attention(*args, group=group, is_causal=True, backend=backend)
            assert torch.equal(out if group is None else out[0], same)

def test_keys_of_another_length():
    for backend in ("torch", "triton"):
        q, k, v = make_qkv(1, 2, 18, 16, Nk=33)
        group = SimulatedGroup(3)
        shards = [shard_sequence(t, 2, group, "striped", pad=True) for t in (q, k, v)]
        out = unshard_sequence(ring_attention(*shards, group=group, layout="striped", kv_length=33, backend=backend), 2,
                               group, "striped")
        assert rel_error(out, attention_reference(q, k, v)) < 1e-5

def test_usp_and_linformer():
    q, k, v = make_qkv(1, 8, 32, 8, kv_heads=4, dtype=torch.float64)
    for rows, columns, layout, causal in ((2, 2, "zigzag", True), (2, 4, "striped", True), (4, 2, "contiguous", False),
                                          (1, 2, "zigzag", True)):
        def op(q, k, v):
            mesh = SimulatedGroup.mesh(rows, columns)
            out = usp_attention(*(shard_usp(t, 2, mesh, layout) for t in (q, k, v)), mesh=mesh, layout=layout,
                                is_causal=causal)
            at = torch.cat(shard_usp(torch.arange(32), 0, mesh, layout))
            return torch.cat(out, 2)[:, :, at.argsort()]
        check_against_reference(op, partial(attention_reference, is_causal=causal), (q, k, v), tol=1e-12)
    g = torch.Generator().manual_seed(3)
    e, f = (torch.randn(32, 5, generator=g, dtype=torch.float64).to(q.device) for _ in range(2))

    def sparse(q, k, v, e, f):
        group = SimulatedGroup(4)
        cut = lambda t, dim: shard_sequence(t, dim, group)
        return unshard_sequence(linformer_attention(*(cut(t, 2) for t in (q, k, v)), cut(e, 0), cut(f, 0), group=group),
                                2, group)
    dense = lambda q, k, v, e, f: attention_reference(q, torch.einsum("jr,bhjd->bhrd", e, k),
                                                      torch.einsum("jr,bhjd->bhrd", f, v))
    check_against_reference(sparse, dense, (q, k, v, e, f), tol=1e-12)


def test_high_priority_group():
    "It needs NCCL; one rank on one GPU attends through it as through any group."
    on_gpu = device_under_test() == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if not on_gpu:
            with pytest.raises(ValueError, match="group must have NCCL"): high_priority_group()
            return
        q, k, v = torch.randn(3, 1, 2, 64, 16, device="cuda").unbind(0)
        found = ring_attention(q, k, v, group=high_priority_group(), is_causal=True)
        torch.testing.assert_close(found, attention(q, k, v, is_causal=True))
    finally:
        dist.destroy_process_group()


class Lossy(SimulatedGroup):
    "Loses what arrives."
    def arrived(self, tensors): return [torch.zeros_like(t) for t in tensors]

def test_communication_is_real():
    q, k, v = make_qkv(1, 2, 24, 8, dtype=torch.float64)
    for fn in (ring_attention, ring_self_attention):
        good, bad = ([o.detach() for o in fn(*(shard_sequence(t, 2, g, "contiguous") for t in (q, k, v)), group=g,
                                             layout="contiguous", is_causal=True)]
                     for g in (SimulatedGroup(3), Lossy(3)))
        assert torch.equal(good[0], bad[0]) and all(rel_error(b, a) > 0.05 for a,
                                                    b in zip(good[1:], bad[1:]))  # rank 0 needs nobody

def test_memory_and_hops():
    N, L = 4, 64
    q, k, v = make_qkv(1, 2, L, 8)
    saved = {}
    for name in ("ring", "rsa"):
        group, sizes = SimulatedGroup(N), []
        leaves = [[t.detach().requires_grad_() for t in shard_sequence(x, 2, group, "contiguous")] for x in (q, k, v)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
            out = METHODS[name](*leaves, group=group, layout="contiguous")
        saved[name] = sizes
        forward = [c["p2p"] for c in group.traffic]
        torch.autograd.grad(out, sum(leaves, []), [torch.ones_like(o) for o in out])
        kv = 2 * (L // N) * 8 * 4                                            # bytes of one rank's K
        assert forward == [2 * (N - 1) * kv] * N
        # keys again N - 1 hops, packets of dK and dV N - 1 hops; RSA reduces whole gradients instead
        again = [c["p2p"] - f for c, f in zip(group.traffic, forward)]
        assert again == [(4 if name == "ring" else 2) * (N - 1) * kv] * N
    assert all(L not in shape for shape in saved["ring"]) and any(L in shape for shape in saved["rsa"])

def test_transfers_are_posted_before_the_work_that_hides_them():
    events = []

    class Spy(Job):
        @property
        def blocks(self):
            real = Job.blocks.fget(self)
            def spy(name, fn): return lambda *a, **k: events.append(name) or fn(*a, **k)
            return tuple(spy(n, fn) for n, fn in zip(("forward", "dq", "dkv"), real))

    class Watched(SimulatedGroup):
        def answer(self, requests):
            events.append(type(requests[0]).__name__.lower())
            return super().answer(requests)
    settings = (True, "zigzag", 24, 24, 0.5, False, False)
    jobs, group = [Spy(*settings), Job(*settings), Job(*settings)], Watched(3)
    qkv = [shard_sequence(t, 2, group, "zigzag") for t in make_qkv(1, 1, 24, 8)]
    found = group.run([ring_forward_schedule(r, 3, *x, jobs[r]) for r, x in enumerate(zip(*qkv))])
    assert " ".join(events) == "post forward wait post forward wait forward"
    events.clear()
    group.run([ring_backward_schedule(r, 3, *x, out, lse, out, jobs[r])
               for r, (x, (out, lse)) in enumerate(zip(zip(*qkv), found))])
    # keys of the next hop travel while dQ and dK, dV are computed, packets while dQ is
    assert " ".join(events) == "post dq wait post dq dkv post wait dq wait dkv post dkv wait"

def test_extremes():
    for backend in ("torch", "triton"):
        q, k, v = make_qkv(1, 2, 22, 16)
        op = partial(over_ranks, fn=ring_attention, size=2, layout="zigzag", is_causal=True, backend=backend)
        out, grads = evaluate(op, (1e2 * q, 1e2 * k, v))                      # logits of about ±1e4
        assert rel_error(out[0], attention_reference(1e2 * q, 1e2 * k, v, is_causal=True)) < 5e-3  # rounded logits
        assert all(g.isfinite().all() for g in grads.values()) and rel_error(out[0][:, :, 0], v[:, :, 0]) < 1e-6
        group = SimulatedGroup(2)

        def padded(q, k, v):                                                  # 14 real rows of 24
            shards = [shard_sequence(t, 2, group, "contiguous") for t in (q, k, v)]
            return unshard_sequence(ring_attention(*shards, group=group, layout="contiguous", length=14,
                                                   backend=backend), 2, group)
        check_empty_rows(padded, make_qkv(1, 1, 24, 16), torch.arange(24) >= 14)


def test_good_citizen():
    for backend in ("torch", "triton"):
        op = partial(over_ranks, fn=ring_attention, size=2, layout="striped", is_causal=True, backend=backend)
        qkv = make_qkv(1, 2, 10, 16, kv_heads=1)
        check_writes_everything(op, qkv), check_strides(op, qkv), check_deterministic(op, qkv, repeats=2)

def test_compiles_and_passes_opcheck():
    group = SimulatedGroup(2)
    shards = [shard_sequence(t, 2, group) for t in make_qkv(1, 2, 12, 16)]
    flat = [t.clone() for ts in shards for t in ts]
    for name in ("ring", "rsa"):
        def op(a, b, c, d, e, f):
            return torch.cat(METHODS[name]([a, b], [c, d], [e, f], group=group, layout="contiguous"), 2)
        check_compiles(op, flat)
        lists = [[t.clone().requires_grad_() for t in ts] for ts in shards]
        check_opcheck(sequence_attention_op, (*lists, group.name, name, "contiguous", [12, 12], False, 0.25, False,
                                              False, "all_reduce"))
    for kind, dims in (("all_reduce", (0, 0)), ("all_gather", (2, 0)), ("reduce_scatter", (2, 0)),
                       ("all_to_all", (1, 2))):
        check_opcheck(exchange_op, ([t.clone().requires_grad_() for t in shards[0]], group.name, kind, *dims))


def test_shards_round_trip():
    x = torch.arange(2 * 19 * 3.0).view(2, 19, 3)
    for layout in LAYOUTS:
        for size in (1, 2, 3):
            group = SimulatedGroup(size)
            shards = shard_sequence(x, 1, group, layout, pad=True)
            assert torch.equal(unshard_sequence(shards, 1, group, layout, length=19), x)
            at = local_positions(19, group, layout)
            for s, p in zip(shards, at):
                real = p < 19
                assert torch.equal(s[:, real], x[:, p[real]]) and not s[:, ~real].any()

def test_bad_input():
    group, qkv = SimulatedGroup(2), make_qkv(1, 4, 12, 16, kv_heads=2)
    q, k, v = (shard_sequence(t, 2, group) for t in qkv)
    check_raises(lambda **kw: ring_attention(**kw), [
        (dict(layout="spiral"), ValueError, "spiral"), (dict(transport="pigeon"), ValueError, "pigeon"),
        (dict(is_causal=1), TypeError, "is_causal"), (dict(length=13), ValueError, ("length", "13")),
        (dict(group="world"), TypeError, "group"), (dict(q=qkv[0]), TypeError, "list"),
        (dict(k=[t.half() for t in k]), ValueError, "k must"), (dict(q=q[:1]), ValueError, "shards"),
        (dict(packet_dtype=torch.float16), ValueError, "packet_dtype"), (dict(timeout=0), ValueError, "timeout"),
        (dict(k=[t[:, :, :3] for t in k], v=[t[:, :, :3] for t in v], layout="zigzag"), ValueError, "even"),
        (dict(k=[t[:, :, :4] for t in k], v=[t[:, :, :4] for t in v]), ValueError, "as many keys"),
        (dict(v=[v[0], v[1][..., :8]]), ValueError, "one shape")],
        q=q, k=k, v=v, group=group, is_causal=True)
    check_raises(lambda length, layout: shard_sequence(torch.zeros(length), 0, SimulatedGroup(4), layout), [
        (dict(length=10), ValueError, ("10", "4", "pad=True")),
        (dict(length=4, layout="zigzag"), ValueError, "8")], length=12, layout="striped")
    threes = lambda heads: [[torch.zeros(1, heads, 4, 8)] * 3 for _ in range(3)]
    check_raises(lambda heads: ulysses_attention(*threes(heads), group=SimulatedGroup(3)),
                 [(dict(heads=4), ValueError, "heads")], heads=3)
    check_raises(lambda reduction: ring_self_attention(q, k, v, group=group, reduction=reduction),
                 [(dict(reduction="none"), ValueError, "reduction")], reduction="all_reduce")
    check_raises(lambda size: SimulatedGroup(size), [(dict(size=0), ValueError, "size")], size=1)
    check_raises(lambda method: RingSelfAttention(8, 2, method=method), [(dict(method="x"), ValueError, "method")],
                 method="ring")


def check_rank_errors(size, device="cpu"):
    cases = [dict(method="ring", layout="zigzag", length=24, kv_heads=2),
             dict(method="ring", layout="striped", length=23, is_causal=True),
             dict(method="ring", layout="contiguous", length=24, is_causal=False),
             dict(method="rsa", layout="contiguous", length=24, is_causal=False),
             dict(method="rsa", layout="zigzag", length=24, reduction="reduce_scatter"),
             dict(method="allgather", layout="zigzag", length=23)]
    if size != 3: cases.append(dict(method="ulysses", layout="contiguous", length=24, kv_heads=2))
    for found in spawn_ranks(errors_on_rank, size, cases, device):
        for case, row in zip(cases, found):
            sent = row.pop("sent")
            assert max(row.values()) < 1e-12, (case, row)
            if case["length"] == 24:
                known = {k: case[k] for k in ("method", "kv_heads", "reduction") if k in case}
                want = comm_bytes(**known, ranks=size, batch=2, heads=4, rows=24 // size, head_dim=8, itemsize=8,
                                  packet_itemsize=8)
                assert sum(sent.values()) == sum(want.values()), (case, sent, want)

def test_two_processes(): check_rank_errors(2)
def test_three_processes(): check_rank_errors(3)
def test_four_processes():
    check_rank_errors(4)
    cases = [dict(method="usp", layout=layout, length=32, is_causal=layout != "contiguous", kv_heads=2)
             for layout in LAYOUTS]
    for found in spawn_ranks(errors_on_rank, 4, cases, "cpu", (2, 2)):
        assert max(v for row in found for n, v in row.items() if n != "sent") < 1e-12


def test_lost_peers_are_named():
    for how, limit in (("dies", 30.0), ("stalls", 1.0)):
        start = time.monotonic()
        said = spawn_ranks(attend_with_lost_peer, 3, 1, 2, how, limit, check=False)
        assert time.monotonic() - start < 25 and "finished" not in said
        assert "rank 2 of 3, hop 2 of 2" in said[2] and "from rank 1" in said[2], said
        assert how == "stalls" or said[1] is None                           # rank 1 left no word

def test_time_limit():
    said = spawn_ranks(attend_alone, 2, 1.0, check=False)
    assert said[0].startswith("PeerError: rank 0 of 2, hop 1 of 1: keys and values from rank 1 did not arrive"), said

def test_failures_of_ranks_are_reported():
    with pytest.raises(RuntimeError, match="rank 0: raised.*method"):
        spawn_ranks(errors_on_rank, 1, [{"length": 4}])


def test_torchrun():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, "-m", "attnbook.ring"], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line for line in done.stdout.splitlines() if "on 2 ranks: error" in line]
    assert len(found) == len(METHODS) * len(LAYOUTS)
    assert all(float(line.split("error ")[1].split(",")[0]) < 1e-12 for line in found), found


def test_mesh_trains_like_one_process():
    text = torch.frombuffer(bytearray(b"for i in range(10):\n    print(i * i)\n" * 40), dtype=torch.uint8)
    settings = dict(steps=3, length=24, batch=4, width=16, layers=2, heads=2)
    one = train_lm(text, **settings, dtype="float64")
    assert one[-1] < one[0]
    for found in spawn_ranks(train_on_rank, 4, text.numpy(), (2, 2), {**settings, "dtype": "float64"}):
        assert max(abs(a - b) for a, b in zip(one, found)) < 1e-10
    for method, layout in (("rsa", "contiguous"), ("ulysses", "striped"), ("allgather", "zigzag")):
        other = train_lm(text, **settings, dtype="float64", group=SimulatedGroup(2), method=method, layout=layout)
        assert max(abs(a - b) for a, b in zip(one, other)) < 1e-10

def test_models():
    with torch.device("meta"):
        count = lambda m: sum(p.numel() for p in m.parameters())
        assert count(bert_base()) == 108_891_648 and count(bert_large()) == 334_092_288
    group = SimulatedGroup(3)
    torch.manual_seed(0)
    model = SequenceTransformer(50, 40, 16, 2, 4, post_norm=True, num_kv_heads=2, is_causal=False, layout="striped",
                                method="ring").to(device_under_test())
    tokens = torch.randint(50, (2, 31), device=device_under_test())
    alone = model(tokens)
    for part in model.modules():
        if isinstance(part, (RingSelfAttention, SequenceTransformer)): part.group = group
    spread = unshard_sequence(model(shard_sequence(tokens, 1, group, "striped", pad=True), length=31), 1, group,
                              "striped", length=31)
    assert alone.shape == (2, 31, 50) and rel_error(spread, alone) < 1e-5
    assert "ranks=3" in repr(model) and "layout='striped'" in repr(model)
    check_raises(lambda n: SequenceTransformer(50, 40, 16, 1, 4)(torch.zeros(1, n, dtype=torch.long)),
                 [(dict(n=41), ValueError, "max_length")], n=4)


@pytest.mark.cuda
def test_processes_share_a_gpu():
    "Two and three processes on one GPU, Triton kernels, staged through the host: NCCL would refuse."
    if device_under_test() != "cuda": return
    cases = [dict(method="ring", layout=layout, length=1024, heads=4, kv_heads=2, head_dim=64, dtype=dtype,
                  backend="triton", is_causal=causal, transport="staged")
             for layout, dtype, causal in (("zigzag", "float32", True), ("zigzag", "bfloat16", True),
                                           ("striped", "float16", True), ("contiguous", "bfloat16", False))]
    cases += [dict(method="rsa", layout="contiguous", length=256, dtype="float32"),
              dict(method="allgather", layout="zigzag", length=256, dtype="float32")]
    limits = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
    for size in (2, 3):
        for found in spawn_ranks(errors_on_rank, size, [{**c, "length": c["length"] * size // 2} for c in cases],
                                 "cuda", limit=300.0):
            for case, row in zip(cases, found):
                row.pop("sent")
                assert max(row.values()) < limits[case["dtype"]], (case, row)

@pytest.mark.cuda
def test_large_shapes():
    if device_under_test() != "cuda": return
    q, k, v = make_qkv(1, 4, 4096, 128, kv_heads=2, dtype=torch.bfloat16)
    for layout in LAYOUTS:
        op = partial(over_ranks, fn=ring_attention, size=4, layout=layout, is_causal=True, backend="triton")
        check_against_reference(op, partial(attention_reference, is_causal=True), (q, k, v))

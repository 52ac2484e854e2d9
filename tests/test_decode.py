# Written from the test cells of nbs/1_foundations/19_decode.ipynb by `attnbook export`. Do not edit.
# fmt: off
import pytest
import torch

from attnbook.attention import attention_reference
from attnbook.decode.kernels import choose_splits, decode_bytes
from attnbook.decode.op import append_op, append_tokens, decode_attention, decode_attention_op
from attnbook.decode.reference import decode_attention_reference, gather_pages, merge_parts
from attnbook.decode.study import bench_decode, claims, floor_shares, folded
from attnbook.lab.testing import (
    check_compiles,
    check_deterministic,
    check_opcheck,
    check_raises,
    check_strides,
    check_writes_everything,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test


def _problem(B=3, H=4, Hkv=2, Nq=1, N=37, D=16, Dv=None, dtype=torch.float32, page=0, seed=0):
    "q, caches and, for a paged cache, its table: pages lie in a random order and some belong to nobody."
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    q, k, v = draw(B, H, Nq, D), draw(B, Hkv, N, D), draw(B, Hkv, N, Dv or D)
    if not page:
        return q, k, v, None
    rows = -(-N // page)
    table = torch.randperm(B * rows + 3, generator=g)[: B * rows].view(B, rows).int().to(q.device)
    paged = lambda t: torch.full((B * rows + 3, Hkv, page, t.shape[-1]), torch.nan, dtype=dtype, device=q.device)
    caches = []
    for t in (k, v):
        cache, padded = paged(t), torch.nn.functional.pad(t, (0, 0, 0, rows * page - N), value=torch.nan)
        cache[table.long()] = padded.unflatten(2, (rows, page)).transpose(1, 2)
        caches.append(cache)
    return q, *caches, table


def _ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device_under_test())


@pytest.mark.parametrize("Nq, causal", [(1, True), (3, True), (3, False)], ids=str)
def test_reference(Nq, causal):
    q, k, v, _ = _problem(Nq=Nq, dtype=torch.float64)
    lengths, starts = (37, 20, 5), (0, 7, 2)
    out, lse = decode_attention_reference(q, k, v, _ints(*lengths), starts=_ints(*starts), causal=causal, scale=0.3)
    for b, (a, n) in enumerate(zip(starts, lengths)):
        want = attention_reference(
            q[b : b + 1],
            k[b : b + 1, :, a:n],
            v[b : b + 1, :, a:n],
            is_causal=causal,
            q_offset=n - a - Nq,
            scale=0.3,
            return_lse=True,
        )
        assert rel_error(out[b], want[0][0]) < 1e-12 and rel_error(lse[b], want[1][0]) < 1e-12


def test_pages_are_gathered():
    q, k, v, table = _problem(N=24, page=8)
    plain = _problem(N=24)
    assert torch.equal(gather_pages(k, table), plain[1]) and torch.equal(gather_pages(v, table), plain[2])


def test_parts_are_merged():
    q, k, v, _ = _problem(dtype=torch.float64)
    cuts, whole = (0, 11, 12, 12, 37), _ints(37, 37, 12)
    parts = [
        decode_attention_reference(q, k, v, whole.clamp(max=b), starts=_ints(a, a, a)) for a, b in zip(cuts, cuts[1:])
    ]
    out, lse = merge_parts(torch.stack([o for o, _ in parts]), torch.stack([x for _, x in parts]))
    want = decode_attention_reference(q, k, v, whole)
    assert rel_error(out, want[0]) < 1e-12 and rel_error(lse, want[1]) < 1e-12
    with pytest.raises(ValueError, match="lses must"):
        merge_parts(out[None], lse)


def test_splits():
    assert choose_splits(256, 8192, 64, 132) == 9  # 2304 programs on 132 multiprocessors
    assert choose_splits(8, 32768, 64, 132) == 128 and choose_splits(8, 2048, 64, 132) == 16
    assert choose_splits(64, 2048, 64, 132) == 8  # four tiles each
    assert choose_splits(5000, 8192, 64, 132) == 1 == choose_splits(1, 64, 64, 132)
    assert choose_splits(0, 0, 64, 132) == 1


CASES = {  # of `_problem`, and of the call
    "one head": (dict(H=1, Hkv=1), {}),
    "a head each": (dict(H=3, Hkv=3, D=20, Dv=9), {}),
    "grouped": (dict(H=8, Hkv=2, N=70, D=32), dict(splits=2)),
    "one key head, several tiles of rows": (dict(B=3, H=20, Hkv=1, Nq=4), dict(splits=3)),
    "one split": (dict(N=70), dict(splits=1)),
    "more splits than tiles": (dict(N=37), dict(splits=9)),
    "three queries": (dict(Nq=3, N=50), dict(splits=2, scale=-0.4)),
    "three queries, not causal": (dict(Nq=3), dict(causal=False)),
    "starts": (dict(N=70), dict(splits=2, starts=(3, 17, 30))),
    "pages of two tiles": (dict(N=70, page=32), dict(splits=2)),
    "pages of 5": (dict(N=37, page=5, D=20), dict(splits=2, starts=(0, 6, 2))),
    "wide": (dict(H=2, Hkv=1, N=20, D=130, Dv=200), {}),
}


def _call(problem, lengths, *, backend="triton", starts=None, **kw):
    "Output and lse of one problem, and those of the reference in float64."
    q, k, v, table = _problem(**problem)
    N = problem.get("N", 37)
    n = _ints(*lengths).long()[:, None]
    if table is None:
        beyond = (torch.arange(N, device=q.device) >= n)[:, None, :, None]
        k, v = (t.masked_fill(beyond, torch.nan) for t in (k, v))
    kw |= dict(block_table=table, starts=None if starts is None else _ints(*starts))
    got = decode_attention(q, k, v, _ints(*lengths), return_lse=True, backend=backend, **kw)
    kw.pop("splits", None)
    want = decode_attention_reference(*(t.double() for t in (q, k, v)), _ints(*lengths), **kw)
    return got, want


@pytest.mark.parametrize("problem, kw", CASES.values(), ids=CASES)
def test_against_reference(problem, kw):
    N = problem.get("N", 37)
    for got, want in zip(*_call(problem, (N, N // 2, 4), **kw)):
        assert rel_error(got, want) < (2e-3 if device_under_test() == "cuda" else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_types(dtype):
    (out, lse), want = _call(dict(N=50, D=32, dtype=dtype), (50, 17, 1), splits=2)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert rel_error(out, want[0]) < 2e-2 and rel_error(lse, want[1]) < 2e-2


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("splits", [1, 3])
def test_rows_without_keys(backend, splits):
    (out, lse), _ = _call(dict(), (0, -3, 5), backend=backend, splits=splits)
    assert (
        (out[:2] == 0).all() and (lse[:2] == -torch.inf).all() and out[2].isfinite().all() and lse[2].isfinite().all()
    )
    (out, lse), _ = _call(dict(), (20, 9, 5), backend=backend, splits=splits, starts=(20, 30, 1))
    assert (out[:2] == 0).all() and (lse[:2] == -torch.inf).all() and (out[2] != 0).any()
    (out, lse), _ = _call(dict(Nq=3), (2, 1, 37), backend=backend, splits=splits)  # the first tokens are not there yet
    assert (lse == -torch.inf).sum(2).tolist() == [[1] * 4, [2] * 4, [0] * 4] and not out.isnan().any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_lengths_are_clamped(backend):
    q, k, v, _ = _problem()
    full, more = (
        decode_attention(q, k, v, _ints(*n, dtype=torch.int64), backend=backend) for n in ((37,) * 3, (99,) * 3)
    )
    assert torch.equal(full, more)


def test_rows_are_independent():
    q, k, v, _ = _problem(N=70)
    run = lambda *n: decode_attention(q, k, v, _ints(*n), backend="triton", splits=3)
    assert torch.equal(run(70, 33, 5)[1], run(1, 33, 70)[1]) and not torch.equal(run(70, 33, 5), run(70, 34, 5))


def test_manners():
    q, k, v, table = _problem(N=37, page=16)
    op = lambda q, k, v: decode_attention(q, k, v, _ints(37, 9, 0), block_table=table, backend="triton", splits=2)
    plain = _problem()[:3]
    static = lambda q, k, v: decode_attention(q, k, v, _ints(37, 9, 0), backend="triton", splits=2)
    for run, inputs in ((op, (q, k, v)), (static, plain)):
        check_deterministic(run, inputs, repeats=2, grad=False)
        check_writes_everything(run, inputs, grad=False)
        check_compiles(run, inputs, grad=False)
    check_strides(static, plain, grad=False)
    rows = _ints(9, 7, 37, 7, 0, 7)[::2]  # lengths with strides
    assert torch.equal(
        decode_attention(*plain, rows, backend="triton"), decode_attention(*plain, rows.clone(), backend="triton")
    )


def test_opcheck():
    q, k, v, table = _problem(N=32, page=16)
    check_opcheck(decode_attention_op, (q, k, v, _ints(32, 9, 0), None, table, True, 0.25, 2))
    check_opcheck(decode_attention_op, (*_problem()[:3], _ints(32, 9, 0), _ints(1, 2, 0), None, True, 0.25, 0))


def test_gradients_are_not_lost():
    q, k, v, _ = _problem()
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        decode_attention(q, k, v, _ints(5, 6, 7), backend="triton")
    assert decode_attention(q, k, v, _ints(5, 6, 7)).requires_grad
    with torch.no_grad():
        assert not decode_attention(q, k, v, _ints(5, 6, 7), backend="triton").requires_grad


def test_autocast_takes_the_caches_type():
    q, k, v, _ = _problem(dtype=torch.bfloat16)
    with torch.autocast(q.device.type, torch.bfloat16):
        assert torch.equal(decode_attention(q.float(), k, v, _ints(9, 9, 9)), decode_attention(q, k, v, _ints(9, 9, 9)))


def test_nothing_at_all():
    for B, N in ((0, 8), (2, 0)):
        q, k, v, _ = _problem(B=B, N=N)
        out, lse = decode_attention(q, k, v, _ints(*[3] * B), return_lse=True, backend="triton")
        assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()


def test_refusals():
    q, k, v, table = _problem(N=32, page=16)
    static = _problem()
    bad = [
        (dict(q=q[0]), ValueError, "q must have shape"),
        (dict(q=q.int()), TypeError, "q"),
        (dict(k_cache=static[1][:2]), ValueError, "k_cache"),
        (dict(k_cache=static[1].double()), TypeError, ["k_cache", "float32"]),
        (dict(v_cache=static[2][:, :, 1:]), ValueError, "v_cache"),
        (dict(v_cache=None), TypeError, "v_cache"),
        (dict(q=static[0][:, :3]), ValueError, "multiple"),
        (dict(q=static[0].expand(-1, -1, 17, -1)), ValueError, ["queries", "16", "17"]),
        (dict(lengths=_ints(1, 2)), ValueError, "lengths"),
        (dict(lengths=_ints(1, 1, 1).float()), TypeError, "lengths"),
        (dict(lengths=[1, 2, 3]), TypeError, "lengths"),
        (dict(lengths=None), TypeError, "lengths"),
        (dict(starts=_ints(1, 2)), ValueError, "starts"),
        (dict(block_table=table.long()), TypeError, "block_table"),
        (dict(block_table=table[:2]), ValueError, "block_table"),
        (dict(splits=0), ValueError, "splits"),
        (dict(scale="1"), TypeError, "scale"),
        (dict(causal=1), TypeError, "causal"),
        (dict(backend="cuda"), ValueError, "backend"),
    ]
    check_raises(decode_attention, bad, q=static[0], k_cache=static[1], v_cache=static[2], lengths=_ints(1, 2, 3))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("page", [0, 4], ids=["static", "paged"])
def test_appended(backend, page):
    _, k, v, table = _problem(Hkv=3, H=3, N=12, D=5, Dv=7, page=page)
    _, new_k, new_v, _ = _problem(Hkv=3, H=3, N=4, D=5, Dv=7, seed=1)
    dense = (lambda t: gather_pages(t, table)) if page else lambda t: t.clone()
    want, lengths = [dense(k), dense(v)], (0, 6, 10)
    for t, new in zip(want, (new_k, new_v)):
        for b, n in enumerate(lengths):
            t[b, :, n : n + 4] = new[b, :, : 12 - n]  # what lies beyond is dropped
    append_tokens(k, v, new_k, new_v, _ints(*lengths), block_table=table, backend=backend)
    assert torch.equal(dense(k), want[0]) and torch.equal(dense(v), want[1])
    append_tokens(k, v, new_k, new_v, _ints(12, 13, 99), block_table=table, backend=backend)
    assert torch.equal(dense(k), want[0]) and torch.equal(dense(v), want[1])


def test_append_refuses():
    _, k, v, _ = _problem()
    new = k[:, :, :2]
    bad = [
        (dict(k=new[:2]), ValueError, "k must"),
        (dict(v=new[..., 1:]), ValueError, "v must"),
        (dict(lengths=_ints(1, 1, 1).float()), TypeError, "lengths"),
        (dict(k_cache=k[0]), ValueError, "k_cache"),
        (dict(block_table=_ints(1, 2, 3)), ValueError, "block_table"),
    ]
    check_raises(append_tokens, bad, k_cache=k.clone(), v_cache=v.clone(), k=new, v=new, lengths=_ints(0, 0, 0))


def test_append_is_an_operation():
    _, k, v, _ = _problem()
    check_opcheck(append_op, (k.clone(), v.clone(), k[:, :, :2].clone(), v[:, :, :2].clone(), _ints(0, 5, 36), None))


@pytest.mark.cuda
def test_recorded():
    q, k, v, _ = (None if t is None else t.cuda() for t in _problem(N=300, D=64, dtype=torch.bfloat16))
    lengths = torch.tensor([250, 9, 0], dtype=torch.int32, device="cuda")
    new_k, new_v = k[:, :, :1].clone(), v[:, :, :1].clone()

    def step():
        append_tokens(k, v, new_k, new_v, lengths)
        lengths.add_(1)
        return decode_attention(q, k, v, lengths)

    for _ in range(2):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, decode_attention(q, k, v, lengths))
    want = decode_attention_reference(q.double(), k.double(), v.double(), lengths)[0]
    assert lengths.tolist() == [255, 14, 5] and rel_error(out, want) < 2e-2


def test_shares_of_the_floor():
    row = dict(B=32, N=8192, D=128, full=True, device="NVIDIA H200", method="ours", ms_fwd=0.5, gigabytes=1.2)
    assert floor_shares([row])[0].ratio == pytest.approx(0.5)
    assert floor_shares([row | dict(method="flash"), row | dict(device="cpu"), row | dict(ms_fwd=None)]) == []
    rule = claims()[1].rule
    for ms, verdict in ((0.3, "holds"), (0.34, "holds in part"), (0.5, "does not hold here")):
        assert rule(floor_shares([row | dict(ms_fwd=ms)]))[0] == verdict
    assert (
        claims()[0].rule({"a": 1.2, "b": 0.9})[0] == "holds in part"
        and claims()[0].rule({"a": 0.9})[0] == "does not hold here"
    )


def test_bench(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
    sizes = [(2, 4, 2, 32, 16, full) for full in (True, False)]
    rows = [r for r in bench_decode(sizes, rep_ms=1.0, device=device_under_test()) if r["ms_fwd"]]
    assert {r["full"] for r in rows if r["method"] == "ours"} == {True, False}
    assert all(r["difference"] < 0.03 for r in rows) and len(rows) > 3
    assert rows[0]["gigabytes"] == pytest.approx(decode_bytes(64, 4, 2, 16, 16, 2) / 1e9)


def test_folded_heads():
    q, k, v, _ = _problem(N=9)
    same = folded(torch.nn.functional.scaled_dot_product_attention)(q, k, v)
    assert rel_error(same, decode_attention(q, k, v, _ints(9, 9, 9), backend="torch")) < 1e-5

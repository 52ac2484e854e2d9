# Written from the test cells of nbs/1_foundations/12_clusters.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math

import pytest
import torch
import torch.nn.functional as F

from attnbook.attention import attention_reference
from attnbook.clusters.kernels import find_slots, sum_slots
from attnbook.clusters.op import (
    cluster_attention_op,
    list_attention,
    segment_attention,
    segment_tiles_op,
    select_largest,
    select_largest_op,
)
from attnbook.clusters.reference import FAR_BELOW, list_attention_gather, segment_attention_tiles
from attnbook.lab.testing import (
    check_against_reference,
    check_autocast,
    check_compiles,
    check_deterministic,
    check_empty_rows,
    check_opcheck,
    check_raises,
    check_strides,
    check_writes_everything,
    make_qkv,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test

GPU = device_under_test() == "cuda"


def _lists(B, H, n, k, w, seed=0, separate=False, empty=0):
    "Random lists of k groups; `empty` slots at the end of each are -1. Two of them: the same, or for keys others."
    g = torch.Generator().manual_seed(seed)
    lists = [torch.rand(B, H, k, n, generator=g).argsort(-1)[..., :w].sort(-1).values for _ in range(2)]
    lists = [x.masked_fill(torch.arange(w) >= w - empty, -1).int().to(device_under_test()) for x in lists]
    return lists if separate else lists[:1] * 2


def _segments(B, H, n, k, seed=0, skew=1.0):
    "(order, offsets) of random assignments; with `skew` above 1 some segments are large and some empty."
    g = torch.Generator().manual_seed(seed)
    key, order = ((torch.rand(B, H, n, generator=g) ** skew * k).long().clamp(max=k - 1)).sort(dim=-1, stable=True)
    offsets = torch.searchsorted(key, torch.arange(k + 1).expand(B, H, -1).contiguous())
    return order.int().to(device_under_test()), offsets.int().to(device_under_test())


def _groups(side):
    "Members of each group: booleans `(B, H, groups, n)`, and ranks within it."
    if isinstance(side, tuple):
        order, offsets = side
        rank = torch.arange(order.shape[2], device=order.device)
        inside = (rank >= offsets[..., :-1, None]) & (rank < offsets[..., 1:, None])
        member = torch.zeros_like(inside).scatter_(3, order.long()[:, :, None].expand_as(inside), inside)
    else:
        at = torch.where(side < 0, 99_999, side).long()
        member = (at[..., None] == torch.arange(1 + int(side.max()), device=side.device)).any(3)
    return member, member.cumsum(-1)


def _dense(a, b, causal, self_attention="include", window=None, scale=None):
    "Attention in groups as dense attention, once for each."

    def attend(q, k, v):
        (own, rank), (other, of_key) = (_groups(x) for x in (a, b))
        own, other = (F.pad(x, (0, t.shape[2] - x.shape[3])) for x, t in ((own, q), (other, k)))
        total = count = 0
        for c in range(own.shape[2]):
            seen = own[:, :, c, :, None] & other[:, :, c, None, :]
            if causal:
                seen = seen.tril()
            if window:
                seen = seen & (of_key[:, :, c, None, :] > rank[:, :, c, :, None] - window)
            bias = (
                torch.eye(q.shape[2], device=q.device, dtype=q.dtype) * FAR_BELOW
                if self_attention == "fallback"
                else None
            )
            total = total + attention_reference(q, k, v, mask=seen, scale=scale, bias=bias)
            count = count + own[:, :, c, :, None].to(q.dtype)
        return total / count.clamp_min(1)

    return attend


WAYS = dict(
    causal=dict(causal=True), all=dict(causal=False), fallback=dict(causal=True, self_attention="fallback", scale=0.3)
)
LISTS = dict(shared=dict(), separate=dict(separate=True), padded=dict(empty=2))


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_gather_is_dense_attention_in_groups(how, lists):
    q, k, v = make_qkv(2, 2, 21, 8, Dv=5, dtype=torch.float64)
    a, b = _lists(2, 2, 21, 5, 6, **lists)
    assert rel_error(list_attention_gather(q, k, v, a, b, **how), _dense(a, b, **how)(q, k, v)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("name", ["q_lists", "k_lists"])
def test_lists_are_int32(name, dtype):
    "The kernels read 32 bits a number; mechanisms convert what they are given."
    q, k, v = make_qkv(2, 2, 21, 8)
    lists = dict(zip(("q_lists", "k_lists"), _lists(2, 2, 21, 5, 6)))
    lists[name] = lists[name].to(dtype)
    with pytest.raises(TypeError, match=f"{name} must be of type int32"):
        list_attention(q, k, v, **lists, causal=True, scale=0.3, backend="triton")


@pytest.mark.parametrize("how", [*WAYS.values(), dict(causal=True, window=5)], ids=[*WAYS, "window"])
def test_tiles_are_dense_attention_in_groups(how):
    q, k, v = make_qkv(2, 2, 70, 8, Dv=5, dtype=torch.float64)
    a, b = _segments(2, 2, 70, 6, skew=3.0), _segments(2, 2, 70, 6, seed=1)
    for b in (a,) if "window" in how else (a, b):
        got = segment_attention_tiles(q, k, v, a, b, tile=8, **how)
        assert rel_error(got, _dense(a, b, **how)(q, k, v)) < 1e-12


def test_segments_are_causal_to_the_bit():
    "Whatever the later tokens are, wherever they go and however many there are: the first 60 outputs stay as they are."
    g = torch.Generator().manual_seed(0)
    x, group, outs = torch.randn(1, 2, 60, 16, generator=g), torch.randint(4, (1, 2, 60), generator=g), []
    for later in (70, 57, 44, 31, 2):
        y = torch.cat([x, torch.randn(1, 2, later, 16, generator=g)], 2).to(device_under_test())
        key, order = torch.cat([group, torch.randint(4, (1, 2, later), generator=g)], 2).sort(dim=-1, stable=True)
        s = [t.to(y.device) for t in (order, torch.searchsorted(key, torch.arange(5).expand(1, 2, -1).contiguous()))]
        outs.append(segment_attention_tiles(y, y, y, s, s, causal=True)[:, :, :60])
    assert all(torch.equal(o, outs[0]) for o in outs)


def _hard_rows(n):
    "Eight rows, six of them hard."
    s = torch.randn(8, n, generator=torch.Generator().manual_seed(0)).to(device_under_test())
    s[1] = s[1].round()  # ties at the limit
    s[2] = torch.where(s[2] > 0, 0.0, -0.0)  # these are equal
    s[3, ::3] = s[3].max()  # more candidates than lanes
    s[4, 5:] = -math.inf  # too few
    s[5], s[6] = -math.inf, -s[6].abs() - 1e30
    return s


SELECTIONS = [(64, 7), (130, 9), (150, 90)] + [(200, 90), (5000, 300), (9000, 2500)] * GPU


@pytest.mark.parametrize("n, w", SELECTIONS)
def test_selection_is_exact(n, w):
    s = _hard_rows(n)
    assert torch.equal(select_largest(s, w, backend="triton"), select_largest(s, w, backend="torch"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ties_go_to_the_earlier(backend):
    s = torch.tensor([[1.0, 2, 2, 2, 0, 2]], device=device_under_test())
    assert select_largest(s, 3, backend=backend).tolist() == [[1, 2, 3]]
    assert select_largest(s, 9, backend=backend).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_selection_as_an_operation():
    check_opcheck(select_largest_op, (_hard_rows(20)[:3], 5))
    bad = [
        (dict(count=0), ValueError, ["count", "0"]),
        (dict(count=2.0), TypeError, ["count", "2.0"]),
        (dict(scores=torch.ones(2, 3).int()), TypeError, ["scores", "int32"]),
    ]
    check_raises(select_largest, bad, scores=torch.zeros(2, 3), count=2)


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("often", [1, 3, 9, 20], ids="{} more slots".format)
def test_folding(often, mean):
    "Row 3 stands in `often` lists more than chance puts it there, row 5 in none."
    g = torch.Generator().manual_seed(0)
    index = torch.randint(-1, 18, (1, 2, 20, 2), generator=g).int()
    index[:, :, :often, 0] = 3
    index = index.masked_fill(index == 5, -1).to(device_under_test())
    xs = [torch.randn(1, 2, 40, d, generator=g).to(index.device) for d in (16, 5)]
    counts, table = find_slots(index, 18)
    flat = index.flatten(2).long()
    assert torch.equal(counts, (flat[:, :, None] == torch.arange(18, device=flat.device)[:, None]).sum(-1).int())
    for x, y in zip(xs, sum_slots(xs, index, counts, table, mean)):
        at = torch.where(flat < 0, 18, flat)[..., None].expand_as(x)
        want = x.new_zeros(1, 2, 19, x.shape[3]).scatter_add(2, at, x)[:, :, :18]
        want = want / counts.clamp_min(1)[..., None] if mean else want
        assert rel_error(y, want) < 1e-6 and (y[:, :, 5] == 0).all()


def test_folding_has_one_order():
    g = torch.Generator().manual_seed(1)
    index = torch.randint(0, 5, (1, 1, 8, 5), generator=g).int().to(device_under_test())
    x = torch.randn(1, 1, 40, 16, generator=g).to(index.device)
    first, *more = (sum_slots([x], index, *find_slots(index, 5))[0] for _ in range(3))
    assert all(torch.equal(first, y) for y in more)
    check_writes_everything(lambda x: sum_slots([x], index, *find_slots(index, 5))[0], (x,), grad=False)


CASES = {  # n, d, dv, groups, width, two lists, empty slots, arguments
    "causal": (21, 16, 16, 5, 6, False, 0, dict(causal=True)),
    "two tiles": (40, 16, 16, 2, 37, False, 0, dict(causal=True)),
    "two lists, odd dims": (21, 20, 9, 5, 6, True, 0, dict(causal=True)),
    "two lists, not causal": (33, 16, 16, 2, 17, True, 0, dict(causal=False)),
    "padded, not causal": (21, 16, 16, 4, 9, False, 3, dict(causal=False, scale=0.5)),
    "padded, fallback": (24, 16, 16, 4, 18, False, 2, dict(causal=True, self_attention="fallback")),
    "two lists, fallback": (20, 16, 16, 3, 7, True, 1, dict(causal=True, self_attention="fallback")),
} | {
    f"{w} wide, {c}": (400, 64, 64, 3, w, two, 0, dict(causal=c))  # several tiles of 64
    for w, two, c in ((256, False, True), (300, False, True), (200, True, False))
    if GPU
}


def _attend(a, b, shared, **kw):
    "The operation under test, for lists or segments, as a function of q, k, v."
    f = segment_attention if isinstance(a, tuple) else list_attention
    return lambda q, k, v: f(
        q, k, v, a, None if shared else b, **dict(scale=q.shape[-1] ** -0.5, backend="triton") | kw
    )


@pytest.mark.parametrize("n, d, dv, c, w, two, empty, kw", CASES.values(), ids=CASES)
def test_lists(n, d, dv, c, w, two, empty, kw):
    a, b = _lists(1, 2, n, c, w, separate=two, empty=empty)
    op = _attend(a, b, not two, padded=empty > 0, **kw)
    check_against_reference(op, _dense(a, b, **kw), make_qkv(1, 2, n, d, Dv=dv), tol=2e-5)


SEGMENT_CASES = {  # n, d, segments, skew, two sides, arguments
    "causal": (21, 16, 5, 1.0, False, dict(causal=True)),
    "window": (70, 16, 3, 3.0, False, dict(causal=True, window=9)),
    "many, odd dim": (25, 20, 18, 2.0, False, dict(causal=False)),
    "two sides, causal": (33, 16, 4, 1.0, True, dict(causal=True)),
    "two sides, not causal": (33, 16, 4, 1.0, True, dict(causal=False, scale=0.3)),
    "fallback": (50, 16, 4, 2.0, False, dict(causal=True, self_attention="fallback", window=3)),
    "one token": (1, 16, 2, 1.0, False, dict(causal=True)),
}


@pytest.mark.parametrize("n, d, c, skew, two, kw", SEGMENT_CASES.values(), ids=SEGMENT_CASES)
def test_segments(n, d, c, skew, two, kw):
    a = _segments(1, 2, n, c, skew=skew)
    b = _segments(1, 2, n, c, seed=1, skew=skew) if two else a
    check_against_reference(_attend(a, b, not two, **kw), _dense(a, b, **kw), make_qkv(1, 2, n, d), tol=2e-5, floor=0.1)


SIZES = (400, 3, 300, 64) if GPU else (25, 4, 8, 24)  # n, groups, width, head_dim
GROUPS = dict(lists=lambda n, k, w: _lists(1, 2, n, k, w)[0], segments=lambda n, k, w: _segments(1, 2, n, k))


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_types(dtype, group):
    m = group(*SIZES[:3])
    check_against_reference(
        _attend(m, m, True, causal=True),
        _dense(m, m, causal=True),
        make_qkv(1, 2, SIZES[0], SIZES[3]),
        dtype=dtype,
        tol=2e-2,
    )


@pytest.mark.parametrize("last", ["include", "fallback"])
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_shared_queries_and_keys(group, last):
    n, k, w, d = (400, 3, 300, 64) if GPU else (40, 3, 37, 16)
    (x, _, v), m, kw = make_qkv(1, 2, n, d), group(n, k, w), dict(causal=True, self_attention=last)
    check_against_reference(
        lambda x, v: _attend(m, m, True, **kw)(x, x, v),
        lambda x, v: _dense(m, m, **kw)(x, x, v),
        (x, v),
        tol=2e-5,
        floor=0.1,
    )


OFTEN = {"8, one list": (9, 8, False), "20, one list": (21, 20, False), "20, two lists": (21, 20, True)}


@pytest.mark.parametrize("groups, often, two", OFTEN.values(), ids=OFTEN)
def test_tokens_in_many_groups(groups, often, two):
    a, b = _lists(1, 1, 18, groups, 2, separate=two)
    a[:, :, :often, 0], b[:, :, :often, 0] = 0, 0
    a[:, :, :often, 1:], b[:, :, :often, 1:] = (x[:, :, :often, 1:].clamp_min(1) for x in (a.clone(), b.clone()))
    op, inputs = _attend(a, b, not two, causal=True), make_qkv(1, 1, 18, 16)
    check_against_reference(op, lambda q, k, v: list_attention_gather(q, k, v, a, b, causal=True), inputs, tol=2e-5)
    check_deterministic(op, inputs, repeats=2)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_without_keys(backend):
    a, b = _segments(1, 1, 18, 3), _segments(1, 1, 18, 3)
    b[1][..., 1:3] = 0  # all keys in the last segment
    empty = torch.ones(1, 1, 18, dtype=torch.bool, device=a[0].device)
    empty[0, 0, a[0][0, 0, a[1][0, 0, 2] :].long()] = False
    check_empty_rows(_attend(a, b, False, causal=False, backend=backend), make_qkv(1, 1, 18, 16), empty)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("B, n, m", [(0, 8, 8), (1, 0, 0), (1, 5, 0)], ids=["no batch", "no tokens", "no keys"])
def test_nothing_to_compute(B, n, m, backend):
    q, k = (torch.zeros(B, 2, x, 16, device=device_under_test(), requires_grad=True) for x in (n, m))
    for sides in [_segments(B, 2, x, 3) for x in (n, m)], [_segments(B, 2, x, 3)[0][:, :, None] for x in (n, m)]:
        out = _attend(*sides, False, causal=False, backend=backend)(q, k, k)
        grads = torch.autograd.grad(out.sum(), (q, k))
        assert out.shape == q.shape and (out == 0).all() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_manners(group):
    op, inputs = _attend(m := group(19, 3, 8), m, True, causal=True), make_qkv(1, 2, 19, 16)
    check_strides(op, inputs, tol=2e-5)
    check_deterministic(op, inputs, repeats=2)
    check_writes_everything(op, inputs)
    check_compiles(op, inputs, tol=2e-5)
    check_autocast(op, inputs, tol=2e-2)


def test_the_operations_of_the_library():
    q, k, v = make_qkv(1, 1, 12, 16, requires_grad=True)
    a, b = _lists(1, 1, 12, 3, 4, separate=True)
    check_opcheck(cluster_attention_op, (q, None, v, a, None, [1, 0, 0], 0.25))
    check_opcheck(cluster_attention_op, (q, k, v, a, b, [1, 0, 0], 0.25), test_utils=("test_schema", "test_faketensor"))
    check_opcheck(segment_tiles_op, (_segments(1, 2, 20, 3)[1], 8, 16))

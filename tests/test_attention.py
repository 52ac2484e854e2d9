# Written from the test cells of nbs/1_foundations/00_attention.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math

import numpy as np
import torch
import torch.nn.functional as F

from attnbook.attention import (
    attention_backward,
    attention_bytes,
    attention_flops,
    attention_mask,
    attention_pairs,
    attention_reference,
    merge_attention,
    online_attention,
    online_step,
    softmax_lse,
)
from attnbook.lab.testing import check_empty_rows, check_gradients, check_raises, device, make_qkv, rel_error, tolerance


def test_scaled_scores_have_unit_variance():
    g = torch.Generator().manual_seed(0)
    for D in (16, 64, 256):
        q, k = torch.randn(20000, D, generator=g), torch.randn(20000, D, generator=g)
        assert abs(((q * k).sum(-1) * D**-0.5).var() - 1) < 0.06


def test_softmax_is_stable_and_shift_invariant():
    s = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)).to(device())
    weights, lse = softmax_lse(s)
    assert rel_error(weights, s.double().softmax(-1)) < 1e-6 and rel_error(lse, s.double().logsumexp(-1)) < 1e-6
    for shift in (-1e4, -100, 100, 1e4):
        shifted, shifted_lse = softmax_lse((s.double() + shift))
        assert rel_error(shifted, s.double().softmax(-1)) < 1e-10 and rel_error(shifted_lse - shift, lse) < 1e-6
    weights, _ = softmax_lse(torch.tensor([3e38, -3e38, 0.0], device=device()))
    assert weights.tolist() == [1, 0, 0]


def test_softmax_of_nothing():
    s = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(device()).requires_grad_()
    mask = torch.tensor([True, False, True, False], device=device())[:, None]
    weights, lse = softmax_lse(s, mask)
    (weights.pow(2).sum() + lse[mask[:, 0]].sum()).backward()
    assert (weights[1::2] == 0).all() and (lse[1::2] == -math.inf).all()
    assert s.grad.isfinite().all() and (s.grad[1::2] == 0).all() and (s.grad[::2] != 0).any()
    weights, lse = softmax_lse(s[:, :0])
    assert weights.shape == (4, 0) and (lse == -math.inf).all()


def test_online_softmax_keeps_its_invariant():
    g = torch.Generator().manual_seed(0)
    s = (torch.randn(3, 40, generator=g, dtype=torch.float64) + torch.linspace(-300, 300, 40)).to(device())
    v = torch.randn(3, 40, 5, generator=g, dtype=torch.float64).to(device())
    s[1, :10] = -math.inf
    m = torch.full((3,), -math.inf, dtype=torch.float64, device=device())
    state = m, torch.zeros_like(m), v.new_zeros(3, 5)
    for j in range(0, 40, 4):
        state = online_step(state, s[:, j : j + 4], v[:, j : j + 4])
        seen, (m, ell, a) = s[:, : j + 4], state
        assert torch.equal(m, seen.amax(-1))
        if j + 4 > 10:
            p = torch.exp(seen - m[:, None])
            assert rel_error(ell, p.sum(-1)) < 1e-13
            assert rel_error(a, torch.einsum("bj,bje->be", p, v[:, : j + 4])) < 1e-13


def test_online_attention():
    g = torch.Generator().manual_seed(1)
    s, v = torch.randn(4, 37, generator=g).to(device()), torch.randn(4, 37, 6, generator=g).to(device())
    s[2] = -math.inf
    for tile in (1, 5, 37, 64):
        out, lse = online_attention(s, v, tile)
        weights, want = softmax_lse(s)
        assert rel_error(out, torch.einsum("bj,bje->be", weights, v)) < 1e-6 and rel_error(lse, want) < 1e-6
        assert (out[2] == 0).all()


def test_merge():
    g = torch.Generator().manual_seed(0)
    s, v = (torch.randn(*shape, generator=g, dtype=torch.float64).to(device()) for shape in ((4, 30), (4, 30, 3)))
    s[3] = -math.inf  # a row without keys in any part
    part = lambda a, b: online_attention(s[:, a:b], v[:, a:b])
    a, b, c = part(0, 7), part(7, 8), part(8, 30)
    left, right = merge_attention(*merge_attention(*a, *b), *c), merge_attention(*a, *merge_attention(*b, *c))
    for got in (left, right, merge_attention(*merge_attention(*c, *a), *b)):  # associative, commutative
        assert all(rel_error(x, y) < 1e-12 for x, y in zip(got, part(0, 30)))
    nothing = torch.zeros_like(a[0]), torch.full_like(a[1], -math.inf)
    assert all(torch.equal(x, y) for x, y in zip(merge_attention(*a, *nothing), a))


def test_merge_refuses_shapes_that_do_not_fit():
    x, y = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    check_raises(
        merge_attention,
        [({"out_b": x[..., :2]}, ValueError, "v_dim"), ({"lse_a": x}, ValueError, "lse_a")],
        out_a=x,
        lse_a=y,
        out_b=x,
        lse_b=y,
    )


def test_queries_may_stand_later_among_the_keys():
    "With more keys than queries, as with a cache: the last rows of the whole mask."
    for kw in ({"is_causal": True}, {"is_causal": True, "window_size": 4}, {"window_size": 3}):
        whole = attention_mask(12, 12, **kw)
        for n in (1, 5, 12):
            assert torch.equal(attention_mask(n, 12, q_offset=12 - n, **kw), whole[-n:])
    assert not attention_mask(3, 2, is_causal=True, q_offset=-3).any()


def test_known_answers():
    q, k, v = make_qkv(dtype=torch.float64)
    assert rel_error(attention_reference(q, k, v, scale=0), v.mean(2, keepdim=True).expand_as(v)) < 1e-14
    running_mean = v.cumsum(2) / torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
    assert rel_error(attention_reference(q, k, v, scale=0.0, is_causal=True), running_mean) < 1e-14
    assert torch.equal(attention_reference(q, k, v, is_causal=True)[:, :, 0], v[:, :, 0])
    assert torch.equal(attention_reference(q, k, v, is_causal=True, window_size=1), v)
    assert torch.equal(attention_reference(q, k, v, window_size=1), v)
    assert torch.equal(attention_reference(q, k, v, window_size=np.int64(1)), v)
    assert torch.equal(attention_reference(q[:, :, :1], k[:, :, :1], v[:, :, :1]), v[:, :, :1])
    shifted = attention_reference(q, k, v, bias=torch.randn(v.shape[2], 1, device=v.device))  # a bias per query cancels
    assert rel_error(shifted, attention_reference(q, k, v)) < 1e-13
    _, lse = attention_reference(q, k, v, scale=0, return_lse=True)
    assert rel_error(lse, torch.full_like(lse, math.log(v.shape[2]))) < 1e-14


def test_split_and_merged_is_whole():
    q, k, v = make_qkv(dtype=torch.float64, kv_heads=2, Nk=50, Dv=8)
    a = attention_reference(q, k[:, :, :13], v[:, :, :13], return_lse=True)
    b = attention_reference(q, k[:, :, 13:], v[:, :, 13:], return_lse=True)
    whole = attention_reference(q, k, v, return_lse=True)
    assert all(rel_error(x, y) < 1e-13 for x, y in zip(merge_attention(*a, *b), whole))


def test_agrees_with_torch():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        q, k, v = make_qkv(kv_heads=2, Nk=29, Dv=8, dtype=dtype)
        bias = torch.randn(4, 37, 29, generator=torch.Generator().manual_seed(2)).to(device(), dtype)
        for kw in ({}, {"is_causal": True}, {"window_size": 11}, {"is_causal": True, "window_size": 9}):
            allowed = attention_mask(37, 29, **kw, device=device())
            mask = bias.double() if allowed is None else bias.double().masked_fill(~allowed, -math.inf)
            want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, enable_gqa=True)
            rows = slice(None) if allowed is None else allowed.any(-1)  # torch gives no promise for empty rows
            out = attention_reference(q, k, v, bias=bias, **kw)
            assert out.dtype == dtype and rel_error(out[:, :, rows], want[:, :, rows]) < tolerance(dtype, device())


def test_grouped_heads_repeat_neighbours():
    q, k, v = make_qkv(heads=6, kv_heads=2, dtype=torch.float64)
    repeated = attention_reference(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    assert rel_error(attention_reference(q, k, v), repeated) < 1e-14
    other = attention_reference(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))  # heads in another order
    assert rel_error(other, repeated) > 0.1


def test_rows_without_keys():
    inputs = make_qkv(Nq=12, Nk=4, heads=2)
    window = attention_mask(12, 4, is_causal=True, window_size=4, device=device())
    assert (~window.any(-1)).tolist() == [False] * 7 + [True] * 5

    def op(q, k, v):
        return attention_reference(q, k, v, is_causal=True, window_size=4, return_lse=True)

    check_empty_rows(op, inputs, ~window.any(-1))
    mask = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)).to(device()) < 0.3
    check_empty_rows(lambda q, k, v: attention_reference(q, k, v, mask=mask, return_lse=True), inputs, ~mask.any(-1))
    q, k, v = inputs
    out, lse = attention_reference(q, k[:, :, :0], v[:, :, :0], return_lse=True)  # no keys at all
    assert (out == 0).all() and (lse == -math.inf).all()


def test_types_and_autocast():
    for dtype, lse_dtype in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        out, lse = attention_reference(*make_qkv(Nq=5, dtype=dtype), return_lse=True)
        assert out.dtype == dtype and lse.dtype == lse_dtype
    q, k, v = make_qkv()
    with torch.autocast(device(), torch.bfloat16):  # an oracle is not to be rounded
        out = attention_reference(q, k, v)
    assert torch.equal(out, attention_reference(q, k, v))


def test_bad_input_is_refused_by_name():
    q, k, v = make_qkv(Nq=5)
    check_raises(
        attention_reference,
        [
            ({"q": [1.0]}, TypeError, ["q", "list"]),
            ({"k": k.long()}, TypeError, ["k", "floating-point", "int64"]),
            ({"v": v[0]}, ValueError, ["v", "4 dimensions", "(4, 5, 16)"]),
            ({"k": k[:1]}, ValueError, ["k", "batch size 2"]),
            ({"v": v[:, :, 1:]}, ValueError, ["v", "length", "(2, 4, 4)"]),
            ({"q": q[..., 1:]}, ValueError, ["head_dim", "15"]),
            ({"q": q[:, :3]}, ValueError, ["heads", "multiple", "4", "3"]),
            ({"is_causal": 1}, TypeError, ["is_causal", "1"]),
            ({"window_size": 0}, ValueError, ["window_size", "positive", "0"]),
            ({"window_size": 2.0}, ValueError, ["window_size", "2.0"]),
            ({"scale": math.nan}, ValueError, ["scale", "finite", "nan"]),
            ({"bias": torch.zeros(7, 5)}, ValueError, ["bias", "broadcast", "(2, 4, 5, 5)", "(7, 5)"]),
            ({"bias": torch.ones(5, 5, dtype=torch.bool)}, TypeError, ["bias", "bool"]),
            ({"mask": torch.zeros(5, 5)}, TypeError, ["mask", "boolean", "float32"]),
        ],
        q=q,
        k=k,
        v=v,
    )


def test_gradients_by_hand_agree_with_autograd():
    q, k, v = make_qkv(heads=4, kv_heads=2, Nk=29, Dv=8, dtype=torch.float64, requires_grad=True)
    g = torch.Generator().manual_seed(5)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(device())
    bias, mask = rand(2, 4, 37, 29).requires_grad_(), rand(37, 29) > 0
    mask[3] = False  # a row without keys
    d_out, d_lse = rand(2, 4, 37, 8), rand(2, 4, 37)
    out, lse = attention_reference(q, k, v, bias=bias, mask=mask, return_lse=True)
    want = torch.autograd.grad((out, lse), (q, k, v, bias), (d_out, d_lse))
    with torch.no_grad():
        got = attention_backward(q, k, v, out, lse, d_out, d_lse, bias=bias, mask=mask)
        no_lse = attention_backward(q, k, v, out, lse, d_out, bias=bias, mask=mask)
    assert all(rel_error(a, b) < 1e-12 for a, b in zip(got, want))
    assert rel_error(no_lse[0], want[0]) > 0.01  # the term is not negligible


def test_gradients_agree_with_finite_differences():
    for kw in ({}, {"is_causal": True}, {"window_size": 5}, {"scale": 0.3}):

        def op(q, k, v, bias, kw=kw):
            return attention_reference(q, k, v, bias=bias, return_lse=True, **kw)

        bias = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(6)).to(device())
        check_gradients(op, (*make_qkv(heads=2, kv_heads=1, Nq=9, D=4, Dv=3), bias))


def test_float32_sums_do_not_lose_with_length():
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        for n in (16, 4096):
            q, k, v = (torch.randn(1, 1, m, 64, generator=g).to(device(), dtype) for m in (16, n, n))
            want = attention_reference(q.double(), k.double(), v.double())
            assert rel_error(attention_reference(q, k, v), want) < tolerance(dtype)


def test_pairs_are_those_of_the_mask():
    cases = [(7, 9, False, None), (7, 9, True, None), (9, 7, True, 3), (7, 9, False, 3), (9, 4, True, 4)]
    for nq, nk, causal, w in cases:
        mask = attention_mask(nq, nk, is_causal=causal, window_size=w)
        want = nq * nk if mask is None else mask.sum()
        assert attention_pairs(nq, nk, is_causal=causal, window_size=w) == want


def test_flops_and_bytes():
    assert attention_flops(10, 64) == 4 * 10 * 64 and attention_flops(10, 64, backward=True) == 10 * 10 * 64
    assert attention_flops(10, 64, 32) == 2 * 10 * 96
    assert attention_bytes(1, 1, 100, 100, 64) == 4 * 100 * 64 * 2 + 400
    assert attention_bytes(2, 8, 100, 50, 64, 32, kv_heads=2) == 2 * (2 * (8 * 100 * 96 + 2 * 50 * 96) + 4 * 800)
    assert attention_bytes(1, 1, 100, 100, 64, scores=True) == attention_bytes(1, 1, 100, 100, 64) + 4 * 100 * 100 * 2

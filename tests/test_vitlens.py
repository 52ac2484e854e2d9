# Written from the test cells of nbs/7_looking_inside/vitlens.ipynb by `attnbook export`. Do not edit.
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnbook.engine import Launch, arch_of
from attnbook.lab.testing import (
    check_against_reference,
    check_autocast,
    check_compiles,
    check_deterministic,
    check_gradients,
    check_opcheck,
    check_raises,
    check_strides,
    check_writes_everything,
    make_qkv,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.vitlens.kernels import launch_lens, lens_constants
from attnbook.vitlens.op import attention_stats, lens_op
from attnbook.vitlens.reference import (
    attention_stats_blocks,
    attention_stats_reference,
    displacement_pair_counts,
    displacement_sums,
    hop_pair_counts,
    hop_profile,
    js_divergence,
    mean_attention_distance,
    sum_diagonals,
    value_weighted,
)


def test_sums_over_diagonals():
    a = torch.arange(12.0).reshape(3, 4)
    assert sum_diagonals(a).tolist() == [8.0, 13.0, 15.0, 18.0, 9.0, 3.0]
    for Q, K in ((1, 5), (4, 1), (3, 7)):
        a = torch.randn(2, Q, K)
        want = torch.stack([sum(a[:, q, q + s] for q in range(Q) if 0 <= q + s < K) for s in range(1 - Q, K)], -1)
        torch.testing.assert_close(sum_diagonals(a), want)


@pytest.mark.parametrize("H, W, first, R", [(4, 3, 0, 4), (4, 3, 1, 2), (4, 3, 3, 1), (1, 5, 0, 1), (3, 1, 0, 2)])
def test_displacements_are_summed(H, W, first, R):
    a, want = torch.rand(R, W, H, W, dtype=torch.float64), torch.zeros(2 * H - 1, 2 * W - 1, dtype=torch.float64)
    for r, x, v, u in np.ndindex(*a.shape): want[v - (first + r) + H - 1, u - x + W - 1] += a[r, x, v, u]
    torch.testing.assert_close(displacement_sums(a, first), want)


def test_pair_counts():
    assert hop_pair_counts((7, 7)).tolist() == [49, 312, 480, 528, 480, 360, 192]
    for H, W in ((5, 8), (1, 4), (3, 1), (1, 1)):
        places = [(y, x) for y in range(H) for x in range(W)]
        hops = [max(abs(a - c), abs(b - d)) for a, b in places for c, d in places]
        assert hop_pair_counts((H, W)).tolist() == [hops.count(k) for k in range(max(H, W))]
        counts = displacement_pair_counts((H, W))
        assert counts.sum() == (H * W)**2 and counts[0, 0] == 1 and counts[H - 1, W - 1] == H * W
    with pytest.raises(ValueError, match="grid_size"): hop_pair_counts((0, 3))


def test_uniform_attention_has_lift_one():
    M = displacement_pair_counts((5, 8)).double() / 40**2
    torch.testing.assert_close(hop_profile(M), torch.ones(8, dtype=torch.float64))
    assert hop_profile(M, kind="mass")[2] > 2 * hop_profile(M, kind="mass")[0]            # geometry alone
    torch.testing.assert_close(hop_profile(M, kind="mass").sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(hop_profile(M, kind="mean"), torch.full((8,), 1 / 40, dtype=torch.float64))
    torch.testing.assert_close(hop_profile(M / 4, renormalize=True), hop_profile(M))
    with pytest.raises(ValueError, match="kind must be one of 'mass', 'mean', 'lift', not 'sum'"):
        hop_profile(M, kind="sum")


def test_mean_distance():
    M = torch.zeros(5, 7)
    M[2 + 1, 3 - 2], M[2, 3] = 0.5, 0.25                                                  # (1, -2) and itself
    assert mean_attention_distance(M) == pytest.approx(0.5 * math.sqrt(5))
    assert mean_attention_distance(M, p=math.inf, patch_size=16) == 0.5 * 2 * 16
    assert mean_attention_distance(M, renormalize=True) == pytest.approx(0.5 * math.sqrt(5) / 0.75)


def test_js_divergence():
    p = torch.tensor([0.5, 0.5, 0.0]).log()
    one, other = torch.tensor([1.0, 0.0, 0.0]).log(), torch.tensor([0.0, 0.0, 1.0]).log()
    assert js_divergence(p, p) == 0 and js_divergence(one, other) == 1
    assert js_divergence(p, one) == js_divergence(one, p)
    m = torch.tensor([0.75, 0.25])
    want = 0.5 * (0.5 * (0.5 / m).log().sum()) + 0.5 * (1 / m[0]).log()
    assert js_divergence(p, one, base=math.e) == pytest.approx(float(want))


def _stats_inputs(B=2, h=2, grid=(3, 4), p=1, d=8, **kw):
    return make_qkv(B, h, p + grid[0] * grid[1], d, **kw), dict(grid_size=grid, num_prefix_tokens=p)


@pytest.mark.parametrize("grid, p", [((3, 4), 0), ((5, 2), 1), ((1, 4), 3), ((1, 1), 1)], ids=str)
def test_statistics_of_uniform_attention(grid, p):
    (q, k, v), kw = _stats_inputs(grid=grid, p=p, dtype=torch.float64)
    s, N, T = attention_stats_reference(q * 0, k, v, **kw), math.prod(grid), p + math.prod(grid)
    torch.testing.assert_close(s.displacement, (displacement_pair_counts(grid).to(q) / (N * T)).expand_as(s.displacement))
    torch.testing.assert_close(s.entropy, torch.full_like(s.entropy, math.log(T)))
    torch.testing.assert_close(s.received, torch.ones_like(s.received))
    torch.testing.assert_close(s.out, v.mean(2, keepdim=True).expand_as(v))
    assert s.prefix_mass.shape == (2, 2, T, p)


def test_histogram_and_prefix_mass_sum_to_one():
    (q, k, _), kw = _stats_inputs(p=2, dtype=torch.float64)
    s = attention_stats_reference(q, k, **kw)
    torch.testing.assert_close(s.displacement.sum((-2, -1)), 1 - s.prefix_mass[:, :, 2:].sum(-1).mean(-1))
    assert s.out is None


def test_permuted_patches_change_the_histogram_and_not_the_entropy():
    (q, k, _), kw = _stats_inputs(p=0, dtype=torch.float64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).to(q.device)
    a, b = (attention_stats_reference(x, y, **kw) for x, y in ((q, k), (q[:, :, order], k[:, :, order])))
    torch.testing.assert_close(a.entropy[:, :, order], b.entropy)
    assert rel_error(a.displacement, b.displacement) > 0.1


def test_value_weighted_attention():
    (q, k, v), kw = _stats_inputs(dtype=torch.float64)
    weight = torch.randn(10, 16, dtype=torch.float64, device=q.device)
    s = attention_stats_reference(*value_weighted(q, k, v, weight), **kw, scale=8**-0.5)
    A = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    norm = torch.stack([(v[:, m] @ weight[:, 8 * m:8 * m + 8].T).norm(dim=-1) for m in range(2)], 1)
    want = A * norm[:, :, None]
    want = want / want.sum(-1, keepdim=True)
    torch.testing.assert_close(s.received, want.sum(-2))
    torch.testing.assert_close(s.prefix_mass, want[..., :1])


GRIDS = {  # grid, prefix tokens
    "3 x 4": ((3, 4), 1), "5 x 9, two in front": ((5, 9), 2), "1 x 6": ((1, 6), 0), "6 x 1": ((6, 1), 1),
    "one patch": ((1, 1), 0)}


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("grid, p", GRIDS.values(), ids=GRIDS)
def test_blocks_agree_with_the_reference(grid, p, rows, monkeypatch):
    (q, k, v), kw = _stats_inputs(grid=grid, p=p, kv_heads=1, Dv=5)
    monkeypatch.setitem(attention_stats_blocks.__globals__, "BLOCK_NUMBERS", rows * 4 * (p + math.prod(grid)) * grid[1])
    some = lambda f: lambda *x: tuple(t for t in f(*x, **kw) if t.numel())                # without prefix no prefix mass
    check_against_reference(some(attention_stats_blocks), some(attention_stats_reference), (q, k, v), tol=1e-5, floor=1e-2)


def test_reference_has_the_right_gradients():
    (q, k, v), kw = _stats_inputs(p=2)
    check_gradients(lambda *x: tuple(attention_stats_reference(*x, **kw)), (q, k, v))
    check_gradients(lambda *x: tuple(attention_stats_blocks(*x, **kw)), (q, k, v))


def _tuple(op, **kw):
    "An operation that returns the statistics that are not empty, as a tuple."
    return lambda *x: tuple(t for t in op(*x, **kw) if t is not None and t.numel())


CASES = {  # grid, prefix, heads, kv_heads, head_dim, v_dim
    "4 x 5": ((4, 5), 1, 2, 2, 16, 16), "7 x 7, odd dims": ((7, 7), 1, 1, 1, 12, 9), "5 x 3, two in front": ((5, 3), 2, 2, 1, 16, 16),
    "1 x 9": ((1, 9), 0, 1, 1, 16, 16), "9 x 1": ((9, 1), 1, 1, 1, 16, 16), "one patch": ((1, 1), 1, 1, 1, 16, 16)}


@pytest.mark.parametrize("grid, p, h, kv, d, dv", CASES.values(), ids=CASES)
def test_operation(grid, p, h, kv, d, dv):
    q, k, v = make_qkv(1, h, p + math.prod(grid), d, kv_heads=kv, Dv=dv)
    kw = dict(grid_size=grid, num_prefix_tokens=p, scale=0.4)
    check_against_reference(_tuple(attention_stats, backend="triton", **kw), _tuple(attention_stats_reference, **kw),
                            (q, k, v), tol=2e-5, floor=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_types(dtype):
    (q, k, v), kw = _stats_inputs(1, 2, d=16)
    check_against_reference(_tuple(attention_stats, backend="triton", **kw), _tuple(attention_stats_reference, **kw),
                            (q, k, v), dtype=dtype, tol=2e-2, floor=1e-2)


def test_rows_of_several_tiles():
    "Three blocks of 16, the last with 5 patches, and heads taken one at a time."
    (q, k, _), kw = _stats_inputs(1, 2, grid=(2, 37), d=16)
    table = lens_constants.__globals__["LENS_LAUNCH"]
    with table.trying(arch_of(q.device), "forward", 32, 16, Launch(16, 0, 1, 1)), \
         table.trying(arch_of(q.device), "dq", 32, 16, Launch(32, 0, 1, 1)):
        check_against_reference(_tuple(attention_stats, backend="triton", **kw), _tuple(attention_stats_reference, **kw),
                                (q, k), tol=2e-5, floor=1e-2)


def test_heads_are_taken_in_turns(monkeypatch):
    (q, k, _), kw = _stats_inputs(2, 2, d=16)
    want = attention_stats(q, k, backend="triton", **kw)
    monkeypatch.setitem(launch_lens.__globals__, "PARTS_BYTES", 3 * (8 * 12 * 3 + 8 * 5 * 16))
    for a, b in zip(attention_stats(q, k, backend="triton", **kw)[1:], want[1:]): assert torch.equal(a, b)


def test_a_head_that_looks_to_the_right():
    H, W = 4, 5
    x = torch.arange(H * W, device=device_under_test())
    code = F.one_hot(x, H * W).float()[None, None]
    q = 200 * F.one_hot(torch.where(x % W < W - 1, x + 1, x), H * W).float()[None, None]
    s = attention_stats(q, code, grid_size=(H, W), num_prefix_tokens=0, scale=1.0, backend="triton")
    M = s.displacement[0, 0]
    assert M[H - 1, W] == pytest.approx(16 / 20) and M[H - 1, W - 1] == pytest.approx(4 / 20)   # the border looks at itself
    assert s.entropy.abs().max() < 1e-6 and s.received[0, 0, :W].tolist() == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("factor", [0.0, 1e4])
def test_extreme_logits(factor):
    (q, k, v), kw = _stats_inputs(1, 1, d=16)
    inputs = [q * factor, k, v]
    got = attention_stats(*inputs, backend="triton", **kw)
    want = attention_stats_reference(*(t.double() for t in inputs), **kw)
    for a, b in zip(got, want): assert a.isfinite().all() and rel_error(a, b, floor=1e-2) < 2e-3
    for t in inputs: t.requires_grad_()
    s = attention_stats(*inputs, backend="triton", **kw)
    grads = torch.autograd.grad(s.entropy.sum() + s.displacement.pow(2).sum() + s.received.pow(2).sum(), inputs[:2])
    assert all(g.isfinite().all() for g in grads)


def test_manners():
    (q, k, v), kw = _stats_inputs(1, 2, d=16)
    op = _tuple(attention_stats, backend="triton", **kw)
    check_strides(op, (q, k, v), tol=2e-5, floor=1e-2)
    check_deterministic(op, (q, k, v), repeats=2)
    check_writes_everything(op, (q, k, v))
    check_compiles(op, (q, k, v), tol=2e-5, floor=1e-2)
    check_autocast(op, (q, k, v), tol=3e-2, floor=1e-1)


def test_the_operation_of_the_library():
    q, k, _ = make_qkv(1, 1, 6, 16, requires_grad=True)
    lse = torch.logsumexp(q.detach() @ k.detach().transpose(-1, -2) / 4, -1).requires_grad_()
    check_opcheck(lens_op, (q, k, lse, 2, 3, 0.25))


def test_without_values_and_without_images():
    (q, k, v), kw = _stats_inputs(1, 2, d=8)
    a, b = attention_stats(q, k, backend="triton", **kw), attention_stats(q, k, v, backend="triton", **kw)
    assert a.out is None
    for x, y in zip(a[1:], b[1:]): torch.testing.assert_close(x, y)


def test_bad_input():
    (q, k, v), kw = _stats_inputs(1, 2, d=8)
    check_raises(attention_stats, [
        (dict(grid_size=(3, 5)), ValueError, ["grid_size", "12 patches", "3 x 5"]),
        (dict(num_prefix_tokens=-1), ValueError, ["num_prefix_tokens", "-1"]),
        (dict(num_prefix_tokens=2), ValueError, ["grid_size", "11 patches"]),
        (dict(k=k[:, :, :9], v=v[:, :, :9]), ValueError, ["k", "13 tokens", "9"]),
        (dict(v=v.double()), TypeError, ["v", "float64"]), (dict(backend="cuda"), ValueError, ["backend"]),
        (dict(grid_size=(3, 4.0)), TypeError, ["grid_size[1]", "4.0"]), (dict(scale=math.inf), ValueError, ["scale"])],
        q=q, k=k, v=v, **kw)

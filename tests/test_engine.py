# Written from the test cells of nbs/1_foundations/01_engine.ipynb by `attnbook export`. Do not edit.
import itertools
import math

import pytest
import torch

from attnbook.attention import attention_mask, attention_reference
from attnbook.engine.bands import BAND
from attnbook.engine.host import BoundLaunch, Launch, tl, triton
from attnbook.engine.op import attention, indexed_attention, tile_attention, tile_attention_op, varlen_attention
from attnbook.engine.program import register_launch
from attnbook.engine.run import row_lists, scatter_rows
from attnbook.engine.tiles import tile_of_program
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
    device,
    make_qkv,
    tolerance,
)

DTYPES = [torch.float32] if device() == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
BANDS = [{}, {"is_causal": True}, {"is_causal": True, "window_size": 9}, {"window_size": 20}]

def both(fn, **options):
    "The operation on Triton and on the reference, LSE included."
    return [lambda *x, b=b: fn(*x, return_lse=True, backend=b, **options) for b in ("triton", "torch")]

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", BANDS)
def test_bands(options, dtype):
    for seed, (Nq, Nk) in enumerate(((50, 50), (33, 70))):
        inputs = make_qkv(2, 4, Nq, 24, kv_heads=2, Nk=Nk, Dv=40, seed=seed)
        check_against_reference(*both(attention, **options), inputs, dtype=dtype)

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 24, 40, 64, 80, 96, 128, 256])
def test_head_dims(dim, dtype):
    for Dv in (dim, 16):
        inputs = make_qkv(1, 1, 20, dim, Dv=Dv)
        check_against_reference(*both(attention, is_causal=True), inputs, dtype=dtype)

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_scale(scale, dtype):
    "scale=0 is the mean of the values, not a request for the default."
    check_against_reference(*both(attention, is_causal=True, scale=scale), make_qkv(1, 2, 40), dtype=dtype, floor=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 20, 35), (2, 1, 20, 35), (1, 4, 1, 35), (20, 1)])
def test_bias(shape, dtype):
    q, k, v = make_qkv(2, 4, 20, kv_heads=2, Nk=35)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device())
    for causal in (False, True):
        run = [lambda q, k, v, b, backend=x: attention(q, k, v, is_causal=causal, bias=b, return_lse=True, backend=backend) for x in ("triton", "torch")]
        check_against_reference(*run, (q, k, v, bias), dtype=dtype)

def starts(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device())

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_packed(causal, dtype):
    cu_q, cu_k = starts([5, 0, 33, 1, 20]), starts([7, 3, 20, 0, 40])
    for cu in ((cu_q, cu_q), (cu_q, cu_k)):
        q = make_qkv(1, 4, int(cu[0][-1]), 32)[0][0]
        k, v = (t[0] for t in make_qkv(1, 2, int(cu[1][-1]), 32, Dv=16)[1:])
        run = [lambda q, k, v, b=b: varlen_attention(q, k, v, *cu, is_causal=causal, return_lse=True, backend=b) for b in ("triton", "torch")]
        check_against_reference(*run, (q, k, v), dtype=dtype)

@pytest.mark.parametrize("dtype", DTYPES)
def test_listed(dtype):
    "Tokens in several groups, padding, a group without keys."
    g = torch.Generator().manual_seed(0)
    q_index = torch.randint(-1, 40, (2, 4, 3, 21), generator=g).to(device())
    k_index = torch.randint(-1, 30, (2, 2, 3, 18), generator=g).to(device())
    k_index[0, 0, 1] = -1
    run = [lambda q, k, v, b=b: indexed_attention(q, k, v, q_index, k_index, return_lse=True, backend=b) for b in ("triton", "torch")]
    check_against_reference(*run, make_qkv(2, 4, 40, 32, kv_heads=2, Nk=30, Dv=24), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extra_keys(dtype):
    "Keys that every query sees, beside a causal window; the gradients of both."
    q, k, v = make_qkv(2, 4, 40, 32, kv_heads=2, Nk=50, Dv=24)
    extra_k, extra_v = make_qkv(2, 2, 19, 32, Dv=24, seed=1)[1:]
    mask = torch.cat([torch.ones(40, 19, dtype=torch.bool, device=device()), attention_mask(40, 50, is_causal=True, window_size=9, device=device())], 1)
    op = lambda q, k, v, xk, xv: tile_attention(q, k, v, BAND, ints=(40, 50, 8, 0), consts=(1, 1), extra_k=xk, extra_v=xv)
    ref = lambda q, k, v, xk, xv: attention_reference(q, torch.cat([xk, k], 2), torch.cat([xv, v], 2), mask=mask, return_lse=True)
    check_against_reference(op, ref, (q, k, v, extra_k, extra_v), dtype=dtype)

def test_empty_rows():
    op = lambda *x: attention(*x, is_causal=True, window_size=5, return_lse=True, backend="triton")
    check_empty_rows(op, make_qkv(1, 2, 40, Nk=20), torch.arange(40) >= 24)

def test_no_keys_and_no_queries():
    for Nq, Nk in ((0, 5), (5, 0)):
        q, k, v = (torch.randn(1, 2, n, 16, device=device(), requires_grad=True) for n in (Nq, Nk, Nk))
        out, lse = attention(q, k, v, return_lse=True, backend="triton")
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert out.shape == (1, 2, Nq, 16) and (out == 0).all() and (lse == -math.inf).all() and all((g == 0).all() for g in grads)


def test_manners():
    "Strides, poisoned outputs, determinism, torch.compile without a break, autocast."
    op = lambda *x: attention(*x, is_causal=True, return_lse=True, backend="triton")
    inputs = make_qkv(1, 2, 33)
    for check in (check_strides, check_writes_everything, check_deterministic, check_compiles, check_autocast):
        check(op, inputs)

def test_opcheck():
    q, k, v = make_qkv(1, 2, 18, requires_grad=True)
    bias = torch.randn(1, 2, 18, 18, device=device(), requires_grad=True)
    check_opcheck(tile_attention_op, (q, k, v, None, None, [], "band", [18, 18, 0, 0], [0, 1], 0.25))
    check_opcheck(tile_attention_op, (q, k, v, None, None, [bias], "full+bias", [18, 18, 0, 0, *bias.stride()], [0, 0], 0.25))

def test_scatter_rows():
    x, index = torch.randn(1, 2, 30, 5, device=device()), torch.randint(-1, 7, (1, 2, 30), device=device())
    want = torch.zeros(1, 2, 8, 5, device=device()).scatter_add(2, (index % 8)[..., None].expand(-1, -1, -1, 5), x)[:, :, :7]
    assert torch.allclose(scatter_rows(x, index, 7), want, atol=1e-5)
    assert torch.equal(scatter_rows(x, index, 7, row_lists(index, 7)), scatter_rows(x, index, 7))


def test_bad_input():
    q, k, v = make_qkv(1, 4, 8, kv_heads=2)
    bad = lambda **kw: {"q": q, "k": k, "v": v, "backend": "triton"} | kw
    check_raises(attention, [
        (bad(q=q[0]), ValueError, "q must have 4 dimensions"), (bad(q=1), TypeError, "q must be a tensor"),
        (bad(k=k.int()), TypeError, "k must be a floating-point"), (bad(v=v.double()), ValueError, "v must have q's type"),
        (bad(k=k[..., :8]), ValueError, ["k must have q's head_dim 16", "8"]), (bad(v=v[:, :, :4]), ValueError, "v must have k's"),
        (bad(q=q[:, :3]), ValueError, "3 heads"), (bad(backend="cuda"), ValueError, "backend must be"),
        (bad(is_causal=1), TypeError, "is_causal"), (bad(window_size=0), ValueError, "window_size must be"), (bad(window_size=2.5), ValueError, "2.5"),
        (bad(bias=torch.zeros(3, 8, 8, device=device())), ValueError, "bias of shape"),
        (bad(q=q.new_zeros(1, 4, 8, 300), k=k.new_zeros(1, 2, 8, 300)), ValueError, "between 1 and 256"),
        (bad(q=q.double(), k=k.double(), v=v.double()), TypeError, "float64")])
    with pytest.raises(ValueError, match="int32"):
        varlen_attention(q[0], k[0], v[0], torch.tensor([0, 8], device=device()))
    with pytest.raises(ValueError, match="q_index must be"):
        indexed_attention(q, k, v, torch.zeros(1, 2, 1, 3, dtype=torch.int32, device=device()), torch.zeros(1, 2, 1, 3, dtype=torch.int32, device=device()))
    with pytest.raises(ValueError, match="kernel must be"):
        register_launch("sm90", "backward", 16, 64, Launch(64, 64, 4, 2))


@pytest.mark.cuda
def test_wide_offsets():
    "Rows more than 2^31 elements apart."
    step = 2**31 // 24
    room = torch.empty(step * 31 + 64, dtype=torch.float16, device=device())
    far = room.as_strided((1, 1, 32, 64), (0, 0, step, 1)).copy_(torch.randn(32, 64))
    run = [lambda *x, b=b: attention(*x, return_lse=True, backend=b) for b in ("triton", "torch")]
    (a, x), (b, y) = (f(far, far, far) for f in run)
    assert (a.double() - b.double()).norm() < tolerance(torch.float16, "cuda") * b.double().norm() and torch.allclose(x, y, atol=1e-3)


@triton.jit
def note_tiles(SEEN, num_tiles, together):
    bh, i = tile_of_program(num_tiles, together)
    tl.atomic_add(SEEN + bh * num_tiles + i, 1)

def test_every_tile_has_one_program():
    for heads, tiles, together in itertools.product((1, 5, 6), (1, 3), (1, 2, 4, 6)):
        seen = torch.zeros(heads * tiles, dtype=torch.int32, device=device())
        note_tiles[(heads * tiles,)](seen, tiles, min(together, heads))
        assert (seen == 1).all(), (heads, tiles, together)


@triton.jit
def scale_and_add(X, MORE, OUT, factor, N, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + n, mask=n < N) * factor * (2 if TWICE else 1)
    if MORE is not None:
        x += tl.load(MORE + n, mask=n < N)
    tl.store(OUT + n, x.to(OUT.dtype.element_ty), mask=n < N)

def test_bound_launch():
    "The same as a plain launch, again and again: other values, another type, an address that is no multiple of 16, None."
    run = BoundLaunch(scale_and_add, (3,), 1.5, 40, TWICE=True, BLOCK=16, num_warps=1)
    for dtype, first, more in itertools.product((torch.float32, torch.float16), (0, 0, 1), (True, False, True)):
        x, y, out = (torch.randn(41).to(device(), dtype)[first:first + 40] for _ in range(3))
        run(x, y if more else None, out)
        plain = torch.empty_like(out)
        scale_and_add[(3,)](x, y if more else None, plain, 1.5, 40, TWICE=True, BLOCK=16, num_warps=1)
        want = 3 * x.double() + more * y.double()
        assert torch.equal(out, plain) and (out - want).norm() < 1e-3 * want.norm()

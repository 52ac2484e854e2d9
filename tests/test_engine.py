# Written from the test cells of nbs/1_foundations/01_engine.ipynb by `attnbook export`. Do not edit.
# fmt: off
import contextlib
import itertools
import math
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnbook.attention import attention_mask, attention_reference
from attnbook.engine.bands import BAND
from attnbook.engine.ground import _guard, emptier, tl, triton
from attnbook.engine.host import MOST_KEPT, BoundLaunch, Kept, Launch, Plans, arch_of, dot_precision, keep
from attnbook.engine.op import attention, indexed_attention, tile_attention, tile_attention_op, varlen_attention
from attnbook.engine.program import LAUNCH, register_launch
from attnbook.engine.run import row_lists, scatter_rows
from attnbook.engine.tiles import tile_of_program
from attnbook.engine.wiring import operation
from attnbook.lab.testing import (
    check_against_reference,
    check_autocast,
    check_compiles,
    check_deterministic,
    check_empty_rows,
    check_opcheck,
    check_strides,
    check_writes_everything,
    device,
    make_qkv,
    rel_error,
    tolerance,
)


@pytest.mark.parametrize(
    "amd, switch, products",
    [(False, "highest", ("ieee", "tf32x3")), (False, "high", ("tf32",) * 2), (True, "highest", ("ieee",) * 2)],
)
def test_dot_precision(monkeypatch, amd, switch, products):
    "Torch's switch decides for float32; what a kernel wants at the highest precision gives way where there is no such thing."
    monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: switch)
    assert (dot_precision(torch.float32), dot_precision(torch.float32, "tf32x3")) == products
    assert dot_precision(torch.bfloat16, "tf32x3") is None


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


@pytest.mark.parametrize(
    "kw", [{"is_causal": True}, {"is_causal": True, "window_size": 9}, {"window_size": 20}], ids=str
)
@pytest.mark.parametrize(
    "Nq, Nk, offset",
    [(1, 70, 69), (37, 70, 33), (70, 37, -33), (40, 40, 0), (33, 70, 5), (20, 30, 200), (20, 30, -40)],
    ids=str,
)
def test_queries_at_an_offset(kw, Nq, Nk, offset):
    inputs = make_qkv(1, 4, Nq, Nk=Nk, kv_heads=2)
    check_against_reference(*both(attention, q_offset=offset, **kw), inputs, dtype=torch.float32)
    if offset == Nk - Nq >= 0:
        q, k, v = make_qkv(1, 4, Nk, kv_heads=2)
        whole = attention(q, k, v, backend="triton", **kw)
        assert (
            rel_error(attention(q[:, :, -Nq:], k, v, q_offset=offset, backend="triton", **kw), whole[:, :, -Nq:]) < 1e-6
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 20, 35), (2, 1, 20, 35), (1, 4, 1, 35), (20, 1)])
def test_bias(shape, dtype):
    q, k, v = make_qkv(2, 4, 20, kv_heads=2, Nk=35)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device())
    for causal in (False, True):
        run = [
            lambda q, k, v, b, backend=x: attention(q, k, v, is_causal=causal, bias=b, return_lse=True, backend=backend)
            for x in ("triton", "torch")
        ]
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
        run = [
            lambda q, k, v, b=b: varlen_attention(q, k, v, *cu, is_causal=causal, return_lse=True, backend=b)
            for b in ("triton", "torch")
        ]
        check_against_reference(*run, (q, k, v), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_listed(dtype):
    "Tokens in several groups, padding, a group without keys."
    g = torch.Generator().manual_seed(0)
    q_index = torch.randint(-1, 40, (2, 4, 3, 21), generator=g).to(device())
    k_index = torch.randint(-1, 30, (2, 2, 3, 18), generator=g).to(device())
    k_index[0, 0, 1] = -1
    run = [
        lambda q, k, v, b=b: indexed_attention(q, k, v, q_index, k_index, return_lse=True, backend=b)
        for b in ("triton", "torch")
    ]
    check_against_reference(*run, make_qkv(2, 4, 40, 32, kv_heads=2, Nk=30, Dv=24), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extra_keys(dtype):
    "Keys that every query sees, beside a causal window; the gradients of both."
    q, k, v = make_qkv(2, 4, 40, 32, kv_heads=2, Nk=50, Dv=24)
    extra_k, extra_v = make_qkv(2, 2, 19, 32, Dv=24, seed=1)[1:]
    mask = torch.cat(
        [
            torch.ones(40, 19, dtype=torch.bool, device=device()),
            attention_mask(40, 50, is_causal=True, window_size=9, device=device()),
        ],
        1,
    )
    op = lambda q, k, v, xk, xv: tile_attention(
        q, k, v, BAND, ints=(40, 50, 8, 0), consts=(1, 1), extra_k=xk, extra_v=xv
    )
    ref = lambda q, k, v, xk, xv: attention_reference(
        q, torch.cat([xk, k], 2), torch.cat([xv, v], 2), mask=mask, return_lse=True
    )
    check_against_reference(op, ref, (q, k, v, extra_k, extra_v), dtype=dtype)


def test_empty_rows():
    op = lambda *x: attention(*x, is_causal=True, window_size=5, return_lse=True, backend="triton")
    check_empty_rows(op, make_qkv(1, 2, 40, Nk=20), torch.arange(40) >= 24)


def test_no_keys_and_no_queries():
    for Nq, Nk in ((0, 5), (5, 0)):
        q, k, v = (torch.randn(1, 2, n, 16, device=device(), requires_grad=True) for n in (Nq, Nk, Nk))
        out, lse = attention(q, k, v, return_lse=True, backend="triton")
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert (
            out.shape == (1, 2, Nq, 16)
            and (out == 0).all()
            and (lse == -math.inf).all()
            and all((g == 0).all() for g in grads)
        )


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
    check_opcheck(
        tile_attention_op, (q, k, v, None, None, [bias], "full+bias", [18, 18, 0, 0, *bias.stride()], [0, 0], 0.25)
    )


def test_scatter_rows():
    x, index = torch.randn(1, 2, 30, 5, device=device()), torch.randint(-1, 7, (1, 2, 30), device=device())
    want = torch.zeros(1, 2, 8, 5, device=device()).scatter_add(2, (index % 8)[..., None].expand(-1, -1, -1, 5), x)[
        :, :, :7
    ]
    assert torch.allclose(scatter_rows(x, index, 7), want, atol=1e-5)
    assert torch.equal(scatter_rows(x, index, 7, row_lists(index, 7)), scatter_rows(x, index, 7))


BAD = {  # what is changed -> error, words of its message
    "q without batch": (lambda a: dict(q=a.q[0]), ValueError, "q must have 4 dimensions"),
    "q no tensor": (lambda a: dict(q=1), TypeError, "q must be a tensor"),
    "k of integers": (lambda a: dict(k=a.k.int()), TypeError, "k must be a floating-point"),
    "v of another type": (lambda a: dict(v=a.v.double()), TypeError, "v must have q's type"),
    "k of another width": (lambda a: dict(k=a.k[..., :8]), ValueError, "k must have q's head_dim 16, not 8"),
    "v of another length": (lambda a: dict(v=a.v[:, :, :4]), ValueError, "v must have k's"),
    "heads that do not share out": (lambda a: dict(q=a.q[:, :3]), ValueError, "3 heads"),
    "another backend": (lambda a: dict(backend="cuda"), ValueError, "backend must be"),
    "is_causal no bool": (lambda a: dict(is_causal=1), TypeError, "is_causal"),
    "offset no integer": (lambda a: dict(q_offset=0.5), TypeError, "q_offset"),
    "window_size 0": (lambda a: dict(window_size=0), ValueError, "window_size must be"),
    "window_size no integer": (lambda a: dict(window_size=2.5), TypeError, "window_size must be .*2.5"),
    "scale no number": (lambda a: dict(scale="1"), TypeError, "scale"),
    "scale not finite": (lambda a: dict(scale=math.nan), ValueError, "scale"),
    "bias of another shape": (
        lambda a: dict(bias=torch.zeros(3, 8, 8, device=device())),
        ValueError,
        "bias must broadcast",
    ),
    "wide heads": (
        lambda a: dict(q=a.q.new_zeros(1, 4, 8, 300), k=a.q.new_zeros(1, 2, 8, 300)),
        ValueError,
        "from 1 to 256",
    ),
    "float64 on triton": (lambda a: dict(q=a.q.double(), k=a.k.double(), v=a.v.double()), TypeError, "float64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, words = BAD[case]
    given = types.SimpleNamespace(**dict(zip("qkv", make_qkv(1, 4, 8, kv_heads=2))))
    with pytest.raises(error, match=words):
        attention(**vars(given) | {"backend": "triton"} | change(given))


def test_bad_lists():
    q, k, v = make_qkv(1, 4, 8, kv_heads=2)
    with pytest.raises(TypeError, match="cu_seqlens_q must be a tensor of integers"):
        varlen_attention(q[0], k[0], v[0], torch.tensor([0.0, 8.0], device=device()))
    with pytest.raises(ValueError, match="q_index must have shape"):
        indexed_attention(
            q,
            k,
            v,
            torch.zeros(1, 2, 1, 3, dtype=torch.int32, device=device()),
            torch.zeros(1, 2, 1, 3, dtype=torch.int32, device=device()),
        )
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
    assert (a.double() - b.double()).norm() < tolerance(torch.float16, "cuda") * b.double().norm() and torch.allclose(
        x, y, atol=1e-3
    )


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
        x, y, out = (torch.randn(41).to(device(), dtype)[first : first + 40] for _ in range(3))
        run(x, y if more else None, out)
        plain = torch.empty_like(out)
        scale_and_add[(3,)](x, y if more else None, plain, 1.5, 40, TWICE=True, BLOCK=16, num_warps=1)
        want = 3 * x.double() + more * y.double()
        assert torch.equal(out, plain) and (out - want).norm() < 1e-3 * want.norm()


def example_operation(name):
    "y = sum of the list + a x, z = its rows' places; written in plain torch."

    def forward(x: Tensor, others: list[Tensor], bias: Tensor | None, a: float) -> tuple[Tensor, Tensor]:
        y = a * x + sum(others) + (0 if bias is None else bias)
        return y, y.argmax(-1)

    def backward(call):
        dy = call.grads[0]
        return dict(
            x=call.a * dy,
            others=[dy.clone() for _ in call.others],
            bias=None if call.bias is None else dy.sum_to_size(call.bias.shape).clone(),
        )

    return operation(
        name,
        forward,
        like=lambda x, *_: (torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.int64)),
        backward=backward,
    )


def test_operation():
    "Lists, absent tensors and what needs no gradient, in eager mode, through torch's registry and compiled."
    op = example_operation("example_operation")
    x, y, z, b = (
        torch.randn(3, 4, device=device(), dtype=torch.float64, requires_grad=r) for r in (True, False, True, True)
    )
    for run in (op, op.overload, torch.compile(op, fullgraph=True, backend="aot_eager")):
        for bias in (b, None):
            out, place = run(x, [y, z], bias, 2.0)
            found = torch.autograd.grad(out.square().sum(), [t for t in (x, z, bias) if t is not None])
            want = torch.autograd.grad(
                (2 * x + y + z + (0 if bias is None else bias)).square().sum(),
                [t for t in (x, z, bias) if t is not None],
            )
            assert all(torch.allclose(f, w) for f, w in zip(found, want, strict=True)) and torch.equal(
                place, out.argmax(-1)
            )
    check_opcheck(op, (x, [y, z], b, 2.0))
    assert example_operation("example_operation")(x, [y], None, 1.0)[
        0
    ].requires_grad  # declared again, as a cell that runs twice does


def test_operation_of_lists():
    "As many outputs as inputs, in a list; nothing of either is kept for the backward pass."

    def forward(x: list[Tensor], a: float) -> list[Tensor]:
        return [a * t for t in x]

    def backward(call):
        assert call.x == [None, None] and list(call.outputs) == [None, None]
        return dict(x=[torch.zeros(3, device=device()) if g is None else call.a * g for g in call.grads])

    op = operation(
        "example_of_lists",
        forward,
        like=lambda x, a: [torch.empty_like(t) for t in x],
        backward=backward,
        drop=("x", "outputs"),
        gradients_like=lambda call: dict(x=[torch.empty(3, device=device()) for _ in call.grads]),
    )
    x, y = (torch.randn(3, device=device(), requires_grad=True) for _ in range(2))
    for run in (op, op.overload, torch.compile(op, fullgraph=True, backend="aot_eager")):
        for used in (2, 1):
            found = torch.autograd.grad(sum(o.square().sum() for o in run([x, y], 3.0)[:used]), (x, y)[:used])
            assert all(torch.allclose(g, 18 * t) for g, t in zip(found, (x, y)))
    with torch.no_grad():
        assert torch.equal(op([x, y], 3.0)[1], 3 * y)


def test_operation_is_loud():
    "No second derivative, no transform: an error, never zeros."
    op = example_operation("example_operation")
    x, y = (torch.randn(2, 4, device=device(), requires_grad=True) for _ in range(2))
    (grad,) = torch.autograd.grad(op(x, [y], None, 2.0)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), x)
    for transform in (torch.func.vmap, torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(RuntimeError, match="cannot run inside torch.func"):
            transform(lambda x: op(x, [y.detach()], None, 2.0)[0].sum())(x.detach())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        op(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()), [y.detach()], None, 2.0)


def test_operation_keeps_what_it_needs():
    "What `drop` names, a tensor or an output, is not kept for the backward pass."

    def forward(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return x.exp() + bias, x.exp()

    def backward(call):
        assert call.bias is None and call.outputs[0] is None
        return dict(x=call.grads[0] * call.outputs[1], bias=call.grads[0].clone())

    like = lambda x, bias=None: (torch.empty_like(x), torch.empty_like(x))
    op = operation(
        "example_that_drops",
        forward,
        like=like,
        backward=backward,
        drop=("bias", 0),
        nondifferentiable=(1,),
        gradients_like=lambda call: dict(zip(("x", "bias"), like(call.x))),
    )
    x, b = (torch.randn(3, 4, device=device(), requires_grad=True) for _ in range(2))
    for run in (op, op.overload, torch.compile(op, fullgraph=True, backend="aot_eager")):
        found = torch.autograd.grad(run(x, b)[0].sum(), (x, b))
        assert torch.allclose(found[0], x.exp()) and torch.equal(found[1], torch.ones_like(b))


@pytest.mark.parametrize(
    "ruled_out", [slice(0, 16), slice(1, None), slice(None)], ids=["the first tile", "all but one key", "all keys"]
)
@pytest.mark.parametrize("value", [-math.inf, -1e4], ids=str)
def test_bias_rules_out(ruled_out, value):
    q, k, v = make_qkv(1, 1, 32)
    bias = torch.zeros(1, 1, 1, 32, device=q.device)
    bias[..., ruled_out] = value
    got, want = [], []
    for backend, dtype, found in (("triton", torch.float32, got), ("torch", torch.float64, want)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = attention(*inputs, bias=bias.to(dtype), backend=backend)
        found += [out, *torch.autograd.grad((out * torch.arange(16, device=q.device)).sum(), inputs)]
    for a, b in zip(got, want):  # float32 logits near 1e4 have three digits behind the point
        assert (a - b).norm() <= (3e-3 if value == -1e4 else 3e-5) * max(b.norm(), 1)


@pytest.mark.parametrize("value", [-1e9, -3e38, torch.finfo(torch.float32).min, 1e9], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "band"])
def test_rows_of_one_huge_bias(value, is_causal):
    "All keys of some rows carry it: in float32 it swallows the products, and what is left is the mean over the keys that the row sees."
    q, k, v = make_qkv(1, 2, 40, 16)
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    seen = torch.ones(40, 40, device=q.device).tril() if is_causal else torch.ones(40, 40, device=q.device)
    bias = torch.zeros(1, 1, 40, 40, device=q.device)
    bias[..., ::2, :] = value
    g = torch.randn(1, 2, 40, 16, device=q.device)
    bias.requires_grad_()
    out, lse = attention(*inputs, bias=bias, is_causal=is_causal, return_lse=True, backend="triton")
    found = torch.autograd.grad(out, (*inputs, bias), g)
    q64, k64, v64, b64 = wide = [t.detach().double().requires_grad_() for t in (*inputs, bias)]
    rows = torch.arange(40, device=q.device) % 2 == 0
    s = q64 @ k64.transpose(-1, -2) / 4
    s = (
        torch.where(rows[:, None], s - s.detach(), s) + b64 - b64.detach()
    )  # value, and swallowed by it, is the same for all keys
    want_out = torch.softmax(s.masked_fill(seen == 0, -math.inf), -1) @ v64
    want = torch.autograd.grad(want_out, wide, g.double())
    assert torch.allclose(lse[..., ::2], torch.full_like(lse[..., ::2], value))
    assert (out - want_out).norm() <= 3e-5 * want_out.norm()
    for a, b in zip(found, want):
        assert (a - b).norm() <= 3e-5 * b.norm()


def test_packed_calls_stay_on_the_device():
    "Nothing beside the operation but views: no copy from or to the host, no number read, whatever integers say where sequences begin."
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(str(func).removesuffix(".default"))
            return func(*args, **(kwargs or {}))

    q = torch.randn(2, 10, 8, device=device(), requires_grad=True)
    found = []
    for dtype in (torch.int32, torch.int64):
        cu = torch.tensor([0, 3, 8], dtype=dtype, device=device())
        with Watch():
            out, lse = varlen_attention(q, q, q, cu, cu, is_causal=True, return_lse=True, backend="triton")
        found.append(out)
    assert torch.equal(*found)
    assert seen <= {
        "aten.unsqueeze",
        "aten.squeeze.dim",
        "aten.detach",
        "attnbook.tile_attention",
        "attnbook.tile_attention_forward",
    }, seen


@pytest.mark.cuda
def test_packed_attention_is_captured():
    "One CUDA graph of the forward and the backward pass serves other starts."
    inputs = [torch.randn(2, 300, 32, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3)]
    cu = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")

    def run():
        out = varlen_attention(*inputs, cu, is_causal=True)
        return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for starts_of in ([0, 100, 300], [0, 0, 217], [0, 1, 2]):
        cu.copy_(torch.tensor(starts_of))
        graph.replay()
        for a, b in zip(found, run()):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_behind_the_last_sequence(backend):
    cu = torch.tensor([0, 3, 8], dtype=torch.int32, device=device())
    junk = [torch.full((1, 2, 10, 8), 7e9, device=device()) for _ in range(50)]
    del junk  # what an allocation without zeros would show
    inputs = [torch.randn(2, 10, 8, device=device(), requires_grad=True) for _ in range(3)]
    out, lse = varlen_attention(*inputs, cu, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert (
        out.shape == (2, 10, 8)
        and (out[:, 8:] == 0).all()
        and (lse[:, 8:] == -math.inf).all()
        and all((g[:, 8:] == 0).all() for g in grads)
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "batch, groups, width, keys",
    [(0, 1, 2, 4), (1, 0, 2, 4), (1, 1, 0, 4), (1, 1, 2, 0)],
    ids=["batch", "groups", "width", "keys"],
)
def test_lists_of_nothing(batch, groups, width, keys, backend):
    q, k = (torch.randn(batch, 2, n, 8, device=device(), requires_grad=True) for n in (4, keys))
    index = torch.full((batch, 2, groups, width), -1, dtype=torch.int32, device=device())
    out, lse = indexed_attention(q, k, k, index, index.clone(), return_lse=True, backend=backend)
    grads = torch.autograd.grad(out.sum(), (q, k))
    assert (
        out.shape == (*index.shape, 8)
        and (out == 0).all()
        and lse.shape == index.shape
        and all(g.shape == t.shape and (g == 0).all() for g, t in zip(grads, (q, k)))
    )


def test_without_triton():
    "Where triton is missing (macOS, Windows) everything imports, and the plain backend computes."
    code = """if True:
        import sys
        class Missing:
            def find_spec(self, name, *rest):
                if name.split(".")[0] == "triton": raise ModuleNotFoundError(name, name=name)
        sys.meta_path.insert(0, Missing())
        import torch
        from attnbook.engine import attention, HAS_TRITON
        assert not HAS_TRITON and attention(*torch.randn(3, 1, 2, 8, 16)).shape == (1, 2, 8, 16)
        try: attention(*torch.randn(3, 1, 2, 8, 16), backend="triton")
        except RuntimeError as e: assert "not installed" in str(e)
        else: raise AssertionError("no error")"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def plan_cases():
    "name -> (q, k, v, options, entry of the launch table)"
    q, k, v = make_qkv(2, 2, 20)
    shifted = torch.randn(q.numel() + 1, device=q.device)[1:].view(q.shape)  # its address is no multiple of 16
    return {
        "plain": (q, k, v, {}, None),
        "causal": (q, k, v, dict(is_causal=True), None),
        "scale": (q, k, v, dict(scale=0.1), None),
        "window": (q, k, v, dict(window_size=4), None),
        "wider window": (q, k, v, dict(window_size=5), None),
        "heads last": (*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)), {}, None),
        "every other key": (q, *(torch.cat([t, t], 2)[:, :, ::2] for t in (k, v)), {}, None),
        "shifted": (shifted, k, v, {}, None),
        "float16": (q.half(), k.half(), v.half(), {}, None),
        "one image": (q[:1], k[:1], v[:1], {}, None),
        "shared head": (q, k[:, :1], v[:, :1], {}, None),
        "other tiles": (q, k, v, {}, Launch(16, 16, 4, 1)),
    }


def test_plans_are_not_fooled():
    cases = plan_cases()
    arch, bits = arch_of(torch.device(device())), 32
    for name in [*cases, *reversed(cases)]:
        q, k, v, options, launch = cases[name]
        with LAUNCH.trying(arch, "forward", bits, 16, launch) if launch else contextlib.nullcontext():
            for grad in (False, True):
                inputs = [
                    t.detach().clone(memory_format=torch.preserve_format) if name != "shifted" else t.detach()
                    for t in (q, k, v)
                ]
                inputs = [t.requires_grad_(grad) for t in inputs]
                out = attention(*inputs, backend="triton", **options)
                want = attention(
                    *(t.detach().double().requires_grad_(grad) for t in inputs), backend="torch", **options
                )
                assert rel_error(out, want) < (2e-3 if q.dtype == torch.float16 else 1e-5), name
                assert out.requires_grad == grad


def test_backward_plans_are_not_fooled():
    "A kept plan of the backward pass serves no gradients of other strides or of another output, and no other tensors."
    q, k, v = make_qkv(1, 2, 20)
    tensors, every = (q, k, v, torch.randn(2, 20, 20, device=q.device)), (0, 1, 2, 3)
    cases = [(every, "out", "dense"), (every, "out", "expanded"), (every, "out", "heads last"), ((0,), "out", "dense")]
    cases += [
        ((1, 3), "out", "dense"),
        (every, "both", "dense"),
        ((0, 1), "lse", "dense"),
        ((2,), "out", "expanded"),
        ((0, 3), "both", "expanded"),
    ]
    layouts = {
        "dense": lambda t: t,
        "expanded": lambda t: t[..., :1, :1].expand_as(t) if t.dim() == 4 else t[..., :1].expand_as(t),
        "heads last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    }
    for wanted, which, layout in [*cases, *cases]:
        found = []
        for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch")):
            inputs = [t.detach().to(dtype).requires_grad_(i in wanted) for i, t in enumerate(tensors)]
            outputs = attention(*inputs[:3], bias=inputs[3], return_lse=True, backend=backend)
            outputs = [o for o, name in zip(outputs, ("out", "lse")) if which in (name, "both")]
            numbers = torch.Generator().manual_seed(0)
            grads = [torch.randn(o.shape, generator=numbers).to(o.device, dtype) for o in outputs]
            grads = [layouts[layout](g) for g in grads]
            found.append(torch.autograd.grad(outputs, [inputs[i] for i in wanted], grads))
        for a, b in zip(*found):
            assert rel_error(a, b) < 1e-5, (wanted, which, layout)


def test_an_incomplete_backward_plan_is_an_error():
    run = lambda q, scale: q * scale

    def double(q: Tensor, scale: float) -> Tensor:
        return q * scale

    op = operation(
        "incomplete_plan",
        double,
        like=lambda q, scale: torch.empty_like(q),
        backward=lambda call: dict(q=call.grads[0] * call.scale),
        plan=lambda q, scale: run,
        backward_plan=lambda call: lambda grads, saved: (None,),
    )
    q = torch.ones(3, device=device(), requires_grad=True)
    with pytest.raises(RuntimeError, match="incomplete_plan has no gradient"):
        op(q, 2.0, kept=Kept()).sum().backward()


@pytest.mark.parametrize("guarded", [True, False], ids=["guards", "keys"])
def test_decisions_are_told_apart(guarded, monkeypatch):
    if not guarded:
        monkeypatch.setitem(_guard.__globals__, "_GUARDS", None)
    plans, made = Plans(most=80), []

    def make(*tensors, **options):
        made.append(1)
        return len(made), {}

    base = torch.zeros(64, device=device())
    x, row = base[:8].view(2, 4), base[:16].as_strided((1, 4), (9, 1))
    kinds = [(x,), (base[1:9].view(2, 4),), (x.t(),), (base[:16].view(2, 8)[:, :4],), (base[:4].view(1, 4),), (row,)]
    kinds += [(x.half(),), (x, None), (None, x), (x, x), (x[:0],), (x[0],), (x.int(),)]
    calls = [(kind, dict(n=n)) for kind in kinds for n in (1, 1.0, True, (1, 2), (1.0, 2))]
    first = [plans.decide(make, *call) for call in calls]
    assert len(made) == len(calls) and bool(plans.seen) == guarded
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"), torch.enable_grad()):
        with context:
            assert all(plans.decide(make, *call) is plan for call, plan in zip(calls, first))
    wants = [torch.nn.Parameter(t) if t.is_floating_point() else t for t in (x,)]
    assert plans.decide(make, wants, dict(n=1)) is first[0]
    LAUNCH["nowhere", "forward", 16, 16] = 1
    del LAUNCH["nowhere", "forward", 16, 16]  # a table changed: what was decided with the old one is not used
    assert plans.decide(make, *calls[0]) is not first[0]


def test_decisions_are_few():
    plans, made, make = Plans(most=2), [], lambda x, n: (made.append(n), {})
    for n in (1, 2, 3, 1, 1, 3):
        plans.decide(make, (torch.zeros(3),), dict(n=n))
        assert len(plans.kept) <= 2 and sum(map(len, plans.seen.values())) <= 2
    assert made == [1, 2, 3, 1]


@pytest.mark.parametrize("shape, strides", [((2, 3), None), ((2, 3), (1, 2)), ((0, 4), None), ((), None)], ids=str)
def test_empty_tensors_are_as_asked(shape, strides):
    like = torch.empty(0, device=device())
    new = emptier(shape, strides, dtype=torch.bfloat16, device=like.device)
    a, b = new().zero_(), new().fill_(1)
    want = torch.empty_strided(shape, strides, device="meta") if strides else torch.empty(shape, device="meta")
    assert a.shape == shape and a.stride() == want.stride() and a.dtype == torch.bfloat16 and a.device == like.device
    assert (a == 0).all() and (b == 1).all() and not a.requires_grad
    with torch.inference_mode():
        assert new().is_inference()


def test_plans_are_few_and_shared():
    plans, made = Plans(most=3), []
    make = lambda key: made.append(key) or key
    assert (
        [plans.find(k, make, k) for k in (1, 2, 1, 3, 4, 4, 1)] == [1, 2, 1, 3, 4, 4, 1]
        and made == [1, 2, 3, 4, 1]
        and len(plans.kept) == 3
    )
    for change in (
        lambda: LAUNCH.__setitem__(("nowhere", "forward", 16, 16), 1),
        lambda: LAUNCH.__delitem__(("nowhere", "forward", 16, 16)),
    ):
        change()  # a table changed: what was decided with the old one is not used
        made.clear()
        plans.find(4, make, 4)
        assert made == [4]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: plans.find(i % 5, lambda k: k, i % 5), range(400))) == [
            i % 5 for i in range(400)
        ]


def test_decisions_are_not_fooled():
    "One decision for calls alike; another for what differs in anything but numbers; none is kept where somebody traces."
    plans, made = Plans(), []

    def make(*tensors, **options):
        made.append(options)
        return len(made), {}

    x, shifted = torch.zeros(4, 4, device=device()), torch.zeros(17, device=device())[1:].view(4, 4)
    tensors = [(x,), (x.t(),), (x[:2],), (x.half(),), (shifted,), (None,), (x, None), (None, x), (x, x), (x.bool(),)]
    options = [dict(a=a) for a in (1, 1.0, True, None, "1", (1,), (1.0,), (True,), ((1,),), ((1.0,),))]
    options += [dict(a=1, b=2), dict(a=2, b=1)]
    calls = [(t, dict(a=1)) for t in tensors[1:]] + [(tensors[0], o) for o in options]
    for _ in range(2):
        found = [plans.decide(make, t, o) for t, o in calls]
        assert [n for n, _ in found] == list(range(1, len(calls) + 1)) and len(made) == len(calls)
    assert all(type(kept) is Kept for _, kept in found) and len({id(kept) for _, kept in found}) == len(calls)
    same = plans.decide(make, (torch.ones_like(x),), dict(a=1))  # other numbers, in another place
    assert same is found[len(tensors) - 1] and plans.decide(make, (torch.nn.Parameter(x),), dict(a=1)) is same

    class Subclass(Tensor):
        pass

    def anew(tensor, options):
        before = len(made)
        kept = plans.decide(make, (tensor,), options)[1]
        assert len(made) == before + 1 and type(kept) is dict
        return tensor

    anew(x.as_subclass(Subclass), dict(a=1)), anew(x.to("meta"), dict(a=1)), anew(x, dict(a=[1]))
    torch.func.vmap(lambda t: anew(t, dict(a=1)))(x[None])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if before == "highest" else "highest")
    try:
        assert plans.decide(make, (x,), dict(a=1)) is not same
    finally:
        torch.set_float32_matmul_precision(before)
    assert plans.decide(make, (x,), dict(a=1)) is same


def test_kept_is_bounded():
    "Gradients of ever other strides do not fill the memory."
    kept = Kept()
    for n in range(300):
        keep(kept, lambda n=n: n, torch.zeros(2, n + 2, device=device())[:, :2])
    assert len(kept) <= MOST_KEPT + 1

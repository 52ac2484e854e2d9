# Written from the test cells of nbs/1_foundations/06_testing.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
from functools import partial

import pytest
import torch

from attnbook.attention import attention_backward, attention_mask, attention_reference
from attnbook.lab.testing import (
    LAYOUTS,
    TOLERANCE,
    both_ways,
    check_against_reference,
    check_autocast,
    check_compiles,
    check_deterministic,
    check_empty_rows,
    check_gradients,
    check_opcheck,
    check_operation,
    check_raises,
    check_strides,
    check_writes_everything,
    device,
    make_qkv,
    poisoned,
    rel_error,
    relayout,
    tensors,
    tolerance,
)


def test_timm_can_be_imported():
    "Where it is installed: with torchvision's compiled part or without."
    timm = pytest.importorskip("timm")
    assert timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3).head.weight.shape == (3, 192)


def test_rel_error():
    assert rel_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])) == 0
    assert abs(rel_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) - 0.1) < 1e-12
    assert rel_error(torch.zeros(3), torch.zeros(3)) == 0 and rel_error(torch.ones(3), torch.zeros(3)) == math.inf
    assert abs(rel_error(torch.full((4,), 1e-6), torch.zeros(4), floor=1e-3) - 1e-3) < 1e-9
    for wrong in ([math.nan, 1.0], [math.inf, 1.0], [1.0]):
        assert rel_error(torch.tensor(wrong), torch.tensor([1.0, 1.0])) == math.inf
    assert rel_error(torch.tensor([-math.inf, 1]), torch.tensor([-math.inf, 1])) == 0
    assert rel_error(torch.tensor([-math.inf, 1]), torch.tensor([math.inf, 1])) == math.inf


def test_tolerance_follows_tf32():
    assert tolerance(torch.float32) == 1e-5 and tolerance(torch.bfloat16, "cuda") == 1.5e-2
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert tolerance(torch.float32, "cuda") == TOLERANCE["tf32"] and tolerance(torch.float32, "cpu") == 1e-5
    finally:
        torch.set_float32_matmul_precision(before)


def test_layouts_hold_the_same_values():
    for shape in ((2, 3, 5, 4), (2, 3, 4, 5, 6), (1, 1, 1, 1)):
        x = torch.randn(shape, device=device())
        strides = set()
        for layout in LAYOUTS:
            y = relayout(x, layout)
            assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()
            strides.add(y.stride())
        assert len(strides) == 4 or shape[-1] == 1
    assert torch.equal(make_qkv(layout="strided")[0], make_qkv()[0])
    assert not torch.equal(make_qkv(seed=1)[0], make_qkv()[0])


class Attention(torch.autograd.Function):
    "A correct causal attention with a hand-written backward, unless told what to get wrong."

    @staticmethod
    def forward(ctx, q, k, v, mistake):
        ctx.mistake, ctx.scale = mistake, q.shape[-1] ** -0.5
        if mistake == "stride":  # reads k as if its rows stood one after another
            rows = k.shape[2] * k.shape[3]
            k = k.as_strided(k.shape, (k.shape[1] * rows, rows, k.shape[3], 1))
        out, lse = attention_reference(q, k, v, is_causal=True, return_lse=True)
        if mistake == "unwritten":
            written, out = out, torch.empty_like(out)
            out[:, :, :-1] = written[:, :, :-1]  # forgets the last row
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):
        q, k, v, out, lse = ctx.saved_tensors
        mask = attention_mask(q.shape[2], k.shape[2], is_causal=True, device=q.device)
        dq, dk, dv, _ = attention_backward(q, k, v, out, lse, d_out, None if ctx.mistake == "lse" else d_lse, mask=mask)
        if ctx.mistake == "heads":  # the gradient of one query head of each group only
            dk = dk / 2
        if ctx.mistake == "random":  # as atomics do: another order, other last bits
            dv = dv * (1 + 1e-7 * torch.randn(dv.shape, device=dv.device))
        if ctx.mistake == "nan":
            dq[0, 0, 3] = math.nan
        return dq, dk, dv, None


def attend(q, k, v, mistake=None):
    return Attention.apply(q, k, v, mistake)


def complaint(check, *args, **kw):
    "What a check says against an operation; fails if it says nothing."
    try:
        check(*args, **kw)
    except AssertionError as e:
        return str(e)
    raise RuntimeError(f"{check.__name__} let a broken operation pass")


reference = partial(attention_reference, is_causal=True, return_lse=True)


def test_reference_check_passes_what_is_right():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        qkv = make_qkv(kv_heads=2, Nk=29)
        op = partial(attention_reference, is_causal=True, return_lse=True)
        errors = check_against_reference(op, reference, qkv, dtype=dtype)
        assert len(errors) == 5 and max(errors.values()) < TOLERANCE[dtype]
    errors = check_against_reference(attend, reference, dict(zip("qkv", qkv)))
    assert list(errors) == ["output 0", "output 1", *(f"gradient of {n}" for n in "qkv")]


def test_reference_check_fails_what_is_wrong():
    qkv = dict(zip("qkv", make_qkv(kv_heads=2, Nk=29)))
    for mistake, words in {"lse": "gradient of q", "heads": "gradient of k", "nan": "gradient of q: error inf"}.items():
        assert words in complaint(check_against_reference, partial(attend, mistake=mistake), reference, qkv)

    def one_output(q, k, v):
        return attend(q, k, v)[0]

    def a_query_short(q, k, v):
        return attend(q[:, :, 1:], k, v)

    def narrow_window(q, k, v):
        return attention_reference(q, k, v, is_causal=True, window_size=30, return_lse=True)

    assert "reference has 2" in complaint(check_against_reference, one_output, reference, qkv)
    assert "shape (2, 4, 36, 16)" in complaint(check_against_reference, a_query_short, reference, qkv)
    said = complaint(check_against_reference, narrow_window, reference, qkv, dtype=torch.bfloat16)  # one key too few
    assert "output 0" in said and "output 1" in said


def test_a_gradient_that_is_missing_is_wrong():
    qkv = make_qkv()
    assert "argument 2" in complaint(check_against_reference, lambda q, k, v: attend(q, k, v.detach()), reference, qkv)


def test_finite_differences():
    small = make_qkv(heads=4, kv_heads=2, Nq=9, D=4)
    check_gradients(reference, small)
    check_gradients(attend, small)
    for mistake in ("lse", "heads"):
        assert "finite differences" in complaint(check_gradients, partial(attend, mistake=mistake), small)


def test_unwritten_memory_is_noticed():
    qkv = make_qkv()
    check_writes_everything(attend, qkv)
    assert "output 0" in complaint(check_writes_everything, partial(attend, mistake="unwritten"), qkv)
    with poisoned():
        assert torch.empty(3, device=device()).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_ignored_stride_is_noticed():
    qkv = make_qkv()
    check_strides(attend, qkv)
    for layout in LAYOUTS[1:]:
        said = complaint(check_strides, partial(attend, mistake="stride"), qkv, layouts=[layout], grad=False)
        assert layout in said and "output 0" in said


def test_other_bits_are_noticed():
    qkv = make_qkv()
    check_deterministic(attend, qkv)
    check_against_reference(partial(attend, mistake="random"), reference, qkv)  # too small to be seen as an error
    said = complaint(check_deterministic, partial(attend, mistake="random"), qkv)
    assert "argument 2" in said and "argument 1" not in said
    assert "NaN" in complaint(check_deterministic, partial(attend, mistake="nan"), qkv)


def test_opcheck_tells_a_good_registration_from_a_bad_one():
    for name, fake in (("good", lambda x: torch.empty_like(x)), ("bad", lambda x: x.new_empty(x.shape[0]))):
        op = torch.library.custom_op(
            f"attnbook_test::{name}", lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor"
        )
        op.register_fake(fake)
        op.register_autograd(lambda ctx, d: d * 2)
        x = torch.randn(3, 4, device=device(), requires_grad=True)
        if name == "good":
            assert set(check_opcheck(op, (x,)).values()) == {"SUCCESS"}
        else:
            try:
                check_opcheck(op, (x,))
            except Exception as e:
                assert "fake" in str(e).lower()
            else:
                raise AssertionError("a fake kernel with the wrong shape passed")


def test_opcheck_says_what_differed_and_by_how_much():
    "A gradient that depends on how often it was computed, as that of a kernel with a race does."
    op = torch.library.custom_op(
        "attnbook_test::racy", lambda x, y: x * y, mutates_args=(), schema="(Tensor x, Tensor y) -> Tensor"
    )
    op.register_fake(lambda x, y: torch.empty_like(x))
    runs = []

    @torch.library.custom_op("attnbook_test::racy_grad", mutates_args=(), schema="(Tensor d) -> Tensor")
    def grad(d):
        runs.append(1)
        return d + len(runs)

    grad.register_fake(torch.empty_like)
    op.register_autograd(lambda ctx, d: (d, grad(d)))
    x, y = (torch.ones(3, 4, device=device(), requires_grad=True) for _ in range(2))
    try:
        check_opcheck(op, (x, y))
    except Exception as e:
        words = "The gradient of y:", "absolute difference", "1e-05 allowed"
        assert all(w in str(e) for w in words), e
    else:
        raise AssertionError("gradients that differ passed")


def test_graph_breaks_are_noticed():
    qkv = make_qkv(Nq=5, heads=2)
    check_compiles(reference, qkv)

    def breaks(q, k, v):
        torch._dynamo.graph_break()
        return q + k

    try:
        check_compiles(breaks, qkv, grad=False)
    except Exception as e:
        assert "graph_break" in str(e) or "graph break" in str(e).lower()
    else:
        raise AssertionError("a graph break passed")


def test_compiled_that_differs_is_noticed():
    def differs(x):
        return x * (2 if torch.compiler.is_compiling() else 1)

    assert "differ" in complaint(check_compiles, differs, (torch.ones(3, device=device()),))


def test_autocast_check():
    qkv = dict(zip("qkv", make_qkv()))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    check_autocast(lambda q, k, v: sdpa(q, k, v), qkv)

    def forgets_the_scale(q, k, v):
        return sdpa(q, k, v, scale=1.0 if torch.is_autocast_enabled(q.device.type) else None)

    assert "under autocast output 0" in complaint(check_autocast, forgets_the_scale, qkv)


def test_empty_rows_that_are_not_zero_are_noticed():
    qkv = make_qkv(Nq=12, Nk=4, heads=2)
    mask = attention_mask(12, 4, is_causal=True, window_size=4, device=device())
    empty = ~mask.any(-1)
    check_empty_rows(lambda q, k, v: attention_reference(q, k, v, mask=mask, return_lse=True), qkv, empty)

    def like_torch(q, k, v):  # a softmax over -inf only
        s = torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(~mask, -math.inf)
        return torch.einsum("bhij,bhje->bhie", s.softmax(-1), v), s.logsumexp(-1)

    assert "NaN" in complaint(check_empty_rows, like_torch, qkv, empty)

    def very_negative(q, k, v):  # -1e9 instead of -inf: a mean over what was masked
        s = torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(~mask, -1e9)
        return torch.einsum("bhij,bhje->bhie", s.softmax(-1), v), s.logsumexp(-1)

    assert "not 0" in complaint(check_empty_rows, very_negative, qkv, empty)

    def nan_on_the_way_back(q, k, v):  # repaired by `where` in the forward pass only
        out, lse = like_torch(q, k, v)
        return torch.where(empty[:, None], 0, out), lse

    assert "gradient" in complaint(check_empty_rows, nan_on_the_way_back, qkv, empty)


def test_check_raises():
    def half(n):
        if n % 2:
            raise ValueError(f"n must be even, not {n}")
        return n // 2

    check_raises(half, [({"n": 3}, ValueError, ["n", "EVEN", "3"])], n=4)
    check_raises(
        relayout,
        [({"layout": "fortran"}, ValueError, ["layout", "fortran", "sliced"])],
        x=torch.zeros(1, 1, 1, 1),
        layout="sliced",
    )
    for case, words in (
        (({"n": 2}, ValueError, "even"), "nothing was raised"),
        (({"n": 3}, TypeError, "even"), "TypeError expected"),
        (({"n": 3}, ValueError, "odd"), "does not mention ['odd']"),
    ):
        assert words in complaint(check_raises, half, [case])


def test_check_operation_runs_them_all():
    qkv = dict(zip("qkv", make_qkv(Nq=9, heads=2)))
    assert set(check_operation(reference, reference, qkv)) == {"float32"}
    for mistake in ("lse", "nan", "random", "unwritten", "stride"):
        complaint(check_operation, partial(attend, mistake=mistake), reference, qkv, skip=("compiles", "autocast"))


def test_both_ways():
    x, y, n = *tensors((2, 3), (3,), dtype=torch.float32), torch.arange(3)
    assert x.shape == (2, 3) and y.dtype == torch.float32 and tensors((1,))[0].dtype == torch.bfloat16
    dx, dy = both_ways(lambda x, n, y, factor: (factor * x * n, n), x, n, y, factor=2.0)
    assert torch.equal(dx, 2.0 * n.expand(2, 3)) and dy is None

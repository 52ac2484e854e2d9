# Written from the test cells of nbs/1_foundations/09_checks.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math

import numpy as np
import pytest
import torch

from attnbook.checks import (
    check_bool,
    check_broadcast,
    check_choice,
    check_divides,
    check_flags,
    check_heads,
    check_int,
    check_number,
    check_probability,
    check_qkv,
    check_scale,
    check_shape,
    check_sizes,
    check_tensor,
    values_known,
)

x = torch.zeros(2, 3)
BAD_TENSORS = {
    "no tensor": (dict(t=[1.0]), TypeError, "x must be a tensor, not list"),
    "None": (dict(t=None), TypeError, "x must be a tensor, not NoneType"),
    "integers": (dict(t=x.long()), TypeError, "x must be a floating-point tensor, not torch.int64"),
    "complex": (dict(t=x.cfloat()), TypeError, "x must be a floating-point tensor, not torch.complex64"),
    "not integers": (dict(t=x, dtype="integer"), TypeError, "x must be a tensor of integers, not torch.float32"),
    "bool is no integer": (
        dict(t=x.bool(), dtype="integer"),
        TypeError,
        "x must be a tensor of integers, not torch.bool",
    ),
    "not bool": (dict(t=x, dtype="bool"), TypeError, "x must be a boolean tensor, not torch.float32"),
    "another type": (dict(t=x, dtype=torch.int32), TypeError, "x must be a tensor of int32, not torch.float32"),
    "none of two types": (
        dict(t=x, dtype=(torch.int32, torch.int64)),
        TypeError,
        "x must be a tensor of int32 or int64, not torch.float32",
    ),
    "not like q": (dict(t=x, like=x.double()), TypeError, "x must have q's type torch.float64, not torch.float32"),
    "not where q is": (dict(t=x, like=x.to("meta")), ValueError, "x must be on q's device meta, not cpu"),
    "not where e is": (dict(t=x, on=x.to("meta").half(), of="e"), ValueError, "x must be on e's device meta, not cpu"),
    "axes": (dict(t=x, ndim=4), ValueError, "x must have 4 dimensions, not shape (2, 3)"),
    "axes, several": (dict(t=x, ndim=(1, 3)), ValueError, "x must have 1 or 3 dimensions, not shape (2, 3)"),
    "shape": (dict(t=x, shape=("batch", 4)), ValueError, "x must have shape (batch, 4), not (2, 3)"),
    "shape, free": (dict(t=x, shape=(1, None)), ValueError, "x must have shape (1, *), not (2, 3)"),
    "shape, one axis": (dict(t=x, shape=(2,)), ValueError, "x must have shape (2,), not (2, 3)"),
}


@pytest.mark.parametrize("call", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_are_refused(call):
    arguments, error, message = call
    with pytest.raises(error) as e:
        check_tensor("x", **arguments)
    assert str(e.value) == message


@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(ndim=2),
        dict(ndim=(1, 2)),
        dict(shape=(2, 3)),
        dict(shape=("batch", None)),
        dict(dtype=None),
        dict(dtype=torch.float32),
        dict(like=x),
        dict(on=x.half()),
        dict(like=x, on=x),
    ],
    ids=str,
)
def test_tensors_that_are_taken(arguments):
    assert check_tensor("x", x, **arguments) is x


def test_values_that_can_be_read():
    from torch._subclasses.fake_tensor import FakeTensorMode

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return x + values_known(x)

    assert values_known(x) and values_known(torch.nn.Parameter(x)) and torch.equal(compiled(x), x)
    assert not values_known(x.to("meta")) and not values_known(FakeTensorMode().from_tensor(x))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 4), (3, 1), (3, 4), (2, 3, 4), (1, 1, 1)], ids=str)
def test_what_broadcasts(shape):
    check_broadcast("bias", torch.zeros(shape), (2, 3, 4))


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1, 2, 3, 4), (0, 4), (2, 3, 5)], ids=str)
def test_what_does_not_broadcast(shape):
    with pytest.raises(ValueError) as e:
        check_broadcast("bias", torch.zeros(shape), (2, 3, 4), "(B, N, M)")
    assert str(e.value) == f"bias must broadcast to (B, N, M) = (2, 3, 4), not shape {shape}"


INTEGERS_TAKEN = [0, 7, -3, np.int64(7), np.uint8(200), torch.Size([5])[0]]
NO_INTEGERS = [True, np.True_, 2.0, np.float64(2), "2", None, [2], torch.tensor(2)]


@pytest.mark.parametrize("value", INTEGERS_TAKEN, ids=repr)
def test_integers(value):
    found = check_int("n", value)
    assert found == value and type(found) is int


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_no_integers(value):
    with pytest.raises(TypeError) as e:
        check_int("n", value, least=1)
    assert str(e.value) == f"n must be an integer of at least 1, not {value!r}"


@pytest.mark.parametrize(
    "bounds, value, words",
    [
        (dict(least=1), 0, "of at least 1"),
        (dict(most=256), 257, "of at most 256"),
        (dict(least=1, most=3), 4, "from 1 to 3"),
        (dict(least=1, most=3), np.int64(0), "from 1 to 3"),
        (dict(least=1, optional=True), -1, "of at least 1 or None"),
    ],
    ids=str,
)
def test_integers_out_of_range(bounds, value, words):
    with pytest.raises(ValueError) as e:
        check_int("n", value, **bounds)
    assert str(e.value) == f"n must be an integer {words}, not {value}"


def test_bounds_belong_to_the_range():
    assert check_int("n", 1, least=1, most=1) == 1 and check_int("n", None, optional=True) is None
    assert check_number("x", 0, least=0, most=0) == 0.0 and check_number("x", None, optional=True) is None


@pytest.mark.parametrize(
    "value", [0, 1.5, -2, np.float32(0.5), np.float16(0.5), np.int64(3), float(np.float64(1e300))], ids=repr
)
def test_numbers(value):
    found = check_number("x", value)
    assert found == value and type(found) is float


@pytest.mark.parametrize("value", [True, np.True_, "1", None, 1j, torch.tensor(1.0), [1.0]], ids=repr)
def test_no_numbers(value):
    with pytest.raises(TypeError) as e:
        check_number("x", value)
    assert str(e.value) == f"x must be a finite number, not {value!r}"


@pytest.mark.parametrize(
    "bounds, value, words",
    [
        (dict(), math.nan, ""),
        (dict(), math.inf, ""),
        (dict(), np.float32(-math.inf), ""),
        (dict(least=0), -0.1, " of at least 0"),
        (dict(most=1), 1.1, " of at most 1"),
        (dict(least=0, most=1), 2, " from 0 to 1"),
        (dict(positive=True), 0, " above 0"),
        (dict(positive=True, optional=True), -1, " above 0 or None"),
    ],
    ids=str,
)
def test_numbers_out_of_range(bounds, value, words):
    with pytest.raises(ValueError) as e:
        check_number("x", value, **bounds)
    assert str(e.value) == f"x must be a finite number{words}, not {value!r}"


def test_scale():
    assert check_scale(None, 16) == 0.25 and check_scale(0, 16) == 0.0 and check_scale(np.float32(0.5), 16) == 0.5
    assert type(check_scale(2, 16)) is float


@pytest.mark.parametrize(
    "scale, error",
    [
        ("1", TypeError),
        (True, TypeError),
        (torch.tensor(1.0), TypeError),
        (math.nan, ValueError),
        (-math.inf, ValueError),
    ],
    ids=repr,
)
def test_scales_that_are_refused(scale, error):
    with pytest.raises(error) as e:
        check_scale(scale, 16)
    assert str(e.value) == f"scale must be a finite number or None, not {scale!r}"


@pytest.mark.parametrize(
    "value, error",
    [(-0.1, ValueError), (1.1, ValueError), (math.nan, ValueError), ("0", TypeError), (False, TypeError)],
    ids=repr,
)
def test_probability(value, error):
    assert check_probability("p", 0) == 0.0 and check_probability("p", 1) == 1.0
    with pytest.raises(error) as e:
        check_probability("p", value)
    assert str(e.value) == f"p must be a finite number from 0 to 1, not {value!r}"


@pytest.mark.parametrize(
    "value, want", [(7, (7, 7)), ((7, 9), (7, 9)), ([np.int64(7), 9], (7, 9)), (torch.Size([3, 4]), (3, 4))], ids=repr
)
def test_sizes(value, want):
    found = check_sizes("window", value, 2)
    assert found == want and all(type(n) is int for n in found)


@pytest.mark.parametrize(
    "value, error, message",
    [
        ((7,), ValueError, "window must be an integer of at least 1 or 2 of them, one per axis, not (7,)"),
        ((7, 0), ValueError, "window[1] must be an integer of at least 1, not 0"),
        (0, ValueError, "window must be an integer of at least 1, not 0"),
        ((7, 2.5), TypeError, "window[1] must be an integer of at least 1, not 2.5"),
        ("77", TypeError, "window must be an integer of at least 1, not '77'"),
        (None, TypeError, "window must be an integer of at least 1, not None"),
    ],
    ids=repr,
)
def test_sizes_that_are_refused(value, error, message):
    with pytest.raises(error) as e:
        check_sizes("window", value, 2)
    assert str(e.value) == message


def test_flags():
    assert check_flags("is_causal", True, 2) == (True, True) and check_flags("is_causal", [True, np.False_], 2) == (
        True,
        False,
    )
    assert check_bool("is_causal", np.True_) is True
    for value, error, message in (
        (1, TypeError, "is_causal must be True or False, not 1"),
        ((True, 0), TypeError, r"is_causal\[1\] must be True or False, not 0"),
        (torch.tensor(True), TypeError, "not tensor"),
        ((True,), ValueError, r"is_causal must be True or False or 2 of them"),
    ):
        with pytest.raises(error, match=message):
            check_flags("is_causal", value, 2)


def test_choice():
    assert check_choice("backend", "triton", ("auto", "triton", "torch")) == "triton"
    assert check_choice("size", None, (None, 3)) is None
    for value, error in (("cuda", ValueError), (None, TypeError), (3, TypeError)):
        with pytest.raises(error) as e:
            check_choice("backend", value, ("auto", "triton", "torch"))
        assert str(e.value) == f"backend must be one of 'auto', 'triton', 'torch', not {value!r}"


def test_divisors():
    assert check_divides("num_heads", np.int64(3), "embed_dim", 12) == 4
    for value, error, message in (
        (5, ValueError, "num_heads must divide embed_dim = 12, not 5"),
        (0, ValueError, "num_heads must be an integer of at least 1, not 0"),
        (2.0, TypeError, "num_heads must be an integer of at least 1, not 2.0"),
    ):
        with pytest.raises(error) as e:
            check_divides("num_heads", value, "embed_dim", 12)
        assert str(e.value) == message


@pytest.mark.parametrize(
    "heads, kv_heads, fits",
    [(4, 4, True), (4, 2, True), (4, 1, True), (4, 3, False), (2, 4, False), (4, 0, False), (0, 2, True)],
)
def test_heads(heads, kv_heads, fits):
    if fits:
        return check_heads(heads, kv_heads)
    with pytest.raises(ValueError, match=f"q's heads must be a multiple of k's {kv_heads} heads, not {heads} heads"):
        check_heads(heads, kv_heads)


q, k, v = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 6)
BAD_QKV = {
    "no tensor": (dict(q=1), TypeError, "q must be a tensor, not int"),
    "integers": (dict(k=k.int()), TypeError, "k must be a floating-point tensor, not torch.int32"),
    "two types": (dict(v=v.double()), TypeError, "v must have q's type torch.float32, not torch.float64"),
    "two devices": (dict(k=k.to("meta")), ValueError, "k must be on q's device cpu, not meta"),
    "axes": (
        dict(q=q[0]),
        ValueError,
        "q must have 4 dimensions (batch, heads, length, head_dim), not shape (4, 5, 8)",
    ),
    "batch of k": (dict(k=k[:1]), ValueError, "k and v must have q's batch size 2, not 1 and 2"),
    "batch of v": (dict(v=v[:1]), ValueError, "k and v must have q's batch size 2, not 2 and 1"),
    "heads of v": (dict(v=v[:, :1]), ValueError, "v must have k's batch, heads and length (2, 2, 7), not (2, 1, 7)"),
    "length of v": (
        dict(v=v[:, :, :4]),
        ValueError,
        "v must have k's batch, heads and length (2, 2, 7), not (2, 2, 4)",
    ),
    "head_dim": (dict(k=k[..., :4]), ValueError, "k must have q's head_dim 8, not 4"),
    "heads": (dict(q=q[:, :3]), ValueError, "q's heads must be a multiple of k's 2 heads, not 3 heads"),
    "wide": (
        dict(q=q.new_zeros(2, 4, 5, 257), k=k.new_zeros(2, 2, 7, 257)),
        ValueError,
        "q's head_dim must be from 1 to 256, not 257",
    ),
    "wide values": (dict(v=v.new_zeros(2, 2, 7, 257)), ValueError, "v's head_dim must be from 1 to 256, not 257"),
    "no width": (dict(v=v[..., :0]), ValueError, "v's head_dim must be from 1 to 256, not 0"),
}


@pytest.mark.parametrize("call", BAD_QKV.values(), ids=BAD_QKV)
def test_qkv_that_are_refused(call):
    changed, error, message = call
    with pytest.raises(error) as e:
        check_qkv(**dict(q=q, k=k, v=v) | changed)
    assert str(e.value) == message


def test_qkv_that_are_taken():
    check_qkv(q, k, v), check_qkv(q[:, :, :0], k[:, :, :0], v[:, :, :0]), check_qkv(q[:0], k[:0], v[:0])
    (
        check_qkv(*(t.new_zeros(1, 2, 1, 1, 256) for t in (q, k, v)), axes=2),
        check_qkv(*(t.new_zeros(1, 2, 3, 4, 5, 1).bfloat16() for t in (q, k, v)), axes=None),
    )
    with pytest.raises(ValueError, match=r"q must have 5 dimensions \(batch, heads, 2 axes, head_dim\)"):
        check_qkv(q, k, v, axes=2)


def checked(q, k, v, bias, window=3):
    "Every check of this chapter on the way to a sum."
    check_qkv(q, k, v)
    check_tensor("bias", bias, like=q, ndim=4)
    check_broadcast("bias", bias, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    check_shape("q", q, ("batch", 4, q.shape[2], None))
    length = check_int("length", q.shape[2], least=1)
    sizes, flags = check_sizes("window", window, 2), check_flags("is_causal", False, 2)
    width = check_divides("heads", 2, "channels", q.shape[3])
    scale, p = check_scale(None, q.shape[3]), check_probability("p", 0.1)
    check_choice("backend", "auto", ("auto", "torch"))
    return (q * scale * p).sum() + length + width + sizes[0] + flags[0]


def _arguments(batch, length, device="cpu"):
    q, k, v = (torch.ones(batch, heads, length, 8, device=device) for heads in (4, 2, 2))
    return q, k, v, torch.zeros(batch, 1, length, length, device=device)


def test_meta():
    assert checked(*_arguments(2, 5, "meta")).device.type == "meta"


def test_compiled_with_symbolic_sizes():
    compiled = torch.compile(checked, dynamic=True, fullgraph=True, backend="eager")
    for batch, length in ((2, 5), (3, 7), (4, 9)):
        torch.testing.assert_close(compiled(*_arguments(batch, length)), checked(*_arguments(batch, length)))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(*_arguments(6, 11))


def test_exported_with_symbolic_sizes():
    class Checked(torch.nn.Module):
        def forward(self, q, k, v, bias):
            return checked(q, k, v, bias)

    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=64)
    axes = {0: batch, 2: length}
    program = torch.export.export(
        Checked(), _arguments(3, 5), dynamic_shapes=(axes, axes, axes, {0: batch, 2: length, 3: length})
    ).module()
    torch.testing.assert_close(program(*_arguments(4, 9)), checked(*_arguments(4, 9)))

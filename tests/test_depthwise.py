# Written from the test cells of nbs/1_foundations/20_depthwise.ipynb by `attnbook export`. Do not edit.
# fmt: off
import contextlib
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from attnbook.depthwise.kernels import DEPTHWISE_LAUNCH, axis_range, depthwise_launch, even_share, strip_rows
from attnbook.depthwise.op import depthwise_conv, depthwise_conv_op
from attnbook.depthwise.reference import depthwise_reference
from attnbook.lab.testing import (
    check_against_reference,
    check_gradients,
    check_opcheck,
    check_operation,
    check_raises,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test


def draw(shape=(2, 12, 5, 7), taps=3, dtype=torch.float32, seed=0):
    "Seeded maps, weight and bias on the device under test."
    g, C = torch.Generator().manual_seed(seed), shape[1]
    make = lambda *size, scale: (scale * torch.randn(size, generator=g, dtype=torch.float64)).to(
        device_under_test(), dtype
    )
    return [make(*shape, scale=1.0), make(C, 1, taps, taps, scale=1 / taps), make(C, scale=0.5)]


TAPS = [(3, 1), (1, 1), (5, 1), (5, 2), (7, 3), (9, 1), (4, 2), (2, 2), (11, 1)]  # taps, dilation


@pytest.mark.parametrize("taps, dilation", TAPS, ids=str)
def test_reference_is_the_convolution(taps, dilation):
    x, w, b = draw(taps=taps, dtype=torch.float64)
    want = F.conv2d(x, w, b, padding=dilation * (taps - 1) // 2, dilation=dilation, groups=x.shape[1])
    assert rel_error(depthwise_reference(x, w, b, dilation), want) < 1e-12
    assert rel_error(depthwise_reference(x, w, None, dilation, True), want - b[:, None, None] + x) < 1e-12


def test_reference_gradients():
    check_gradients(partial(depthwise_reference, residual=True), draw((1, 2, 4, 5), dtype=torch.float64))


def conv(*args, **options):
    return depthwise_conv(*args, backend="triton", **options)


def test_operation():
    dtypes = torch.float32, torch.float16, torch.bfloat16
    check_operation(conv, depthwise_reference, draw((1, 16, 2, 3)), dtypes=dtypes)


def test_registered():
    x, w, b = (t.requires_grad_() for t in draw((2, 3, 4, 8), taps=3))
    w, b = (t.detach()[:1].repeat(8, *[1] * (t.dim() - 1)).requires_grad_() for t in (w, b))
    check_opcheck(depthwise_conv_op, (x, w, b, 1, True))


@pytest.mark.parametrize("taps, dilation", TAPS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_kernels(taps, dilation, bias):
    inputs = draw(taps=taps)[: 3 if bias else 2]
    fn, reference = (partial(f, dilation=dilation) for f in (conv, depthwise_reference))
    check_against_reference(fn, reference, inputs, tol=2e-5)


@pytest.mark.parametrize("taps, dilation", [(3, 1), (5, 1), (7, 1), (3, 2), (5, 3)], ids=str)
def test_residual(taps, dilation):
    "Both gradients have it, in one launch and in two."
    options = dict(dilation=dilation, residual=True)
    check_against_reference(
        partial(conv, **options), partial(depthwise_reference, **options), draw(taps=taps), tol=2e-5
    )


SIZES = {
    "one pixel": (1, 4, 1, 1),
    "a row": (2, 8, 1, 9),
    "a column": (1, 8, 10, 1),
    "ragged": (1, 5, 15, 13),
    "wide": (1, 5, 3, 21),
    "many channels": (1, 72, 3, 2),
    "three blocks": (3, 96, 2, 2),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("taps, dilation", [(3, 1), (5, 3), (7, 2)], ids=str)
def test_sizes(name, taps, dilation):
    fn, reference = (partial(f, dilation=dilation) for f in (conv, depthwise_reference))
    check_against_reference(fn, reference, draw(SIZES[name], taps), tol=2e-5)


@contextlib.contextmanager
def forced(height=None, **changes):
    "Within it the kernels are launched with other parameters, and strips are `height` rows high."
    home = depthwise_launch.__globals__
    before = home["strip_rows"]
    with contextlib.ExitStack() as stack:
        for key, launch in list(DEPTHWISE_LAUNCH.items()):
            stack.enter_context(DEPTHWISE_LAUNCH.trying(*key, launch._replace(**changes)))
        if height:
            home["strip_rows"] = lambda most, *rest: min(height, most)
            stack.callback(home.__setitem__, "strip_rows", before)
        yield


TILES = [
    dict(height=1, columns=1),
    dict(height=2, columns=3, programs=1),
    dict(height=3, columns=5),
    dict(height=9, columns=2, programs=64, block=8),
]


@pytest.mark.parametrize("taps, dilation", [(3, 1), (5, 2), (7, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("changes", TILES, ids=str)
def test_tiles(changes, taps, dilation):
    with forced(**changes):
        fn, reference = (partial(f, dilation=dilation) for f in (conv, depthwise_reference))
        check_against_reference(fn, reference, draw((2, 4, 7, 5), taps), tol=2e-5)


@pytest.mark.parametrize("taps, dilation", TAPS, ids=str)
def test_ranges_cover_every_axis(taps, dilation):
    "Inputs that are left out lie outside the map; where a strip holds a class, those that are kept reach it from some output."
    pad = dilation * (taps - 1) // 2
    for length, most in product(range(1, 23), (1, 2, 5, 10)):
        share = even_share(-(-length // dilation), most)
        assert 1 <= share <= most and -(-length // dilation) <= share * -(-(-(-length // dilation)) // most)
        first, last = axis_range(length, share, taps, dilation)
        places = product(range(length), range(taps))
        read = {o // dilation % share + i for o, i in places if 0 <= o + dilation * i - pad < length}
        assert all(first <= n < last for n in read) and 0 <= first < last <= share + taps - 1
        if share * dilation >= length and read:
            assert read == set(range(first, last))


def test_heights_of_strips():
    "Whole classes where there are enough strips; where there are few, as many cuts as pay for the rows that are read twice."
    assert strip_rows(19, 7, 5000, 500) == 19 and strip_rows(1, 7, 1, 500) == 1
    assert strip_rows(56, 3, 10, 500) < 10 and strip_rows(224, 5, 600, 500) < 224
    for height, taps, tiles, programs in product((1, 5, 56), (3, 7), (1, 40, 900), (4, 500)):
        rows = strip_rows(height, taps, tiles, programs)
        cost = lambda r: -(-tiles * -(-height // r) // programs) * (r + (taps - 1) * (r < height))
        assert 1 <= rows <= height and cost(rows) <= cost(height)


@pytest.mark.parametrize("place", range(3), ids=("x", "weight", "bias"))
@pytest.mark.parametrize("taps", [3, 7])
def test_one_gradient_at_a_time(place, taps):
    "What is not asked for is not computed; what is does not change."
    args, fn = draw((1, 8, 3, 4), taps), partial(conv, residual=True)
    want = torch.autograd.grad(fn(*(a.requires_grad_() for a in args)).square().sum(), args)[place]
    args = [a.detach() for a in args]
    args[place].requires_grad_()
    assert rel_error(torch.autograd.grad(fn(*args).square().sum(), args[place])[0], want) < 1e-6


@pytest.mark.parametrize("taps", [2, 4])
def test_even_kernels_on_even_maps(taps):
    "Their padding is no multiple of the dilation: inputs and outputs stand in different classes, and no pixel may be left out of the bias."
    fn, reference = (partial(f, dilation=2) for f in (conv, depthwise_reference))
    check_against_reference(fn, reference, draw((1, 4, 6, 4), taps), tol=2e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_refuses(backend):
    good, e = dict(zip(("x", "weight", "bias"), draw((1, 4, 3, 4)))), torch.empty
    cases = [
        (dict(dilation=0), ValueError, "dilation"),
        (dict(dilation=1.5), TypeError, "dilation"),
        (dict(residual=1), TypeError, "residual"),
        (dict(residual=True, dilation=2, weight=e(4, 1, 4, 4)), ValueError, ["weight", "odd"]),
        (dict(x=e(4, 3, 4)), ValueError, "x"),
        (dict(x=e(1, 4, 0, 4)), ValueError, "x"),
        (dict(x=e(1, 4, 3, 4, dtype=torch.int64)), TypeError, "x"),
        (dict(weight=e(5, 1, 5, 5)), ValueError, "weight"),
        (dict(weight=e(4, 1, 5, 3)), ValueError, "weight"),
        (dict(weight=e(4, 1, 4, 4)), ValueError, ["weight", "even"]),
        (dict(bias=e(3)), ValueError, "bias"),
        (dict(bias=e(4, dtype=torch.float64)), TypeError, "bias"),
        (dict(backend="cuda"), ValueError, "backend"),
    ]
    if torch.device(device_under_test()).type == "cpu":
        check_raises(depthwise_conv, cases, **(good | dict(backend=backend)))


def test_kernels_that_do_not_fit():
    x, w, b = draw((1, 4, 14, 14), 13)
    with pytest.raises(ValueError, match="11 x 11"):
        conv(x, w, b)
    assert rel_error(depthwise_conv(x, w, b, residual=True), depthwise_reference(x, w, b, residual=True)) < 1e-5


def test_types_layouts_and_nothing():
    "Channels first gives channels last; weights of another type under autocast; a batch of no images."
    x, w, b = draw((2, 8, 3, 4))
    y = conv(x, w, b)
    last = conv(x.contiguous(memory_format=torch.channels_last), w, b)
    assert torch.equal(y, last) and y.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.bfloat16):
        half = conv(x, w.requires_grad_(), b)
    assert half.dtype == torch.bfloat16 and torch.autograd.grad(half.float().sum(), w)[0].dtype == torch.float32
    grads = torch.autograd.grad(conv(x[:0], w, b.requires_grad_()).sum(), (w, b))
    assert all(float(g.abs().sum()) == 0 for g in grads)

# Written from the test cells of nbs/5_vision/hyperzzw.ipynb by `attnbook export`. Do not edit.
# fmt: off
import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnbook.engine import arch_of
from attnbook.hyperzzw.claims_study import (
    _best_rival,
    _changed,
    _contest,
    _crossover,
    _epochs_needed,
    _exponent,
    _final_gap,
    _gap,
    _gate_effect,
    _largest_mean,
    _resampled,
    _rows,
    _seen,
    _slow_share,
    _speed,
)
from attnbook.hyperzzw.experiments_study import (
    OURS,
    Experiments,
    Spec,
    context,
    context_fields,
    epochs_to,
    fields,
    frequency_specs,
    leakage,
    mean_frequency,
    receptive_field,
    spectra,
)
from attnbook.hyperzzw.global_kernels import MAP_LAUNCH, MapLaunch
from attnbook.hyperzzw.nets import (
    GIBS,
    PUBLISHED_PARTS,
    RGU,
    BatchStandardize,
    Kar2,
    Kar3,
    SFNEBlock,
    Terminator,
    is_slow,
    parameter_parts,
    slow_neural_loss,
    terminator_cifar,
    terminator_loss,
)
from attnbook.hyperzzw.op import hyperzzw_gate, hyperzzw_global, hyperzzw_local, standardize_gelu
from attnbook.hyperzzw.reference import (
    aliasing_omega,
    hyper_kernel_coords,
    hyperzzw_gate_reference,
    hyperzzw_global_reference,
    hyperzzw_local_reference,
    hyperzzw_score,
    instance_standardize,
)
from attnbook.hyperzzw.slow_nets import ContextSlowNet, SlowNet, radial_spectrum, s_renormalize
from attnbook.hyperzzw.study import Join, _ours, claims, formula_peer, products_peer
from attnbook.hyperzzw.training_study import (
    OPTIMIZERS,
    Data,
    Job,
    LongConvNet,
    SignSGD,
    SmallResNet,
    digit_data,
    predictions,
    smoothed_cross_entropy,
    train_networks,
    widest,
)
from attnbook.lab.stats import Interval
from attnbook.lab.testing import (
    check_against_reference,
    check_autocast,
    check_gradients,
    check_opcheck,
    check_operation,
    check_raises,
    evaluate,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.layers import count_parameters

BACKENDS = ("torch", "triton")


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    "On a GPU convolutions of float32 are in tf32 unless one says no."
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def maps(*shapes, dtype=torch.float32, seed=0):
    "A seeded tensor of each shape, on the device under test."
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device_under_test(), dtype) for s in shapes]


def test_global_reference_by_loops():
    x, K, v = maps((2, 3, 4, 4), (1, 3, 4, 4), (2, 3, 4, 4), dtype=torch.float64)
    out, want = hyperzzw_global_reference(x, K, v), torch.zeros_like(x)
    for b, c, i, j, w in np.ndindex(2, 3, 4, 4, 4):
        want[b, c, i, j] += x[b, c, i, w] * K[0, c, i, w] * v[b, c, w, j]
    assert rel_error(out, want) < 1e-12


def test_local_reference_by_loops():
    "A kernel for each image, pixels outside the map being zero."
    x, w = maps((2, 2, 4, 5), (2, 2, 1, 3, 3), dtype=torch.float64)
    want = torch.zeros_like(x)
    for b, c, i, j, u, t in np.ndindex(2, 2, 4, 5, 3, 3):
        if 0 <= i + u - 1 < 4 and 0 <= j + t - 1 < 5:
            want[b, c, i, j] += w[b, c, 0, u, t] * x[b, c, i + u - 1, j + t - 1]
    assert rel_error(hyperzzw_local_reference(x, w), want) < 1e-12
    assert rel_error(hyperzzw_local_reference(x, w[0])[0], want[0]) < 1e-12


def test_standardization():
    x = 3 * maps((2, 3, 5, 7), dtype=torch.float64)[0] + 5
    y = instance_standardize(x)
    assert y.mean((2, 3)).abs().max() < 1e-12 and (y.var((2, 3), correction=0) - 1).abs().max() < 1e-5
    assert rel_error(instance_standardize(2 * x - 9), y) < 1e-5, "invariant to a scale above 0 and to a shift"
    assert (
        instance_standardize(torch.ones(1, 1, 1, 1)).item() == 0
        and instance_standardize(x.bfloat16()).dtype == torch.bfloat16
    )


def test_reference_gradients():
    x, K, v, u = maps((2, 2, 5, 5), (1, 2, 5, 5), (2, 2, 5, 5), (2, 2, 5, 5))
    check_gradients(lambda x, K, v, u: hyperzzw_global_reference(x, K, (v, u), standardize=(True, False)), [x, K, v, u])
    check_gradients(hyperzzw_gate_reference, [x, v, K[:, :1]])


def test_scores():
    x, K = maps((2, 3, 4, 4), (1, 3, 4, 4), dtype=torch.float64)
    assert rel_error(hyperzzw_score(3 * x, 2 * K), 18 * hyperzzw_score(x, K)) < 1e-12
    assert rel_error(hyperzzw_score(x, K)[1, 2], K[0, 2] * x[1, 2] ** 2) < 1e-12


def test_coordinates():
    c = hyper_kernel_coords(3, 5)
    assert c.shape == (3, 5, 2) and c[0, 0].tolist() == [-1, -1] and c[2, 4].tolist() == [1, 1]
    assert c[1, :, 0].tolist() == [0] * 5 and c[0, :, 1].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert torch.equal(hyper_kernel_coords(9)[::2], hyper_kernel_coords(5)), "every second point of the finer grid"
    assert hyper_kernel_coords(1).tolist() == [[-1]] and abs(aliasing_omega(32) - 3.6534) < 1e-3
    with pytest.raises(ValueError, match=r"sizes\[1\]"):
        hyper_kernel_coords(3, 0)


PRODUCTS = {  # name -> batch, channels, side, which factors are standardized, are they given back, a kernel for each?
    "plain": (2, 3, 7, (False,), False, False),
    "standardized": (3, 2, 14, (True,), False, False),
    "a block's": (3, 1, 16, (True, True, False), True, False),
    "one pixel": (2, 2, 1, (False, True), False, False),
    "one sample": (1, 2, 16, (True,), True, False),
    "own kernels": (3, 2, 9, (False, True), True, True),
    "33 pixels": (1, 1, 33, (True,), False, False),
}


def product_of(case, dtype=torch.float32):
    "The operation and its inputs: x, kernel and the right factors."
    B, C, S, flags, keep, own = PRODUCTS[case]

    def run(x, kernel, *v, backend="triton"):
        found = hyperzzw_global(x, kernel, v, standardize=flags, return_factors=keep, backend=backend)
        return (*found[0], *(f for f, flag in zip(found[1], flags) if flag)) if keep else found

    return run, maps((B, C, S, S), (B if own else 1, C, S, S), *[(B, C, S, S)] * len(flags), dtype=dtype)


@pytest.mark.parametrize("case", PRODUCTS)
def test_global_agrees_with_reference(case):
    run, inputs = product_of(case)
    floor = 1e-3 if case == "one pixel" else 0.0  # a pixel alone: its standardized value is zero
    check_against_reference(run, partial(run, backend="torch"), inputs, grad_tol=3e-5, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["plain", "a block's"])
def test_global_types(case, dtype):
    run, inputs = product_of(case, dtype)
    tol = 4e-3 if dtype == torch.float16 else 3e-2  # x * kernel and the factor are rounded
    check_against_reference(run, partial(run, backend="torch"), inputs, tol=tol, grad_tol=tol)


@pytest.mark.parametrize("case", ["plain", "a block's"])
def test_global_keeps_a_kernel_in_float32(case):
    run, (x, kernel, *v) = product_of(case, torch.bfloat16)
    outs, grads = evaluate(run, [x, kernel.float(), *v])
    assert outs[0].dtype == torch.bfloat16 and grads["argument 1"].dtype == torch.float32


@pytest.mark.parametrize("k", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "for each image"])
def test_local_agrees_with_reference(own, k):
    x, w = maps((2, 3, 9, 11), (2, 3, 1, k, k) if own else (3, 1, k, k))
    run = partial(hyperzzw_local, backend="triton")
    check_against_reference(run, hyperzzw_local_reference, [x, w], grad_tol=3e-5)


@pytest.mark.parametrize(
    "shape, k", [((1, 1, 1, 1), 1), ((3, 2, 33, 5), 3), ((5, 1, 28, 28), 5), ((1, 2, 3, 17), 3)], ids=str
)
def test_local_shapes(shape, k):
    x, w = maps(shape, (shape[1], 1, k, k))
    check_against_reference(partial(hyperzzw_local, backend="triton"), hyperzzw_local_reference, [x, w], grad_tol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_local_types(dtype):
    x, w = maps((2, 2, 8, 8), (2, 1, 3, 3), dtype=dtype)
    check_against_reference(partial(hyperzzw_local, backend="triton"), hyperzzw_local_reference, [x, w], dtype=dtype)


@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (1, 1, 1, 1), (3, 2, 16, 16)], ids=str)
def test_gate_agrees_with_reference(shape):
    k, q, bias = maps(shape, shape, (1, 1, *shape[2:]))
    floor = 30.0 if shape[-1] == 1 else 0.0  # of one pixel alone: a true zero, beside 1 / sqrt(eps) = 316
    check_against_reference(
        partial(hyperzzw_gate, backend="triton"), hyperzzw_gate_reference, [k, q, bias], grad_tol=3e-5, floor=floor
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gate_types(dtype):
    k, q, bias = maps((2, 3, 7, 7), (2, 3, 7, 7), (1, 1, 7, 7), dtype=dtype)
    check_against_reference(
        partial(hyperzzw_gate, backend="triton"), hyperzzw_gate_reference, [k, q, bias], grad_tol=2e-2
    )


def norm_inputs(shape, dtype=torch.float32, given=False):
    "x with means and deviations of its own, which channels go over the batch, a bias, and statistics if `given`."
    x, mean = maps(shape, (shape[1], 1, 1))
    over = torch.arange(shape[1], device=x.device) % 3 != 1
    var = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)).to(x.device) + 0.5
    return [
        (2 * x + mean).to(dtype),
        over,
        torch.tensor(0.3, device=x.device),
        *((mean[:, 0, 0], var) if given else ()),
    ]


def norm_of(x, over, bias, *given, backend="triton"):
    return standardize_gelu(x, over, bias, given or None, backend=backend)


@pytest.mark.parametrize("given", [False, True], ids=["own statistics", "given"])
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (1, 2, 4, 4), (35, 17, 2, 3), (2, 1, 16, 16)], ids=str)
def test_norm_agrees_with_reference(shape, given):
    x, over, bias, *statistics = norm_inputs(shape, given=given)
    run = lambda backend: lambda x, bias: norm_of(x, over, bias, *statistics, backend=backend)[0]
    check_against_reference(run("triton"), run("torch"), [x, bias], grad_tol=3e-5)
    for a, b in zip(norm_of(x, over, bias, *statistics)[1:], norm_of(x, over, bias, *statistics, backend="torch")[1:]):
        assert rel_error(a, b) < 1e-5 and not a.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norm_types(dtype):
    x, over, bias = norm_inputs((3, 4, 6, 6), dtype)
    check_against_reference(
        lambda x, b: norm_of(x, over, b)[0],
        lambda x, b: norm_of(x, over, b, backend="torch")[0],
        [x, bias],
        grad_tol=2e-2,
    )


def test_norm_by_hand():
    x, over, bias = norm_inputs((3, 4, 6, 5), torch.float64)
    y, mean, rate = norm_of(x, over, bias, backend="torch")
    for c in range(4):
        for b in range(3):
            part = x[:, c] if over[c] else x[b, c]
            hat = (x[b, c] - part.mean()) / (part.var(correction=0) + 1e-5).sqrt()
            assert rel_error(y[b, c], F.gelu(hat) + 0.3) < 1e-6 and rel_error(mean[b, c], part.mean()) < 1e-10
    check_gradients(lambda x, b: norm_of(x, over, b, backend="torch")[0], [x, bias])


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_is_a_good_citizen(backend):
    x, over, bias = norm_inputs((2, 3, 4, 5))
    run = lambda backend: lambda x, bias: norm_of(x, over, bias, backend=backend)[0]
    check_operation(run(backend), run("torch"), [x, bias], grad_tol=3e-5)
    if backend == "triton":
        check_opcheck(torch.ops.attnbook.hyperzzw_norm, (x.requires_grad_(), over, bias.requires_grad_(), None, None))


def test_norm_refuses():
    x, over, bias, mean, var = norm_inputs((2, 3, 4, 4), given=True)
    check_raises(
        standardize_gelu,
        [
            (dict(over_batch=over[:2]), ValueError, "over_batch"),
            (dict(over_batch=over.int()), TypeError, "over_batch"),
            (dict(bias=mean), ValueError, "bias"),
            (dict(statistics=(mean,)), ValueError, "statistics"),
            (dict(statistics=(mean, var[:2])), ValueError, "statistics"),
            (dict(x=x[0]), ValueError, "x must"),
        ],
        x=x,
        over_batch=over,
        bias=bias,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_good_citizens(backend):
    B, C, S = 2, 1, 5
    run, inputs = product_of("own kernels")
    inputs = [t[:B, :C, :S, :S] for t in inputs]
    check_operation(
        partial(run, backend=backend), partial(run, backend="torch"), inputs, grad_tol=3e-5, skip=("autocast",)
    )
    check_autocast(partial(run, backend=backend), inputs, tol=4e-2)
    x, w = maps((2, 2, 5, 6), (2, 2, 1, 3, 3))
    check_operation(partial(hyperzzw_local, backend=backend), hyperzzw_local_reference, [x, w], grad_tol=3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_is_a_good_citizen(backend):
    inputs = maps((2, 2, 5, 5), (2, 2, 5, 5), (1, 1, 5, 5))
    check_operation(
        partial(hyperzzw_gate, backend=backend), hyperzzw_gate_reference, inputs, grad_tol=3e-5, skip=("autocast",)
    )
    check_autocast(partial(hyperzzw_gate, backend=backend), inputs, tol=4e-2)


@pytest.mark.parametrize("flags", [(0, 0), (1, 0), (3, 1)], ids=str)
def test_registered_product(flags):
    x, K, v, u = (t.requires_grad_() for t in maps((2, 1, 4, 4), (1, 1, 4, 4), (2, 1, 4, 4), (2, 1, 4, 4)))
    check_opcheck(torch.ops.attnbook.hyperzzw_product, (x, K, [v, u], *flags))


def test_registered_gate_and_local():
    k, q, bias, w = (t.requires_grad_() for t in maps((2, 1, 4, 4), (2, 1, 4, 4), (1, 1, 4, 4), (1, 1, 3, 3)))
    check_opcheck(torch.ops.attnbook.hyperzzw_gate, (k, q, bias))
    check_opcheck(torch.ops.attnbook.hyperzzw_local, (k, w))


def test_partial_sums_do_not_depend_on_how_many():
    "One sample to a program or all to one: the same gradients of the kernel, up to the order of a sum."
    run, inputs = product_of("standardized")
    found = []
    for programs in (1, 10**6):
        table = MAP_LAUNCH.trying(arch_of(inputs[0].device), "backward", 32, 16, MapLaunch(programs, 1))
        with table:
            found.append(evaluate(run, inputs)[1])
    for name in found[0]:
        assert rel_error(found[0][name], found[1][name]) < 1e-6


def test_empty_batches():
    x, K = torch.empty(0, 2, 4, 4, device=device_under_test()), maps((1, 2, 4, 4))[0]
    w = maps((2, 1, 3, 3))[0]
    for op, inputs in (
        (lambda x, K: hyperzzw_global(x, K, x, backend="triton"), [x, K]),
        (partial(hyperzzw_local, backend="triton"), [x, w]),
    ):
        outs, grads = evaluate(op, inputs)
        assert outs[0].shape == x.shape and (grads["argument 1"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_identities(backend):
    x, K, v = maps((2, 3, 6, 6), (1, 3, 6, 6), (2, 3, 6, 6))
    eye = torch.eye(6, device=x.device).expand(2, 3, 6, 6)
    op = partial(hyperzzw_global, backend=backend)
    assert rel_error(op(x, torch.ones_like(K), eye), x) < 1e-6, "a kernel of ones, identity matrices"
    assert rel_error(op(eye, torch.ones_like(K), v), v) < 1e-6, "x * K is the identity"
    delta = torch.zeros(3, 1, 5, 5, device=x.device)
    delta[:, :, 2, 2] = 1
    assert rel_error(hyperzzw_local(x, delta, backend=backend), x) < 1e-6
    delta[:, :, 2, 2], delta[:, :, 1, 4] = 0, 1  # from one row above, two columns to the right
    moved = F.pad(x, (0, 2, 1, 0))[:, :, :6, 2:]
    assert rel_error(hyperzzw_local(x, delta, backend=backend), moved) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross(backend):
    "Row i of x and column j of v, and nothing else."
    x, K, v = maps((1, 1, 6, 6), (1, 1, 6, 6), (1, 1, 6, 6))
    x.requires_grad_(), v.requires_grad_()
    dx, dv = torch.autograd.grad(hyperzzw_global(x, K, v, backend=backend)[0, 0, 2, 4], [x, v])
    assert (dx[0, 0, 2] != 0).all() and (dx != 0).sum() == 6 and (dv[0, 0, :, 4] != 0).all() and (dv != 0).sum() == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_homogeneity(backend):
    x, K = maps((2, 2, 5, 5), (1, 2, 5, 5))
    op = partial(hyperzzw_global, backend=backend)
    assert rel_error(op(3 * x, K, 3 * x), 9 * op(x, K, x)) < 1e-5 and rel_error(op(x, 3 * K, x), 3 * op(x, K, x)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_standardized_factors_forget_scale_and_shift(backend):
    x, K, v = maps((2, 2, 8, 8), (1, 2, 8, 8), (2, 2, 8, 8))
    a, b = torch.rand(2, 2, 1, 1, device=x.device) + 0.5, torch.randn(2, 2, 1, 1, device=x.device)
    op = partial(hyperzzw_global, standardize=True, backend=backend)
    assert rel_error(op(x, K, a * v + b), op(x, K, v)) < 1e-4 < rel_error(op(x, K, v), hyperzzw_global(x, K, v))
    assert op(x, K, torch.full_like(v, 7)).abs().max() < 1e-2, "constant maps become zero"


@pytest.mark.parametrize("backend", BACKENDS)
def test_loud_maps(backend):
    "A mean far from zero costs no digits: the variance is taken of what is left."
    x, K, v = maps((1, 1, 16, 16), (1, 1, 16, 16), (1, 1, 16, 16))
    op = partial(hyperzzw_global, standardize=True, backend=backend)
    assert rel_error(op(x, K, v + 1000), op(x.double(), K.double(), (v + 1000).double(), backend="torch")) < 1e-3


def test_bad_input():
    x, K, v, w = maps((2, 3, 6, 6), (1, 3, 6, 6), (2, 3, 6, 6), (3, 1, 3, 3))
    bad = [
        (dict(x=x[0]), ValueError, "x must"),
        (dict(x=x[:, :, :5], kernel=K, v=v), ValueError, ("x must", "square")),
        (dict(x=x.long()), TypeError, "x must"),
        (dict(x=1), TypeError, "x must"),
        (dict(kernel=K[:, :2]), ValueError, "kernel must"),
        (dict(kernel=K[0]), ValueError, "kernel must"),
        (dict(kernel=torch.cat([K] * 3)), ValueError, ("kernel must", "1 or 2")),
        (dict(kernel=None), TypeError, "kernel"),
        (dict(v=v[:1]), ValueError, "v must"),
        (dict(v=v.half()), TypeError, "v must"),
        (dict(v=[]), ValueError, "v must"),
        (dict(v=(v, v[:, :2])), ValueError, "v[1]"),
        (dict(v="v"), TypeError, "v must"),
        (dict(standardize=1), TypeError, "standardize"),
        (dict(standardize=(True, False)), ValueError, "standardize"),
        (dict(return_factors=None), TypeError, "return_factors"),
        (dict(backend="cuda"), ValueError, "backend"),
    ]
    check_raises(hyperzzw_global, bad, x=x, kernel=K, v=v)
    local = [
        (dict(weight=w[:2]), ValueError, "weight must"),
        (dict(weight=w[..., :2, :2]), ValueError, ("weight", "odd")),
        (dict(weight=torch.zeros(3, 1, 7, 7, device=w.device)), ValueError, ("weight", "at most 6")),
        (dict(weight=w[..., :2]), ValueError, "weight must"),
        (dict(weight=w.long()), TypeError, "weight"),
        (dict(padding="valid"), ValueError, "padding"),
        (dict(x=x[0]), ValueError, "x must"),
        (dict(backend=""), ValueError, "backend"),
    ]
    check_raises(hyperzzw_local, local, x=x, weight=w)
    gate = [
        (dict(k=x[:, :, 1:]), ValueError, ("k must", "square")),
        (dict(q=x[:1]), ValueError, "q must"),
        (dict(bias=K), ValueError, "bias"),
        (dict(q=x.half()), TypeError, "q must"),
        (dict(bias=0), TypeError, "bias"),
    ]
    check_raises(hyperzzw_gate, gate, k=x, q=x, bias=K[:, :1])


def test_large_maps():
    "Beyond 64 pixels (128 for the other two) torch computes, unless triton was asked for."
    x = torch.zeros(1, 1, 129, 129, device=device_under_test())
    w, bias = torch.zeros(1, 1, 3, 3, device=x.device), torch.zeros(1, 1, 129, 129, device=x.device)
    calls = (
        lambda t, **o: hyperzzw_global(t[..., :65, :65], t[..., :65, :65], t[..., :65, :65], **o),
        lambda t, **o: hyperzzw_local(t, w, **o),
        lambda t, **o: hyperzzw_gate(t, t, bias, **o),
    )
    for call, most in zip(calls, (64, 128, 128)):
        assert call(x).shape[-1] == most + 1
        with pytest.raises(ValueError, match=f"at most {most}"):
            call(x, backend="triton")


def small(**options):
    "A Terminator of two blocks for maps of 10 x 10."
    torch.manual_seed(0)
    return Terminator(2, (6, 2), 3, 10, **options)


def test_parameter_counts():
    with torch.device("meta"):
        model = terminator_cifar()
    blocks = [count_parameters(b) for b in model.blocks]
    assert blocks == [53_377, 57_824, 105_188, 253_580, 863_996]
    assert count_parameters(model) == 1_336_855 and parameter_parts(model) == PUBLISHED_PARTS
    assert count_parameters(lambda: terminator_cifar(100)) == 1_362_865
    assert sum(p.numel() for n, p in model.named_parameters() if is_slow(n)) == 220_800


def test_dead_biases():
    "A constant added where a standardization follows: the logits do not move."
    model = small(dropout=0.0).double()
    x = torch.randn(3, 2, 10, 10, dtype=torch.float64)
    with torch.no_grad():
        before, dead = model(x), 0
        for name, p in model.named_parameters():
            if name.endswith(("mixer.bias", "y.bias", "bottleneck.bias")):
                p += torch.randn_like(p)
                dead += p.numel()
        assert rel_error(model(x), before) < 1e-10
    assert dead == sum(7 * C + f * C for C, f in ((2, 6), (12, 2)))
    assert sum(7 * C + f * C for C, f in zip((3, 12, 36, 72, 144), (4, 3, 2, 2, 2))) == 2_421


def test_slow_net_by_hand():
    torch.manual_seed(0)
    net = SlowNet((3, 4), 5, hidden=7, num_layers=2, omega_0=1.3).double()
    nn.init.normal_(net.beta)
    c, beta = hyper_kernel_coords(3, 4).double(), net.beta[..., None]
    h = torch.sin(c @ net.sines[0].weight.T + net.sines[0].bias)
    for g, v in zip(list(net.sines)[1:], net.mixing):
        h = torch.sin(c @ g.weight.T + g.bias) * (h @ v.weight.T + v.bias) + beta
    want = h @ net.last.weight.T + net.last.bias
    assert rel_error(net()[0], want.movedim(-1, 0)) < 1e-6, "coordinates are float32"


@pytest.mark.parametrize("sizes", [(5,), (6, 6)], ids=str)
def test_slow_net_does_not_know_the_grid(sizes):
    torch.manual_seed(0)
    net, finer = SlowNet(sizes, 2, hidden=8), [2 * n - 1 for n in sizes]
    every = (slice(None), slice(None), *[slice(None, None, 2)] * len(sizes))
    assert rel_error(net(finer)[every], net()) < 1e-5
    nn.init.normal_(net.beta)
    assert rel_error(net(finer)[every], net()) < 1e-5, "beta is interpolated, corners on corners"


def test_slow_nets_stay_in_float32():
    net, local = SlowNet((4, 4), 3), ContextSlowNet(3, 3)
    x = torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert net().dtype == torch.float32 == local(x.bfloat16()).dtype and torch.equal(net(), net())
        inside = net(), local(x)
    assert torch.equal(inside[0], net()) and torch.equal(inside[1], local(x))


def test_initial_frequencies():
    "Mean frequencies of a wide layer, and half of the aliasing one by default."
    torch.manual_seed(0)
    net = SlowNet((32, 32), 1, hidden=4000, num_layers=1)
    mean = [float(s.weight.detach().abs().mean()) for s in net.sines]
    assert mean[0] == pytest.approx(math.pi * 31 / 4, rel=0.05) and mean[1] == pytest.approx(mean[0] / 2, rel=0.05)
    assert all((s.bias == 0).all() for s in net.sines) and (net.mixing[0].bias == 1).all() and (net.beta == 0).all()
    assert float(net.mixing[0].weight.detach().var()) == pytest.approx(1 / 4000, rel=0.02)
    assert (
        float(net.last.weight.detach().var()) == pytest.approx(1 / 4000 / 1024, rel=0.1) and SlowNet((1,)).omega_0 == 1
    )


@pytest.mark.parametrize("context", ["batch", "sample"])
def test_context_kernels(context):
    torch.manual_seed(0)
    net, x = ContextSlowNet(3, 5, hidden=8, context=context).double(), torch.randn(4, 3, 9, 9, dtype=torch.float64)
    assert net(x).shape == ((3, 1, 5, 5) if context == "batch" else (4, 3, 1, 5, 5))
    if context == "sample":
        assert rel_error(net(x)[1], net(x[1:2])[0]) < 1e-12, "an image's kernel is its own"
    else:
        assert rel_error(net(x), net(x[:2])) > 1e-6 and rel_error(net(x), net(x[[3, 1, 0, 2]])) < 1e-12
        e = F.gelu(net.embed(net.reduce(F.adaptive_avg_pool2d(x, 5).flatten(2).mT).mean(0, keepdim=True)))
        c, h = hyper_kernel_coords(5, 5).flatten(0, 1).double(), None
        h = torch.sin(net.sines[0](c))
        for g, v, gate in zip(list(net.sines)[1:], net.mixing, net.gates):
            h = torch.sin(g(c)) * v(h)
            h = (h + 0.1 * h / h.norm(dim=-2, keepdim=True)) * gate(e)
        assert rel_error(net(x)[:, 0].flatten(1), net.last(h)[0].T) < 1e-6


def test_s_renormalization():
    h = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    norm = h.norm(dim=1, keepdim=True)
    torch.testing.assert_close(s_renormalize(h), h * (1 + 0.1 / norm))
    got, want = (
        torch.autograd.grad(y, h, torch.ones_like(h))[0]
        for y in (s_renormalize(h), 0.1 * h / h.norm(dim=1, keepdim=True))
    )
    torch.testing.assert_close(got, want)
    assert s_renormalize(torch.zeros(1, 2, 2)).isfinite().all()


def test_spectrum():
    wave = torch.cos(2 * math.pi * 3 * torch.arange(16) / 16).expand(2, 16, 16)
    curve = radial_spectrum(wave)
    assert curve.shape == (9,) and curve[3] == pytest.approx(1)


def test_gibs():
    torch.manual_seed(0)
    x = 2 * torch.randn(3, 24, 4, 5, dtype=torch.float64) + torch.randn(24, 1, 1)
    y = GIBS(24, 12).double()(x)
    for c in range(24):
        part = y[:, c] if c // 2 % 2 == 0 else y[:, c].flatten(1)
        mean, var = (
            (part.mean(), part.var(correction=0)) if c // 2 % 2 == 0 else (part.mean(1), part.var(1, correction=0))
        )
        assert mean.abs().max() < 1e-12 and (var - 1).abs().max() < 1e-4, c
    assert rel_error(y[:, 2], instance_standardize(x)[:, 2]) < 1e-12
    with pytest.raises(ValueError, match="groups must divide channels"):
        GIBS(20)


@pytest.mark.parametrize("make", [partial(GIBS, 12), partial(BatchStandardize, 12)], ids=["G-IBS", "BS"])
def test_running_statistics(make):
    "They follow torch's batch normalization; in evaluation an image's result is its own."
    torch.manual_seed(0)
    norm, twin, theirs = make(running=True), make(running=True), nn.BatchNorm2d(12, affine=False)
    for _ in range(3):
        x = torch.randn(4, 12, 3, 3) * 2 + 1
        even = norm(x), theirs(x)
        twin.activate(x, torch.tensor(0.0))
        assert rel_error(even[0][:, 0], even[1][:, 0]) < 1e-5
    norm.eval(), theirs.eval()
    assert rel_error(norm.activate(x, torch.tensor(0.5)), F.gelu(norm(x)) + 0.5) < 1e-5
    for a, b in zip(norm.state_dict().values(), twin.state_dict().values()):
        assert rel_error(a, b) < 1e-6
    assert rel_error(norm(x)[:, 0], theirs(x)[:, 0]) < 1e-5 and torch.allclose(norm(x)[1], norm(x[1:2])[0], atol=1e-6)
    plain = make(running=False).eval()
    assert rel_error(plain(x)[1], plain(x[1:2])[0]) > 1e-3 and not plain.state_dict()


def test_rgu_by_hand():
    torch.manual_seed(0)
    unit, x = RGU(3, 5).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    nn.init.normal_(unit.image)
    k, v = unit.kv(x)[:, :3], unit.kv(x)[:, 3:]
    want = unit.y(F.gelu(instance_standardize(k * unit.q(v))) + unit.image)
    assert rel_error(unit(x), want) < 1e-12 and unit(torch.randn(1, 3, 7, 7, dtype=torch.float64)).shape == (1, 3, 7, 7)


def test_block_by_hand():
    "All ten branches in the order of the concatenation."
    torch.manual_seed(0)
    block, x, old = (
        SFNEBlock(3, 4, 10, earlier=2).double(),
        *torch.randn(2, 2, 3, 10, 10, dtype=torch.float64).unbind(0),
    )
    K, IS = block.global_kernel(), instance_standardize
    A = x * K
    fast, m = IS(block.rgu_slow(A) + block.rgu_fast(x)), IS(block.mixer(x))
    c = IS(x * torch.sigmoid(block.channel_kernel()[0, 0] * x.mean((2, 3)) ** 2)[..., None, None])
    o, o_m, o_c = A @ fast, A @ m, A @ c
    score = (
        block.hyper_space()
        * o.mean(1, keepdim=True) ** 2
        * block.hyper_channel().view(1, 3, 1, 1)
        * o.mean((2, 3), keepdim=True) ** 2
    )

    def f(i, context, into):
        b = block.local[i]
        return F.gelu(b.norm(b.mixer(hyperzzw_local_reference(into, b.kernel(context))))) + b.bias

    branches = [
        o,
        f(1, c, x),
        old,
        fast,
        o_m,
        f(0, x, c),
        torch.sigmoid(o) * o,
        f(2, m, x),
        o_c,
        f(3, x, m),
        2 * old,
        x * torch.sigmoid(score),
    ]
    want = F.gelu(block.norm(block.bottleneck(torch.cat(branches, 1)))) + block.bias
    assert rel_error(block(x, old, 2 * old), want) < 1e-8
    assert [b.kernel.kernel_size for b in block.local] == [3, 9, 5, 7]


def test_other_sizes():
    "On a larger map a product sums over more columns: it is scaled by the trained side over the map's."
    torch.manual_seed(0)
    block, seen = SFNEBlock(3, 4, 10), []
    products = block._products
    block._products = lambda *given: seen.append(given) or products(*given)
    block(torch.randn(2, 3, 14, 14))
    ((*given, scale),) = seen
    assert scale == 10 / 14
    for a, b in zip(products(*given, scale)[0], products(*given, 1)[0]):
        assert rel_error(a, b * scale) < 1e-6


def test_hyper_channel_interaction_does_nothing():
    torch.manual_seed(0)
    x, outs = 3 * torch.randn(3, 2, 10, 10), {}
    for hci in ("official", "none", "gate_after"):
        model = small(hci=hci, dropout=0.0)
        for n, p in model.named_parameters():
            if "channel_kernel.last.bias" in n:
                nn.init.constant_(p, 3.0)  # a gate one would notice
        outs[hci] = model(x)
    assert rel_error(outs["official"], outs["none"]) < 1e-3 < 1e-2 < rel_error(outs["gate_after"], outs["none"])


@pytest.mark.parametrize("context", ["batch", "sample"])
def test_logits_and_the_rest_of_the_batch(context):
    model, x = small(context=context).double(), torch.randn(6, 2, 10, 10, dtype=torch.float64)
    model(x)
    model.eval()
    alone, others = model(x[:1]), model(x)[:1]
    assert rel_error(alone, others) < 1e-12 if context == "sample" else rel_error(alone, others) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(context="sample"),
        dict(hci="gate_after"),
        dict(use_global=False),
        dict(use_local=False),
        dict(omega_0=2000.0),
    ],
    ids=str,
)
def test_networks(changes):
    "Every parameter that can learn gets a gradient; one image is a batch too; another size is taken."
    model, x = small(**changes).to(device_under_test()), torch.randn(3, 2, 10, 10, device=device_under_test())
    terminator_loss(model, x, torch.tensor([0, 2, 1], device=x.device)).backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if changes.get("use_local", True)
    )
    assert model.eval()(x[:1]).shape == (1, 3) and model(torch.randn(2, 2, 14, 14, device=x.device)).shape == (2, 3)


@pytest.mark.parametrize("context", ["batch", "sample"])
def test_kernels_in_the_network(context):
    "A block on the kernels against the same block on PyTorch's operators, gradients included."
    torch.manual_seed(0)
    plain = SFNEBlock(2, 6, 10, context=context, backend="torch").to(device_under_test())
    ours = SFNEBlock(2, 6, 10, context=context, backend="triton").to(device_under_test())
    ours.load_state_dict(plain.state_dict())
    x, found = torch.randn(2, 2, 10, 10, device=device_under_test()), []
    for block in (plain, ours):
        leaf = x.clone().requires_grad_()
        out = block(leaf)
        found.append(
            [
                out,
                *torch.autograd.grad(out.square().sum(), [leaf, block.global_kernel.last.weight, block.rgu_fast.image]),
            ]
        )
    for a, b in zip(*found):
        assert rel_error(b, a) < 1e-3


def test_network_skips():
    torch.manual_seed(0)
    model = Terminator(1, (12, 1, 1), 2, 9, groups=12)
    assert model.skips == {0: (), 1: (), 2: (0,)} and [b.earlier for b in model.blocks] == [0, 0, 1]
    assert model.blocks[0].dropout.p == 0 and model.blocks[1].dropout.p == 0.05
    assert len(model.blocks[0].global_kernel.mixing) == 3 and len(model.blocks[1].global_kernel.mixing) == 2
    assert Terminator(1, (12, 1, 1), 2, 9, skips={}).blocks[2].earlier == 0
    with pytest.raises(ValueError, match="skips"):
        Terminator(1, (12, 2, 1), 2, 9, skips={1: (1,)})


def test_network_is_a_good_module():
    model, x = small(), torch.randn(2, 2, 10, 10)
    again, other = copy.deepcopy(model), small()
    other.load_state_dict(pickle.loads(pickle.dumps(model)).state_dict())
    torch.manual_seed(1)
    want = model(x)
    for m in (again, other):
        torch.manual_seed(1)
        assert torch.equal(m(x), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert rel_error(model.eval()(x), again.eval()(x)) < 0.1 and "omega_0" in repr(model)


def test_modules_refuse():
    check_raises(
        SFNEBlock,
        [
            (dict(hci="x"), ValueError, "hci"),
            (dict(context="none"), ValueError, "context"),
            (dict(factor=3), ValueError, "groups"),
            (dict(use_global=1), TypeError, "use_global"),
            (dict(dropout=2.0), ValueError, "dropout"),
            (dict(size=0), ValueError, "size"),
            (dict(omega_0=-1.0), ValueError, "omega_0"),
        ],
        channels=3,
        factor=4,
        size=9,
    )
    check_raises(
        SlowNet, [(dict(sizes=(2, 2, 2)), ValueError, "sizes"), (dict(hidden=0), ValueError, "hidden")], sizes=(2, 2)
    )
    block = SFNEBlock(3, 4, 9)
    for bad, words in ((torch.zeros(1, 2, 9, 9), "x must"), (torch.zeros(1, 3, 9, 8), "x must")):
        with pytest.raises(ValueError, match=words):
            block(bad)
    with pytest.raises(ValueError, match="earlier"):
        block(torch.zeros(1, 3, 9, 9), torch.zeros(1, 3, 9, 9))


def test_slow_loss():
    a, b = torch.full((1, 2, 3, 3), 2.0, requires_grad=True), torch.full((1, 6, 3, 3), 5.0, requires_grad=True)
    loss = slow_neural_loss([a, b])
    loss.backward()
    assert loss.item() == 9 and (a.grad < 0).all() and (b.grad > 0).all()
    r = torch.randn(1, 2, 3, 3)
    assert slow_neural_loss([r, r.repeat(1, 3, 1, 1), r.repeat(1, 6, 1, 1)]) == 0 == slow_neural_loss([r])
    assert slow_neural_loss([r, r.repeat_interleave(3, 1)]) > 0, "tiled, not repeated channel by channel"
    assert slow_neural_loss([a, a + 1, a + 3]).item() == 1 + 9 + 4, "all pairs"
    with pytest.raises(ValueError, match="channels"):
        slow_neural_loss([r, r[:, :1]])


def test_loss_terms():
    model, x, y = small(dropout=0.0), torch.randn(3, 2, 10, 10), torch.tensor([0, 1, 2])
    logits, kernels = model(x, return_kernels=True)
    ce = F.cross_entropy(logits, y, label_smoothing=0.09)
    fast = sum(p.norm() for n, p in model.named_parameters() if not is_slow(n))
    weights = sum(p.norm() for n, p in model.named_parameters() if is_slow(n) and p.dim() == 2 and "weight" in n)
    want = ce + slow_neural_loss(kernels) + 5e-5 * (fast + 1e-6 * weights)
    assert float(terminator_loss(model, x, y).detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    assert float(terminator_loss(model, x, y, slow=0, penalty=0).detach()) == pytest.approx(
        float(ce.detach()), rel=1e-6
    )


@pytest.mark.parametrize("make, first, later", [(Kar3, 1, 3), (Kar2, 1, 2)], ids=["Kar3", "Kar2"])
def test_kar_steps(make, first, later):
    "First by eta wherever there is a gradient; then, with a constant gradient, by three (two) eta."
    p = nn.Parameter(torch.zeros(4))
    g, opt = torch.tensor([1e-9, -5.0, 3.0, 0.0]), make([p], lr=0.1)
    for steps in (first, first + later, first + 2 * later):
        p.grad = g.clone()
        opt.step()
        torch.testing.assert_close(p.detach(), -0.1 * steps * g.sign())


def test_kar3_follows_its_formula():
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.randn(3, 2)), None
    opt, q, m = Kar3([p], lr=0.01, betas=(0.75, 0.99)), p.detach().clone(), [torch.zeros(3, 2)] * 2
    for _ in range(5):
        p.grad = torch.randn(3, 2)
        q = q - 0.01 * (p.grad.sign() + m[0].sign() + m[1].sign())
        m = [b * x + (1 - b) * p.grad for b, x in zip((0.75, 0.99), m)]
        opt.step()
        torch.testing.assert_close(p.detach(), q)
    again = Kar3([nn.Parameter(p.detach().clone())], lr=0.01, betas=(0.75, 0.99))
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    p.grad = again.param_groups[0]["params"][0].grad = torch.ones(3, 2)
    opt.step(), again.step()
    assert torch.equal(p, again.param_groups[0]["params"][0])
    assert opt.step(lambda: torch.tensor(7.0)) == 7


def test_kar_refuses():
    p = [nn.Parameter(torch.zeros(1))]
    check_raises(
        Kar3,
        [
            (dict(lr=-1.0), ValueError, "lr"),
            (dict(betas=(0.5,)), ValueError, "betas"),
            (dict(betas=(0.5, 1.0)), ValueError, "betas"),
        ],
        params=p,
    )
    check_raises(Kar2, [(dict(betas=(0.5, 0.9)), ValueError, "betas")], params=p)


def test_long_convolution():
    "The Fourier way against a convolution with the kernel as it is written."
    torch.manual_seed(0)
    net, x = LongConvNet(2, 5, depth=1), torch.randn(2, 3, 5, 5)
    b, y = net.blocks[0], net.stem(x)
    b["kernel"].last.bias.data.normal_()
    with torch.no_grad():
        want = F.conv2d(b["norm"](y), b["kernel"]()[0][:, None].flip(2, 3), padding=4, groups=2)
        want = net.head((y + b["mix"](F.gelu(b["scale"](want)))).mean((2, 3)))
        assert rel_error(net(x), want) < 1e-4


def test_digit_data():
    "Training, choosing and testing share no image; permuted, all images have their pixels in the same other order."
    straight, permuted = (digit_data(10, train=40, val=20, test=20, permuted=p) for p in (False, True))
    a, b = ([d.x, d.val_x, d.test_x] for d in (straight, permuted))
    assert [len(t) for t in a] == [40, 20, 20] and straight.name in ("mnist_m", "mnist5k")
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert torch.cdist(a[i].flatten(1), a[j].flatten(1)).min() > 1e-3
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    for t, u in zip(a, b):
        assert torch.equal(u.flatten(2), t.flatten(2)[..., order])
    assert torch.equal(straight.y, permuted.y) and float(straight.x.mean().abs()) < 0.3


def test_networks_of_one_size():
    for make in (SmallResNet, lambda w: LongConvNet(w, 9)):
        nearest = count_parameters(widest(make, 40_000))
        others = [abs(count_parameters(make(w)) - 40_000) for w in (1, 5, 8, 9, 10, 60, 75, 80, 90)]
        assert abs(nearest / 40_000 - 1) < 0.15 and abs(nearest - 40_000) <= min(others)
    assert SmallResNet(4)(torch.zeros(2, 3, 9, 9)).shape == (2, 10)


def test_training_learns():
    "Two linearly separable classes, every optimizer; the same seed gives the same curve, whatever trains beside it."
    torch.manual_seed(0)
    y = torch.arange(64) % 2
    x = torch.randn(64, 3, 4, 4) + 3 * (2 * y - 1)[:, None, None, None]
    data = Data(*(t.to(device_under_test()) for t in (x, y, x[:32], 1 - y[:32], x[32:], y[32:])))

    def job(name):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).to(data.x.device)
        return Job(net, data, smoothed_cross_entropy, name, 10.0)

    rows = train_networks([job(name) for name in OPTIMIZERS], epochs=3, batch=16, seed=0)
    for name, row in zip(OPTIMIZERS, rows):
        (alone,) = train_networks([job(name)], epochs=3, batch=16, seed=0)
        assert row["curve"] == alone["curve"] and len(row["curve"]) == 3 and row["curve"][-1] == row["val"]
        assert (row["test"], row["train"], row["val"]) == (1, 1, 0), "validation labels are wrong on purpose"
        assert (row["parameters"], row["optimizer"], row["epochs"]) == (98, name, 3) and row["loss"] < 0.6


def test_sign_sgd():
    p = nn.Parameter(torch.zeros(2))
    opt = SignSGD([p], lr=0.5)
    for _ in range(2):
        p.grad = torch.tensor([3.0, -1e-8])
        opt.step()
    assert p.tolist() == [-1.0, 1.0]


def test_predictions():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).train()
    x = torch.randn(5, 1, 2, 2)
    assert torch.equal(predictions(net, x, 2), net(x).argmax(-1)) and net.training


def test_epochs_to():
    assert epochs_to([0.1, 0.5, 0.4, 0.9], 0.5) == 2 and epochs_to([0.1], 0.5) is None and epochs_to([0.5], 0.5) == 1


def test_search_takes_the_best_rate():
    e, asked = Experiments("gpu"), []

    def trained(run, specs, rates, epochs):
        asked.append((run, epochs, [s.net for s in specs]))
        return [(None, dict(val=(r == 1.2) == (s.net == "CCNN"))) for s, r in zip(specs, rates)]

    e._train = trained
    for _ in range(2):
        e.search([("ResNet", "AdamW"), ("CCNN", "AdamW")])
    assert e.rates == {("ResNet", "AdamW"): 0.4, ("CCNN", "AdamW"): 1.2}
    nets = ["ResNet", "ResNet", "CCNN", "CCNN"]
    assert asked == [(1000, e.settings["search_epochs"], nets)], "a seed of its own, a short schedule, once"
    (smoke := Experiments("smoke"))._train = trained
    smoke.search([("ResNet", "AdamW")])
    assert smoke.rates == {("ResNet", "AdamW"): 1.0} and len(asked) == 1, "nothing to search"


@pytest.mark.parametrize("memory_gb, sizes", [(None, [5]), (12.0, [4, 1]), (0.1, [1] * 5)])
def test_memory_lent_is_kept_to(monkeypatch, memory_gb, sizes):
    "So many train at a time as the memory lent holds, one in any case; nobody is left out, and the order stays."
    e, seen = Experiments("smoke", memory_gb=memory_gb), []
    specs = [Spec("ResNet", "AdamW", size=8 + k) for k in range(5)]
    monkeypatch.setattr(
        e, "_job", lambda run, s, rate: Job(s, Data(*[torch.zeros(1, 3, s.size, s.size)] * 6), rate, s.optimizer)
    )
    train = lambda jobs, **options: seen.append(len(jobs)) or [dict(rate=j.loss_fn) for j in jobs]
    monkeypatch.setitem(Experiments._train.__globals__, "train_networks", train)
    found = e._train(3, specs, list(range(5)), 1)
    assert seen == sizes and [m for m, _ in found] == specs
    assert [(r["rate"], r["size"], r["run"]) for _, r in found] == [(k, 8 + k, 3) for k in range(5)]


def test_trained_once():
    "What two experiments need is trained once, with the rate that was found; rows come in the order asked for."
    e, asked = Experiments("smoke"), []
    e.search = lambda pairs: e.rates.update(dict.fromkeys(pairs, 2.0))
    e._train = lambda run, specs, rates, epochs: asked.append((run, specs, rates)) or [(s, {}) for s in specs]
    a, b = OURS["official"], OURS["no skips"]
    assert [m for m, _ in e.train(4, [a])] == [a] and [m for m, _ in e.train(4, [b, a])] == [b, a]
    assert asked == [(4, [a], [2.0]), (4, [b], [2.0])]


class ByBatch(nn.Module):
    "Logits of class 1 where the batch's mean, or the image's, is above 0."

    def __init__(self, together):
        super().__init__()
        self.together = together

    def forward(self, x):
        mean = x.mean().expand(len(x)) if self.together else x.mean((1, 2, 3))
        return F.one_hot((mean > 0).long(), 2).float()


def test_leakage_counts():
    y = torch.tensor([0, 1] * 4 + [1] * 8)
    x = (2 * y - 1)[:, None, None, None].float().expand(-1, 3, 2, 2)

    class Fake:
        settings, seeds = dict(size=2, leak=8, leak_sizes=(1, 8, 16)), [0]
        data = staticmethod(lambda size: Data(x, y, x, y, x, y))
        train = staticmethod(lambda run, specs: [(ByBatch(s.variant == "official"), {}) for s in specs])
        write = staticmethod(lambda name, key, rows: rows)

    found = {(r["variant"], r["batch"]): (r["accuracy"], r["changed"]) for r in leakage(Fake)}
    assert [found["official", b] for b in ("1 at a time", "8 at a time", "16 at a time", "one class at a time")] == [
        (1.0, 0.5),
        (0.5, 1.0),
        (0.5, 0.0),
        (1.0, 0.5),
    ]
    assert all(found["kernels per image", b] == (1.0, 0.0) for _, b in found)


def test_receptive_fields():
    "A convolution of 3 x 3 sees nine pixels; the product its cross; standardized, all."
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    assert (receptive_field(conv, torch.randn(1, 2, 7, 7, dtype=torch.float64)) > 0).sum() == 9
    fields = context_fields(10)
    assert (
        (fields["product"] > 0).sum() == 19
        and (fields["product, standardized"] > 0).all()
        and (fields["block"] > 0).all()
    )
    assert set(fields) == {"product", "product, standardized", "block", "network"}


class Untrained(Experiments):
    "Experiments whose trained network is a new one of another seed; rows are not recorded."

    def train(self, run, specs):
        torch.manual_seed(7)
        return [(self.network("Terminator", self.settings["size"], context="sample"), {})]

    def write(self, name, key, rows):
        return list(rows)

    def data(self, size):
        g = torch.Generator().manual_seed(0)
        return Data(*[torch.randn(8, 3, size, size, generator=g)] * 6)


def test_networks_of_the_frequencies():
    "Every frequency straight, the least and the largest permuted too, and the other network both ways; all at half the size."
    e = Untrained("smoke")
    found, omegas = frequency_specs(e), e.settings["omegas"]
    ours = [(s.omega_0, s.permuted) for s in found if s.net == "Terminator"]
    assert ours == [(o, False) for o in omegas] + [(min(omegas), True), (max(omegas), True)]
    assert [s.permuted for s in found if s.net == "ResNet"] == [False, True]
    assert {s.size for s in found} == {max(10, e.settings["size"] // 2)}


def test_spectra_and_fields():
    "Before: the network as its seed makes it; after: the trained one. Fields of the trained one, the product's a cross."
    e = Untrained("smoke", seed=3)
    (row,) = spectra(e)
    torch.manual_seed(3)
    of = lambda net: radial_spectrum(net.blocks[0].global_kernel()).tolist()
    assert row["before"] == of(e.network("Terminator", 10)) and row["after"] == of(e.train(3, [])[0][0])
    assert row["mean_after"] == mean_frequency(row["after"]) != row["mean_before"]
    assert mean_frequency([0, 0, 1]) == 2 and mean_frequency([1, 0, 0, 1]) == 1.5
    found = {r["part"]: np.array(r["logs"]).reshape(10, 10) for r in fields(e)}
    assert (found["product"] > -6).sum() == 19 and (found["block"] > -6).all() and found["network"].max() == 0
    assert [r["strong"] for r in fields(e)][0] == (found["product"] > -2).mean()
    untrained = context_fields(10)
    for r in context(e):
        f = untrained[r["part"]]
        assert r["strong"] == (f > f.max() / 100).double().mean() <= r["seen"] and r["share"] == 0.19


def test_peers_compute_the_same():
    x, K, *v = maps((2, 3, 8, 8), (1, 3, 8, 8), *[(2, 3, 8, 8)] * 3)
    for peer in (products_peer, formula_peer):
        for a, b in zip(peer(x, K, *v), _ours(x, K, *v)):
            assert rel_error(a, b) < 1e-5


def test_join_hands_out_gradients():
    a, b = (t.requires_grad_() for t in maps((2, 1, 2, 2), (2, 1, 2, 2)))
    ready = maps((2, 1, 2, 2), (2, 1, 2, 2), seed=5)
    out = Join.apply(ready, a * 2, b * 3)
    got = torch.autograd.grad(out, [a, b], torch.ones_like(out))
    assert (
        out.item() == a[0, 0, 0, 0].item() * 2
        and torch.equal(got[0], 2 * ready[0])
        and torch.equal(got[1], 3 * ready[1])
    )


IN = lambda mean: Interval(mean, 0.5, 3)
VERDICTS_OF = {  # claim -> made-up measurements that hold, hold in part, do not hold (None: the rule cannot say so)
    "The CIFAR network": (PUBLISHED_PARTS, PUBLISHED_PARTS | dict(head=1), dict.fromkeys(PUBLISHED_PARTS, 1)),
    "Slow networks": (0.08, 0.11, 0.165),
    "Full context": [dict(product=p, block=b) for p, b in ((1, 1), (0.1, 1), (0.1, 0.5))],
    "Without residual": (0, 4, None),
    "Linear time": (1.0, 1.25, 1.5),
    "Linear space": (1.0, 1.25, 2.0),
    "Hyper-channel": [{"left out": x} for x in (0.02, 0.002, 1e-6)],
    "Gating after": (IN(1), None, IN(-1)),
    "The slow neural": (IN(1), None, IN(-1)),
    "Concatenated": (IN(1), None, IN(-1)),
    "The global products": (IN(1), None, IN(-1)),
    "The local products help": (IN(1), None, IN(-1)),
    "Fast convergence": (0.5, 0.8, 2.0),
    "More accurate": (IN(1), None, IN(-1)),
    "Kar3 trains": (IN(1), None, IN(-1)),
    "The averages": (IN(1), None, IN(-1)),
    "A prediction": (0.0, 0.4, 3.0),
    "With kernels": (0.0, 0.4, 3.0),
    "Kernels per image": (IN(1), None, IN(-1)),
    "Features of": (0.01, 0.1, 0.5),
    "Also what": (0.01, 0.1, 0.5),
    "Hyper-kernels carry": [dict(below=b, above=a) for b, a in ((0.9, 0.2), (0.7, 0.2), (0.2, 0.7))],
    "The fused": [dict(a=x, b=9.0) for x in (1.5, 1.2, 0.9)],
    "The same, forward": [dict(a=x, b=9.0) for x in (1.5, 1.2, 0.9)],
    "and need": [dict(a=x, b=9.0) for x in (1.3, 1.2, 0.9)],
    "The local products are": [dict(a=x, b=9.0) for x in (2.0, 1.2, 0.9)],
    "`auto` leaves": [
        {f"k = {k}": x for k, x in zip((3, 5, 7, 9), ratios)}
        for ratios in ((0.5, 0.9, 1.1, 9), (0.5, 1.1, 1.1, 9), (2, 2, 2, 9))
    ],
    "A block": [dict(a=x, b=9.0) for x in (1.2, 1.1, 0.9)],
    "A training step": [dict(a=x, b=9.0) for x in (1.2, 1.1, 0.9)],
}


@pytest.mark.parametrize("claim", VERDICTS_OF)
def test_rules(claim):
    (rule,) = (c.rule for c in claims() if c.statement.startswith(claim))
    for measured, verdict in zip(VERDICTS_OF[claim], ("holds", "holds in part", "does not hold here")):
        found = measured if measured is None else rule(measured)
        assert measured is None or verdict == (found if isinstance(found, str) else found[0])


def test_undecided_differences():
    (rule,) = (c.rule for c in claims() if c.statement.startswith("Kar3 trains"))
    assert rule(IN(0.2))[0] == "not measured"


def test_every_claim_has_a_test():
    judged = [c for c in claims() if c.statement[:5] != "State"]
    assert all(sum(c.statement.startswith(k) for k in VERDICTS_OF) == 1 for c in judged) and len(judged) == len(
        VERDICTS_OF
    )


def _recorded(monkeypatch, **tables):
    "Makes the study read these rows (benchmark -> rows) as if they were recorded."

    def read(chapter, name=None, **where):
        rows = [dict(device="G", date="2026-01-01", versions={}, preset="gpu") | r for r in tables.get(name, [])]
        return [r for r in rows if all(r.get(k) == v for k, v in where.items())]

    monkeypatch.setitem(_rows.__globals__, "load_results", read)


def test_accuracies_are_looked_up(monkeypatch):
    row = lambda variant, run, test, epochs=9: dict(variant=variant, run=run, test=test, epochs=epochs)
    rows = [row("official", i, 0.9 + 0.01 * i) for i in range(3)] + [
        row("no skips", i, 0.8 + 0.01 * i) for i in range(3)
    ]
    _recorded(monkeypatch, ablations=[*rows, row("official", 0, 0.1, 2), row("gate after", 0, 0.5)])
    assert _gap("official", "no skips").mean == pytest.approx(10) and _gap(
        "no skips", "official"
    ).mean == pytest.approx(-10)
    assert _gap("official", "gate after") is None and _gap("x", "official") is None


def test_contests_are_looked_up(monkeypatch):
    def row(net, optimizer, run, curve, test):
        return dict(net=net, optimizer=optimizer, run=run, curve=curve, val=curve[-1], test=test, epochs=4)

    rows = [
        r
        for run in range(3)
        for r in (
            row("Terminator", "Kar3", run, [0.1, 0.6, 0.7, 0.8], 0.8),
            row("Terminator", "AdamW", run, [0.1, 0.2, 0.3, 0.9], 0.5),
            row("ResNet", "AdamW", run, [0.1, 0.2, 0.3, 0.55], 0.6),
            row("ResNet", "Kar3", run, [0.1, 0.1, 0.1, 0.2], 0.9),
        )
    ]
    _recorded(monkeypatch, convergence=rows)
    assert _best_rival(("ResNet", "AdamW"), ("ResNet", "Kar3")) == ("ResNet", "AdamW")
    assert _epochs_needed() == 0.5 and _final_gap().mean == pytest.approx(-10), "by validation, not by test accuracy"
    assert _contest(("Terminator", "Kar3"), ("Terminator", "AdamW")).mean == pytest.approx(30)
    _recorded(monkeypatch, convergence=[r | dict(curve=[0.1] * 4) if r["net"] == "Terminator" else r for r in rows])
    assert _epochs_needed() == 2


def test_other_rows_are_looked_up(monkeypatch):
    leak = [
        dict(variant="official", run=0, batch=b, changed=c)
        for b, c in (("1 at a time", 0.1), ("64 at a time", 0.0), ("one class at a time", 0.3))
    ]
    freq = [
        dict(net="Terminator", permuted=False, size=16, omega_0=o, test=0.8, test_high=h)
        for o, h in ((0.5, 0.8), (1.0, 0.4), (3.0, 0.0), (100.0, 0.2))
    ]
    freq += [
        dict(net="Terminator", permuted=True, size=16, omega_0=0.5, test=0.8),
        dict(net="ResNet", permuted=False, omega_0=None, test=1),
    ]
    speed = [
        dict(method="ours", side=s, B=b, ms_fwd=t, peak_mb_bwd=t)
        for s, b, t in ((32, 64, 1.0), (64, 16, 1.0), (28, 64, 9.0))
    ]
    _recorded(
        monkeypatch,
        leakage=leak,
        frequencies=freq,
        features=[dict(before=0.1, after=0.3), dict(before=0.2, after=0.1)],
        **{"global": speed + [dict(method="eager", side=32, ms_fwd=3.0)]},
    )
    assert _changed("official") == pytest.approx(20) and _changed("other") is None
    assert _resampled() == pytest.approx(dict(below=0.75, above=0.25)) and (
        _largest_mean("before"),
        _largest_mean("after"),
    ) == (0.2, 0.3)
    assert _exponent("ms_fwd").slope == pytest.approx(1) and [s.ratio for s in _speed("global", "ms_fwd", "side")] == [
        3.0
    ]


def test_crossover_is_looked_up(monkeypatch):
    def row(k, method, fwd, bwd=1.0, layout="last"):
        return dict(k=k, method=method, layout=layout, ms_fwd=fwd, ms_bwd=bwd)

    rows = [row(k, "convolution", k) for k in (3, 5, 7, 9)] + [row(k, "kernel", 6) for k in (3, 5, 7)]
    _recorded(monkeypatch, local=rows)
    assert _crossover() is None
    _recorded(monkeypatch, local=[*rows, row(9, "kernel", 6, 5.0), row(9, "kernel", 0, 0, "first")])
    assert _crossover() == {"k = 3": 4 / 7, "k = 5": 6 / 7, "k = 7": 8 / 7, "k = 9": 10 / 11}


def test_what_needs_no_rows():
    gate = _gate_effect()
    assert gate["left out"] < 1e-4 and gate["after"] > 1e-2 and _slow_share() == pytest.approx(0.1652, abs=1e-4)
    assert _seen() == pytest.approx(dict(product=31 / 256, block=1))


def test_nothing_recorded_is_not_measured(monkeypatch):
    _recorded(monkeypatch)
    verdicts = [c.judge().verdict for c in claims()]
    known = ["holds", "does not hold here", "holds in part", "holds in part"]
    assert verdicts[:4] == known and verdicts[6] == "does not hold here" and verdicts[-1] == "out of reach here"
    assert verdicts[4:6] + verdicts[7:-1] == ["not measured"] * (len(verdicts) - 6)

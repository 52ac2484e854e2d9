# Written from the test cells of nbs/6_beyond_tokens/autoint.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from attnbook.autoint.experiments_study import best_rows, flag_codes, lead, mutual_information, pair_information
from attnbook.autoint.nets import (
    AutoInt,
    FieldEmbedding,
    InteractingLayer,
    autoint_infer,
    field_interaction_heatmap,
    logloss_auc,
    pack_for_inference,
)
from attnbook.autoint.op import interacting_attention, interacting_layer, interacting_op
from attnbook.autoint.reference import interacting_reference
from attnbook.autoint.study import (
    TRAINING,
    _faster,
    _judge_baselines,
    _judge_explanations,
    _judge_gains,
    _judge_orders,
    claims,
    plain_layer_eager,
    sdpa_layer,
)
from attnbook.lab.claims import Claim
from attnbook.lab.stats import Interval
from attnbook.lab.testing import (
    check_against_reference,
    check_autocast,
    check_opcheck,
    check_operation,
    check_raises,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test

LAYERS = {  # B, M, d_in, heads, head width, residual, bias
    "packed": (5, 7, 16, 2, 8, True, False),
    "three per tile": (4, 39, 8, 1, 16, True, False),
    "one field": (3, 1, 5, 2, 4, True, False),
    "no residual": (3, 13, 16, 2, 16, False, False),
    "official": (4, 11, 12, 2, 8, True, True),
    "official, no residual": (2, 9, 16, 3, 4, False, True),
    "one per tile": (2, 65, 16, 1, 16, True, False),
    "a pass per head": (5, 7, 40, 2, 32, True, False),
    "two passes, official": (2, 35, 16, 6, 32, True, True),
    "weights not kept": (2, 33, 70, 2, 32, False, False),
}


def draw_layer(B, M, D, H, dh, residual, bias, dtype=torch.float32, seed=0):
    "Seeded input, weights and biases on the device under test."
    g = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    n = 3 + residual
    return [make(B, M, D), make(n, D, H * dh) / D**0.5, *([make(n, H * dh) / 2] if bias else [])]


def triton_layer(H, **kw):
    return lambda *t: interacting_layer(*t, num_heads=H, backend="triton", **kw)


def plain_layer(H, **kw):
    return lambda *t: interacting_reference(*t, num_heads=H, **kw)


@pytest.mark.parametrize("case", LAYERS)
def test_kernel_agrees_with_the_reference(case):
    sizes = LAYERS[case]
    tol = 2e-3 if device_under_test() == "cuda" else 2e-6
    with_floor = dict(floor=1e-3, tol=tol)
    check_against_reference(
        triton_layer(sizes[3], scale=0.8), plain_layer(sizes[3], scale=0.8), draw_layer(*sizes), **with_floor
    )


@pytest.mark.parametrize("case", ("packed", "a pass per head", "two passes, official"))
def test_kernel_in_half_precision(case):
    on_gpu = device_under_test() == "cuda"  # the interpreter cannot multiply bfloat16 matrices
    dtype, tol = (torch.bfloat16, 1.5e-2) if on_gpu else (torch.float16, 2e-3)
    heads, scale = LAYERS[case][3], LAYERS[case][4] ** -0.5
    check_against_reference(
        triton_layer(heads, scale=scale),
        plain_layer(heads, scale=scale),
        draw_layer(*LAYERS[case], dtype=dtype),
        tol=tol,
        grad_tol=2 * tol,
    )


def test_layer_passes_every_common_check():
    check_operation(triton_layer(2), plain_layer(2), draw_layer(*LAYERS["packed"]), skip=("reference", "autocast"))
    check_operation(
        triton_layer(2), plain_layer(2), draw_layer(*LAYERS["official"]), skip=("reference", "strides", "autocast")
    )
    if device_under_test() == "cuda":
        check_autocast(triton_layer(2, scale=0.5), draw_layer(*LAYERS["packed"]), tol=3e-2)


def test_op_is_registered_properly():
    e, w, b = (t.requires_grad_() for t in draw_layer(3, 5, 8, 2, 4, True, True))
    check_opcheck(interacting_op, (e, w, None, 2, 1.0))
    check_opcheck(interacting_op, (e, w, b, 2, 1.0))


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("B", (1, 4, 7))
def test_samples_are_isolated(backend, B):
    e, w = draw_layer(B, 21, 8, 2, 8, True, False)
    before = interacting_layer(e, w, num_heads=2, backend=backend)
    for i in {0, B - 1}:
        changed = e.clone()
        changed[i] = 3 * changed[i] + 1
        after = interacting_layer(changed, w, num_heads=2, backend=backend)
        others = torch.arange(B) != i
        assert torch.equal(after[others], before[others]) and not torch.equal(after[i], before[i])


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_special_cases(backend):
    run = partial(interacting_layer, num_heads=2, backend=backend)
    near = partial(torch.testing.assert_close, rtol=2e-3, atol=2e-3)
    e, w = draw_layer(3, 7, 8, 2, 8, True, False)
    near(run(e[:, :1], w), torch.relu(e[:, :1] @ (w[2] + w[3])))  # one field
    for i in (0, 1):  # no query or no key: a mean
        cut = w.clone()
        cut[i] = 0
        near(run(e, cut), torch.relu((e @ w[2]).mean(1, keepdim=True) + e @ w[3]))
    assert not run(0 * e, w).any()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    near(run(e[:, order], w), run(e, w)[:, order])
    near(run(e, w, scale=0.3), run(e, torch.cat([0.3 * w[:1], w[1:]])))
    near(run(e, torch.cat([w[:3], 0 * w[3:]])), run(e, w[:3]))  # no residual: W_Res = 0
    heads = [interacting_layer(e, w[..., i : i + 8].contiguous(), num_heads=1, backend=backend) for i in (0, 8)]
    near(run(e, w), torch.cat(heads, -1))  # heads are blocks of channels
    assert rel_error(interacting_layer(e, w, num_heads=1, backend=backend), run(e, w)) > 0.01


def test_weights_reproduce_the_output():
    e, w = draw_layer(3, 7, 8, 2, 8, True, False)
    out, alpha = interacting_attention(e, *w, num_heads=2, return_weights=True)
    v = (e @ w[2]).unflatten(-1, (2, 8))
    again = torch.relu(torch.einsum("bhmk,bkhc->bmhc", alpha, v).flatten(-2) + e @ w[3])
    torch.testing.assert_close(out, again, rtol=2e-3, atol=2e-3)


def test_gradient_is_zero_where_the_relu_is_off():
    e, w = (t.requires_grad_() for t in draw_layer(2, 5, 8, 2, 8, True, False))
    out = interacting_layer(e, w, num_heads=2, backend="triton")
    off = (out == 0).float()
    assert off.any() and not any(g.any() for g in torch.autograd.grad(out, (e, w), off))


def test_gradcheck_in_float64():
    inputs = [t.double().cpu().requires_grad_() for t in draw_layer(2, 3, 4, 2, 3, True, True)]
    assert torch.autograd.gradcheck(plain_layer(2), inputs)


def test_bad_input_is_refused():
    e, w = draw_layer(2, 3, 4, 2, 3, True, False)
    check_raises(
        interacting_layer,
        [
            (dict(num_heads=4), ValueError, ["num_heads", "4"]),
            (dict(num_heads=0), ValueError, "num_heads"),
            (dict(e=e[0]), ValueError, ["e must have 3", str(tuple(e[0].shape))]),
            (dict(e=e.long()), TypeError, ["e ", "int64"]),
            (dict(e=e[..., :3]), ValueError, ["weight", "d_in 3"]),
            (dict(weight=w.double()), TypeError, ["weight", "float64"]),
            (dict(bias=w[:, 0, :2]), ValueError, "bias"),
            (dict(scale=math.inf), ValueError, "scale"),
            (dict(scale="1"), TypeError, "scale"),
            (dict(num_heads=2.0), TypeError, "num_heads"),
            (dict(backend="cuda"), ValueError, "backend"),
            (dict(e=e.repeat(1, 50, 1), backend="triton"), ValueError, "128 fields"),
        ],
        e=e,
        weight=w,
        num_heads=2,
    )
    check_raises(
        interacting_attention,
        [(dict(wk=w[1, :, :2]), ValueError, ["wk", "shape"])],
        e=e,
        wq=w[0],
        wk=w[1],
        wv=w[2],
        num_heads=2,
    )


def deepctr_torch_layer(x, w_q, w_k, w_v, w_res, head_num=2, scaling=False):
    "The formula of DeepCTR-Torch's InteractingLayer: x (B, F, D), weights (D, D)."
    q, k, v = (torch.tensordot(x, w, dims=([-1], [0])) for w in (w_q, w_k, w_v))
    q, k, v = (torch.stack(torch.split(t, x.shape[-1] // head_num, dim=2)) for t in (q, k, v))
    product = torch.einsum("bnik,bnjk->bnij", q, k)
    if scaling:
        product = product / (x.shape[-1] // head_num) ** 0.5
    result = torch.matmul(F.softmax(product, dim=-1), v)
    result = torch.cat(torch.split(result, 1), dim=-1).squeeze(0)
    return F.relu(result + torch.tensordot(x, w_res, dims=([-1], [0])))


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_parity_with_deepctr_torch(backend):
    e, w = draw_layer(4, 6, 16, 2, 8, True, False)
    for scaling in (False, True):
        ours = interacting_attention(e, *w, num_heads=2, scale=8**-0.5 if scaling else 1.0, backend=backend)
        torch.testing.assert_close(ours, deepctr_torch_layer(e, *w, scaling=scaling), rtol=2e-3, atol=2e-3)


def test_fields():
    fields = FieldEmbedding([4], multi_valued=[3], numerical=1, dim=5)
    at = lambda c, m, x: fields(*fields.pack(torch.tensor([[c]]), [torch.tensor([m])], torch.tensor([[x]])))[0]
    e = at(1, [0, 2], 2.0)
    torch.testing.assert_close(e[0], fields.table[1])
    torch.testing.assert_close(e[1], (fields.table[4] + fields.table[6]) / 2)  # the mean of the active rows
    torch.testing.assert_close(e[2], 2 * fields.table[7])  # linear in the number
    torch.testing.assert_close(at(1, [2, 0], 2.0), e)  # order and padding: no matter
    torch.testing.assert_close(at(1, [-1, 2, 0, -1], 2.0), e)
    empty = at(-1, [-1], 0.0)
    empty.sum().backward()
    assert not empty.any() and fields.table.grad.isfinite().all()


def test_fields_refuse_bad_codes():
    fields = FieldEmbedding([4], numerical=1)
    x = torch.zeros(2, 1)
    check_raises(
        fields.pack,
        [
            (dict(categorical=torch.tensor([[4], [0]])), ValueError, ["field 0", "3"]),
            (dict(categorical=x), TypeError, ["field 0", "integers"]),
            (dict(numerical=None), ValueError, "numerical 1"),
        ],
        categorical=x.long(),
        numerical=x,
    )
    check_raises(
        FieldEmbedding,
        [
            (dict(categorical=[0]), ValueError, "categorical[0]"),
            (dict(dim=0), ValueError, "dim"),
            (dict(categorical=[]), ValueError, "at least one field"),
            (dict(categorical=[2.0]), TypeError, "categorical[0]"),
        ],
        categorical=[3],
    )


def network_size(M, **kw):
    "Parameters of AutoInt with M fields, without the embedding table."
    model = AutoInt(FieldEmbedding([2] * M), **kw)
    return sum(p.numel() for p in model.parameters()) - model.fields.table.numel()


def test_parameter_counts():
    assert [network_size(M) for M in (39, 23, 7)] == [39_361, 38_337, 37_313]
    assert network_size(7, use_residual=False) == 28_097
    assert [network_size(M, variant="official") for M in (39, 7)] == [40_513, 38_465]
    assert network_size(39, dnn=(400, 400)) - network_size(39) == 410_801
    layers = lambda **kw: network_size(7, **kw) - (7 * 64 + 1)
    assert (layers(), layers(use_residual=False), layers(variant="official")) == (36_864, 27_648, 38_016)


def small_model(**kw):
    "A seeded model of 6 fields of all kinds with weights large enough to see, and a packed batch of 5 samples."
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    fields = FieldEmbedding([3, 5, 4], multi_valued=[6], numerical=2, dim=8)
    model = AutoInt(fields, head_dim=8, **kw)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (1 if p is fields.table else 0.3))
    draw = lambda n, *s: torch.randint(-1, n, s, generator=g)
    codes, numbers = torch.cat([draw(n, 5, 1) for n in (3, 5, 4)], 1), torch.randn(5, 2, generator=g)
    batch = fields.pack(codes, [draw(6, 5, 3)], numbers)
    return model.to(device_under_test()).eval(), tuple(t.to(device_under_test()) for t in batch)


def test_fields_survive_the_meta_device():
    make = lambda: AutoInt(FieldEmbedding([3, 4], [5], 2, dim=8), layers=1, head_dim=4)
    model = make()
    with torch.device("meta"):
        empty = make()
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    batch = model.fields.pack(torch.tensor([[2, 3]]), [torch.tensor([[4, 0]])], torch.tensor([[0.5, -1]]))
    again = empty.fields.pack(torch.tensor([[2, 3]]), [torch.tensor([[4, 0]])], torch.tensor([[0.5, -1]]))
    assert all(map(torch.equal, batch, again)) and torch.equal(empty.logits(again), model.logits(batch))


def test_the_dnn_adds_its_logit():
    model, batch = small_model(layers=2, dnn=(7,))
    plus, e = model.logits(batch), model.fields(*batch)
    dnn, model.dnn = model.dnn, None
    torch.testing.assert_close(plus - dnn(e.flatten(1)).squeeze(-1), model.logits(batch))


@pytest.mark.parametrize("variant", ("paper", "official"))
def test_backends_agree_on_the_network(variant):
    grads = []
    for backend in ("torch", "triton"):
        model, batch = small_model(layers=2, variant=variant, backend=backend)
        out = model.logits(batch)
        grads.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    tol = 2e-2 if device_under_test() == "cuda" else 1e-4
    assert max(rel_error(a, b, floor=1e-3) for a, b in zip(*grads)) < tol


def test_maps_and_variants():
    model, batch = small_model(layers=2)
    assert [tuple(a.shape) for a in model.attention_maps(batch)] == [(5, 2, 6, 6)] * 2
    check_raises(
        InteractingLayer,
        [(dict(variant="foo"), ValueError, ["variant", "foo"]), (dict(num_heads=0), ValueError, "num_heads")],
        in_features=4,
    )
    check_raises(AutoInt, [(dict(layers=-1), ValueError, "layers")], fields=model.fields)


def official_layer(x, weight, bias, norm, heads=2):
    "The official multi-head attention and its LayerNorm; weight (4, d_in, U), bias (4, U)."
    q, k, v, res = (F.relu(x @ w + b) for w, b in zip(weight, bias))
    q, k, v = (torch.cat(t.split(t.shape[-1] // heads, -1), 0) for t in (q, k, v))
    weights = F.softmax(q @ k.transpose(1, 2) / k.shape[-1] ** 0.5, -1)
    out = torch.cat((weights @ v).split(len(x), 0), -1)
    out = F.relu(out + res)
    mean, var = out.mean(-1, keepdim=True), out.var(-1, keepdim=True, unbiased=False)
    return norm.weight * (out - mean) / (var + 1e-8) ** 0.5 + norm.bias


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_parity_with_the_official_layer(backend):
    torch.manual_seed(0)
    layer = InteractingLayer(12, 8, 2, variant="official", backend=backend).to(device_under_test())
    nn.init.normal_(layer.bias)
    x = torch.randn(4, 6, 12, device=device_under_test())
    want = official_layer(x, layer.weight, layer.bias, layer.norm)
    torch.testing.assert_close(layer(x), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "kw",
    [
        dict(layers=0),
        dict(layers=1),
        dict(layers=3),
        dict(layers=2, use_residual=False),
        dict(layers=2, variant="official"),
        dict(layers=1, dnn=(7,)),
    ],
    ids=str,
)
def test_inference_agrees_with_the_model(kw):
    model, batch = small_model(**kw)
    tol = 1e-2 if device_under_test() == "cuda" else 1e-5
    want = model.logits(batch)
    assert rel_error(autoint_infer(model, *batch, backend="triton"), want) < tol
    assert rel_error(autoint_infer(model, *batch, backend="torch"), want) < 1e-6


def test_inference_in_odd_batches():
    model, (index, value) = small_model(layers=2)
    packed = pack_for_inference(model)
    whole = autoint_infer(packed, index, value, backend="triton")
    for n in (0, 1, 4):
        assert torch.equal(autoint_infer(packed, index[:n], value[:n], backend="triton"), whole[:n])
    check_raises(
        autoint_infer,
        [
            (dict(index=value), TypeError, ["index", "integers"]),
            (dict(index=index[:, :2], value=value[:, :2]), ValueError, "6 fields"),
        ],
        model=packed,
        index=index,
        value=value,
        backend="triton",
    )


def test_auc():
    y = torch.tensor([0, 0, 1, 1])
    area = lambda *z: logloss_auc(torch.tensor(z), y)[1]
    assert (area(1.0, 2, 3, 4), area(4.0, 3, 2, 1), area(0.0, 0, 0, 0)) == (1, 0, 0.5)
    assert area(1.0, 3, 2, 4) == 0.75
    assert abs(logloss_auc(torch.zeros(4), y)[0] - math.log(2)) < 1e-12
    check_raises(logloss_auc, [(dict(y=torch.ones(4)), ValueError, "both classes")], logits=torch.zeros(4), y=y)


def test_flag_codes():
    assert flag_codes(np.array([[0, 1, 0, 1], [0, 0, 0, 0]])).tolist() == [[1, 3], [-1, -1]]


def test_information():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 4000)
    assert abs(mutual_information(y, y) - math.log(2)) < 1e-3
    noise = rng.integers(0, 2, (4000, 2))
    codes = np.stack([noise[:, 0], noise[:, 0] ^ y, noise[:, 1]], 1)  # y = field 0 xor field 1
    info = pair_information(codes, y)
    assert info[0, 1] > 0.6 and max(info[0, 2], info[1, 2], info[0, 0]) < 0.01


def test_heatmap():
    model, batch = small_model(layers=2)
    heat = field_interaction_heatmap(model, *batch, layer=1)
    assert heat.shape == (6, 6)
    torch.testing.assert_close(heat.sum(1), torch.ones(6, dtype=torch.float64))
    want = model.attention_maps(batch)[1].mean((0, 1)).double().cpu()
    torch.testing.assert_close(heat, want, rtol=1e-4, atol=1e-5)


def test_peers_compute_the_same():
    e, w = draw_layer(3, 7, 8, 2, 8, True, False)
    want = interacting_reference(e, w, num_heads=2)
    for peer in (plain_layer_eager, sdpa_layer):
        torch.testing.assert_close(peer(e, w), want, rtol=2e-3, atol=2e-3)


def leads(*means, half=0.01, n=3):
    return {name: Interval(mean, half, n) for name, mean in zip(("LR", "FM", "GBT"), means)}


def gained(first, rest, half=0.01):
    return {"first": Interval(first, half, 3), "rest": rest}


def orders(*auc):
    return dict(zip(("AutoInt 0, k=2", "AutoInt 1, k=2", "AutoInt 1, k=3", "AutoInt 2, k=3"), auc))


def explained(*pairs):
    return {i: dict(information=a, change=b) for i, (a, b) in enumerate(pairs)}


RULES = {  # the claim's rule, what was measured, the verdict
    "better than all": (_judge_baselines, leads(0.02, 0.02, 0.02), "holds"),
    "better than two": (_judge_baselines, leads(0.02, -0.02, 0.02), "holds in part"),
    "worse or undecided": (_judge_baselines, leads(-0.02, 0.005, 0.005), "does not hold here"),
    "undecided": (_judge_baselines, leads(0.005, -0.005, 0.009), "not measured"),
    "one seed": (_judge_baselines, leads(1, 1, 1, half=math.inf, n=1), "not measured"),
    "first gains most": (_judge_gains, gained(0.02, 0.01), "holds"),
    "within its interval": (_judge_gains, gained(0.009, 0.001), "holds in part"),
    "others gain more": (_judge_gains, gained(0.02, 0.03), "does not hold here"),
    "others lose more": (_judge_gains, gained(0.02, -0.03), "does not hold here"),
    "gain of one seed": (_judge_gains, gained(0.02, 0.01, math.inf), "not measured"),
    "two layers for order 3": (_judge_orders, orders(0.5, 0.95, 0.6, 0.95), "holds"),
    "one layer for order 3": (_judge_orders, orders(0.5, 0.95, 0.95, 0.95), "holds in part"),
    "order 2 only": (_judge_orders, orders(0.5, 0.95, 0.6, 0.7), "holds in part"),
    "order 2 without a layer": (_judge_orders, orders(0.7, 0.95, 0.6, 0.95), "does not hold here"),
    "order 2 not learnt": (_judge_orders, orders(0.5, 0.8, 0.6, 0.95), "does not hold here"),
    "explains": (_judge_explanations, explained((0.6, 0.2), (0.7, 0.3)), "holds"),
    "explains, labels or not": (_judge_explanations, explained((0.6, 0.2), (0.7, 0.05)), "holds in part"),
    "explains one of two": (_judge_explanations, explained((0.6, 0.2), (0.4, 0.3)), "holds in part"),
    "explains nothing": (_judge_explanations, explained((0.4, 0.2), (0.4, 0.3)), "does not hold here"),
}


@pytest.mark.parametrize("case", RULES)
def test_rules(case):
    rule, measured, want = RULES[case]
    assert Claim("", "", "", rule, measured=measured).judge().verdict == want


def test_claims_read_the_right_rows():
    "Signs and sides: what is better, what is compared with what, and which size is read."
    auc = {
        "LR": 0.6,
        "FM": 0.7,
        "GBT": 0.7,
        "AutoInt 0": 0.65,
        "AutoInt 1": 0.78,
        "AutoInt 2": 0.8,
        "no residual": 0.7,
        "AutoInt+": 0.9,
    }
    rows = [
        dict(method=m, run=i, data="ml100k", size=size, deepest=2, auc=(x if size == "gpu" else 1 - x) + i / 1000)
        for m, x in auc.items()
        for i in range(3)
        for size in ("cpu", "gpu")
    ]
    speed = [
        dict(method=m, B=8, M=3, ms_fwd=x, ms_bwd=2 * x + 3 * (m != "ours"), peak_mb_bwd=x)
        for m, x in (("ours", 1.0), ("eager", 6.0), ("compiled", 4.0), ("sdpa compiled", 3.0))
    ]
    shelf = dict(table=rows, network=speed, inference=[r | dict(B=b) for r in speed for b in (1, 8)])
    frame = dict(date="2026-01-01T00:00:00+00:00", device="made up", versions={}, preset="gpu")
    read = lambda chapter, name, **where: [frame | r for r in shelf.get(name, [])]
    with pytest.MonkeyPatch.context() as patch:
        for room in (best_rows, claims):  # both read rows
            patch.setitem(room.__globals__, "load_results", read)
        found = {c.statement: c.judge() for c in claims()}
        assert lead("ml100k", "AutoInt 2", "LR").mean == pytest.approx(0.2)
        ratios = [_faster("network", peers, TRAINING)[0].ratio for peers in (("eager",), ("compiled", "sdpa compiled"))]
        assert ratios == [21 / 3, 12 / 3]  # forward and backward together, the fastest peer
    verdict = lambda words: next(v for k, v in found.items() if words in k).verdict
    assert all(verdict(s) == "holds" for s in ("baselines", "residual hurts", "first interacting", "DNN helps"))
    assert verdict("faster than eager") == verdict("torch.compile") == verdict("peak memory") == "holds"
    assert verdict("inference 5 times") == "holds in part"  # 3 times
    assert verdict("Layers learn") == verdict("maps explain") == "not measured"


def test_claims_cope_with_missing_rows():
    assert all(c.judge().verdict for c in claims())

# Written from the test cells of nbs/6_beyond_tokens/autoint.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
from contextlib import contextmanager
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from attnbook.autoint.experiments_study import (
    FieldTable,
    best_rows,
    flag_codes,
    lead,
    lead_pairs,
    mutual_information,
    pair_information,
    scores,
)
from attnbook.autoint.nets import (
    AutoInt,
    FieldEmbedding,
    InteractingLayer,
    autoint_infer,
    field_interaction_heatmap,
    keep_probabilities,
    logloss_auc,
    pack_for_inference,
)
from attnbook.autoint.op import interacting_attention, interacting_layer, interacting_op
from attnbook.autoint.reference import embed_fields, interacting_reference
from attnbook.autoint.study import (
    DATA,
    NETWORK_SIZES,
    TRAINING,
    _explanations,
    _faster,
    _judge_each,
    _judge_explanations,
    _judge_gains,
    _judge_orders,
    _orders,
    claims,
    packed_sdpa_layer,
    plain_layer_eager,
    sdpa_layer,
)
from attnbook.autoint.training_study import (
    FactorizationMachine,
    answers,
    explain,
    networks,
    order_experiment,
    order_networks,
    predict,
    product_table,
    split,
    table_experiment,
    train_network,
    without,
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


def test_features_and_classes():
    model, batch = small_model(layers=2)
    features = model.forward_features(*batch)
    assert features.shape == (5, 6, 16)
    torch.testing.assert_close(model.head(features.flatten(1)).squeeze(-1), model(*batch))
    bare, _ = small_model(layers=2, num_classes=0)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head")})
    torch.testing.assert_close(bare(*batch), features.flatten(1))
    many, _ = small_model(layers=1, num_classes=3, dnn=(7,))
    assert many(*batch).shape == (5, 3) and autoint_infer(many, *batch).shape == (5, 3)
    check_raises(pack_for_inference, [(dict(model=m), ValueError, ["num_classes"]) for m in (many, bare)])
    check_raises(AutoInt, [(dict(num_classes=0, dnn=(4,)), ValueError, "num_classes")], fields=model.fields)


def test_every_dropout_can_be_reached():
    "Each of the three acts in training, alone, with the probability that it is given, and not in evaluation."
    kept = keep_probabilities(0.6, 0.9, 0.25)
    assert kept == pytest.approx(dict(attention_dropout=0.4, dropout=0.1, dnn_dropout=0.75))
    assert keep_probabilities() == dict(attention_dropout=0.0, dropout=0.0, dnn_dropout=0.5)
    model, batch = small_model(layers=2, dnn=(7,), **kept)
    assert [l.dropout for l in model.layers] == pytest.approx([0.4, 0.4])
    assert model.dropout == pytest.approx(0.1) and model.dnn[2].p == 0.75
    check_raises(AutoInt, [(dict(attention_dropout=1.5), ValueError, "dropout")], fields=model.fields)
    check_raises(keep_probabilities, [(dict(attention=1.5), ValueError, "attention_dropout")])
    for name in kept:
        model, batch = small_model(layers=1, dnn=(7,), **{name: 0.5})
        want = model(*batch)
        assert torch.equal(model(*batch), want)
        torch.manual_seed(0)
        assert (model.train()(*batch) - want).abs().max() > 1e-3, name
    plain, batch = small_model(layers=1, dnn=(7,))
    torch.testing.assert_close(plain.train()(*batch), want, rtol=1e-4, atol=1e-5)
    model, batch = small_model(layers=1, dnn=(7,), dropout=0.5)
    given = []  # the layers and the DNN see the same embeddings, dropped once
    for module in (model.layers[0], model.dnn[0]):
        module.register_forward_pre_hook(lambda m, args: given.append(args[0].flatten(1)))
    model.train()(*batch)
    assert torch.equal(*given) and 0.2 < float((given[0] == 0).float().mean()) < 0.9


def test_attention_dropout_keeps_the_mean():
    "And its variance is that of weights which are dropped with the given probability, not kept with it."
    layer = InteractingLayer(8, 8, 2, use_residual=False, dropout=0.2, backend="torch")
    e = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)).expand(4000, -1, -1).abs()
    with torch.no_grad():
        layer.weight[2].abs_(), layer.weight[:2].mul_(0.1)  # values are positive: the ReLU does nothing
        torch.manual_seed(0)
        outs, want = layer.train()(e), layer.eval()(e[:1])[0]
        _, alpha = layer(e[:1], return_weights=True)
        value = (e[0] @ layer.weight[2]).unflatten(-1, (2, 8))  # [fields, heads, channels]
        spread = 0.2 / 0.8 * torch.einsum("hmk,khc->mhc", alpha[0].square(), value.square()).flatten(1)
    assert rel_error(outs.mean(0), want) < 0.05 and rel_error(outs.var(0), spread) < 0.2


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


def small_table(n=200):
    "Three fields and genres; y is 1 where the first field is 0."
    g = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(k, (n,), generator=g) for k in (2, 3, 4)], 1)
    genres = torch.randint(-1, 5, (n, 2), generator=g)
    return FieldTable("made up", codes, [genres], [2, 3, 4], [5], (codes[:, 0] == 0).float(), ["a", "b", "c", "genres"])


def test_splits():
    y = torch.zeros(1000)
    parts = split(y, 3)
    assert [len(p) for p in parts] == [800, 100, 100] and len(torch.cat(parts).unique()) == 1000
    assert all(map(torch.equal, parts, split(y, 3))) and not torch.equal(parts[2], split(y, 4)[2])


def test_ablations_change_one_thing():
    "Against the network that each is compared with."
    nets = {name: make() for name, make in networks(small_table(), (0, 1, 2)).items()}

    def of(m):
        layer = m.layers[0] if len(m.layers) else None
        kind = (len(layer.weight), layer.scale, layer.variant, layer.dropout) if layer else (None,) * 4
        dnn = None if m.dnn is None else (len(m.dnn), m.dnn[2].p)
        return dict(zip(("residual", "scale", "variant", "attention_dropout"), kind)) | dict(
            layers=len(m.layers), dropout=m.dropout, dnn=dnn, width=m.fields.table.shape[1]
        )

    changed = lambda a, b: {k for k, x in of(nets[a]).items() if x != of(nets[b])[k]}
    assert changed("no residual", "AutoInt 2") == {"residual"} and changed("scaled", "AutoInt 2") == {"scale"}
    assert changed("official layer", "AutoInt 2") == {"variant", "scale"}  # which is what the variant is
    assert changed("with DNN", "AutoInt 2") == {"dnn"} == changed("dropout, with DNN", "dropout")
    assert changed("dropout", "AutoInt 2") == {"dropout"} and changed("DNN", "AutoInt 0") == {"dnn"}
    assert of(nets["AutoInt 1"])["layers"] == 1 and of(nets["scaled"])["scale"] == 32**-0.5
    assert of(nets["with DNN"])["dnn"] == (7, 0.5) and isinstance(nets["FM"], FactorizationMachine)
    shared = [dict(nets[n].named_parameters()) for n in ("AutoInt 2", "no residual")]
    assert shared[0]["layers.0.weight"].shape[0] == shared[1]["layers.0.weight"].shape[0] + 1


def test_every_model_sees_the_same_rows():
    "Train rows for training, test rows for the score, in their order; a network that knows y scores 1."
    table, seen = small_table(), []

    def trained(make, packed, y, rows, run, epochs, batch, device):
        seen.append((rows, y, run, epochs, batch))
        return lambda index, value: (index[:, 0, 0] == 0).float()

    how = dict(layers=(0, 1), epochs=7, batch=9, rows=None, seeds=3)
    with mock.patch.dict(table_experiment.__globals__, train_network=trained):
        some = [name for name, *_ in table_experiment(table, 5, methods=("GBT", "dropout"), **how)]
        assert some == ["GBT", "dropout"] and len(seen) == 1
        found = list(table_experiment(table, 5, **how))
    train, _, test = split(table.y, 5)
    assert [name for name, *_ in found] == ["LR", "GBT", *networks(table, (0, 1))]
    for rows, y, *rest in seen:
        assert torch.equal(rows, train) and torch.equal(y, table.y) and rest == [5, 7, 9]
    for name, logits, at in found:
        assert torch.equal(at, test) and logloss_auc(logits, table.y[at])[1] == 1, name


def test_training_learns_and_repeats():
    table = small_table()
    packed = table.embedding(1).pack(table.categorical, table.multi_valued)
    go = lambda run, rows: train_network(
        lambda: AutoInt(table.embedding(4), layers=0), packed, table.y, rows, run, None, 32, lr=0.1, steps=40
    )
    a, b, c = (go(run, torch.arange(100)) for run in (0, 0, 1))
    held = tuple(t[100:] for t in packed)
    assert torch.equal(predict(a, *held), predict(b, *held)) and not torch.equal(predict(a, *held), predict(c, *held))
    assert logloss_auc(predict(a, *held), table.y[100:])[1] > 0.99
    assert (
        torch.equal(predict(a, *held, batch=7), predict(a, *held))
        or rel_error(predict(a, *held, batch=7), predict(a, *held)) < 1e-5
    )
    wrong = train_network(
        lambda: AutoInt(table.embedding(4), layers=0), packed, 1 - table.y, torch.arange(100), 0, 2, 32, lr=0.3
    )
    assert logloss_auc(predict(wrong, *held), table.y[100:])[1] < 0.2


def test_machine_adds_pairs():
    fields = FieldEmbedding([3, 4], [5], dim=6, std=1.0)
    model = FactorizationMachine(fields)
    nn.init.normal_(model.weight), nn.init.normal_(model.bias)
    index, value = fields.pack(torch.tensor([[2, 3], [0, -1]]), [torch.tensor([[4, 1], [-1, -1]])])
    e, w = fields(index, value), embed_fields(model.weight, index, value)
    pairs = sum((e[:, i] * e[:, j]).sum(-1) for i, j in ((0, 1), (0, 2), (1, 2)))
    torch.testing.assert_close(model(index, value), model.bias + w.sum((1, 2)) + pairs)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_labels_of_an_order(k):
    "The label turns when one of the first k fields takes a value of the other sign, whatever the others do."
    codes, y = product_table(k, 3000, seed=7)
    assert codes.shape == (3000, 5) and 0.4 < float(y.mean()) < 0.6 and int(codes.max()) == 3
    known = {tuple(c): float(t) for c, t in zip(codes.tolist(), y)}
    signs = [{}, {}, {}, {}, {}]
    for f in range(5):
        for c, t in known.items():
            for value in range(4):
                other = (*c[:f], value, *c[f + 1 :])
                if other in known:
                    signs[f].setdefault((c[f], value), set()).add(t == known[other])
        assert all(len(s) == 1 for s in signs[f].values())  # the same, whatever the others do
        turns = [s == {False} for (a, b), s in signs[f].items() if a < b]
        assert sum(turns) == (4 if f < k else 0)  # two and two values
    single = [float(y[codes[:, f] == v].mean()) for f in range(5) for v in range(4)]
    assert k == 1 or max(abs(x - 0.5) for x in single) < 0.1


def test_orders_are_scored_on_fresh_rows():
    seen = []

    def trained(make, packed, y, rows, run, epochs, batch, steps, device):
        seen.append((len(rows), int(rows.max()), run, steps, type(make()).__name__))
        known = {tuple(i): t for i, t in zip(packed[0][len(rows) :, :, 0].tolist(), y[len(rows) :])}
        return lambda index, value: torch.stack([known[tuple(i)] for i in index[:, :, 0].tolist()])

    with mock.patch.dict(order_experiment.__globals__, train_network=trained):
        found = dict(order_experiment(2, 3, (0, 1), train=50, steps=4, batch=8, fields=5, values=4))
    assert found == {"FM": 1, "AutoInt 0": 1, "AutoInt 1": 1, "DNN": 1}
    assert seen == [(50, 49, 3, 4, n) for n in ("FactorizationMachine", "AutoInt", "AutoInt", "AutoInt")]
    nets = {name: make() for name, make in order_networks(5, 4, (0, 2)).items()}
    assert [len(nets[f"AutoInt {n}"].layers) for n in (0, 2)] == [0, 2]
    assert nets["DNN"].dnn is not None and nets["AutoInt 2"].dnn is None and not len(nets["DNN"].layers)


def test_information():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 4000)
    assert abs(mutual_information(y, y) - math.log(2)) < 1e-3
    noise = rng.integers(0, 2, (4000, 2))
    codes = np.stack([noise[:, 0], noise[:, 0] ^ y, noise[:, 1]], 1)  # y = field 0 xor field 1
    info = pair_information(codes, y)
    assert info[0, 1] > 0.6 and max(info[0, 2], info[1, 2], info[0, 0]) < 0.01
    many = rng.integers(0, 60, (4000, 2))  # nearly every pair of values is its own: the plug-in estimate is large
    assert mutual_information(60 * many[:, 0] + many[:, 1], y) > 0.2 and abs(pair_information(many, y)[0, 1]) < 0.03


def test_heatmap():
    model, batch = small_model(layers=2)
    heat = field_interaction_heatmap(model, *batch, layer=1)
    assert heat.shape == (6, 6)
    torch.testing.assert_close(heat.sum(1), torch.ones(6, dtype=torch.float64))
    want = model.attention_maps(batch)[1].mean((0, 1)).double().cpu()
    torch.testing.assert_close(heat, want, rtol=1e-4, atol=1e-5)


def test_answers():
    "Maps, information and losses of which the answers are known; the diagonal plays no part in pairs."
    info = np.array([[9.0, 3, 1], [3, 9, 2], [1, 2, 9]])
    follow = np.array([[0.6, 0.1, 0.3], [0.7, 0.1, 0.2], [0.1, 0.4, 0.5]])  # pairs 0.8, 0.4, 0.6, like the information
    against = np.array([[0.6, 0.1, 0.3], [0.1, 0.7, 0.2], [0.4, 0.2, 0.4]])  # pairs 0.2, 0.7, 0.4
    lost = list(follow.mean(0))
    found = answers([follow, against], info, lost)
    assert found["information"] == pytest.approx(1) and found["information_shuffled"] == pytest.approx(-1)
    assert found["shuffled"] == pytest.approx(-1) and found["ablation"] == pytest.approx(1)
    assert found["change"] == pytest.approx((0 + 0.6 + 0.3) / 3)
    swapped = answers([against, follow], info, [-x for x in against.mean(0)])
    assert swapped["information"] == pytest.approx(-1) and swapped["ablation"] == pytest.approx(-1)
    assert answers([follow, follow], info, lost)["change"] == 0


def test_explanations_are_of_the_right_rows():
    "Two trainings on the training rows, the second on the same labels in another order; losses are of the first."
    table, seen, models = small_table(), [], []

    def trained(make, packed, y, rows, run, epochs, batch, device):
        seen.append((y, rows)), models.append(make().eval())
        torch.manual_seed(len(seen))
        nn.init.normal_(models[-1].fields.table)
        return models[-1]

    first_field = lambda model, index, value, device: (1 - index[:, 0, 0]) * value[:, 0, 0]
    with mock.patch.dict(explain.__globals__, train_network=trained, predict=first_field):
        maps, information, loss = explain(table, 2, epochs=1, batch=8)
    train, _, test = split(table.y, 2)
    assert all(torch.equal(rows, train) for _, rows in seen) and torch.equal(seen[0][0], table.y)
    assert not torch.equal(seen[1][0], table.y) and float(seen[1][0].sum()) == float(table.y.sum())
    assert loss[0] == pytest.approx(0.5) and loss[1:] == [0, 0, 0]  # without the field it guesses
    codes = torch.cat([table.categorical, table.multi_valued[0][:, :1] + 1], 1)[train].numpy()
    assert np.allclose(information, pair_information(codes, table.y[train].numpy(), 2))
    assert information.shape == (4, 4) and information[0, 0] > 0.5 and [m.shape for m in maps] == [(4, 4)] * 2
    packed = table.embedding(1).pack(table.categorical, table.multi_valued)
    index, value = without(packed, 3)
    assert (value[:, 3] == 0).all() and torch.equal(value[:, :3], packed[1][:, :3]) and torch.equal(index, packed[0])
    held = tuple(t[test][table.y[test] == 1] for t in packed)
    for heat, model in zip(maps, models):  # positive test rows, the first layer
        assert np.allclose(heat, field_interaction_heatmap(model, *held).numpy())


def test_peers_compute_the_same():
    e, w = draw_layer(3, 7, 8, 2, 8, True, False)
    want = interacting_reference(e, w, num_heads=2)
    for peer in (plain_layer_eager, sdpa_layer, packed_sdpa_layer):
        torch.testing.assert_close(peer(e, w), want, rtol=2e-3, atol=2e-3)


def leads(*means, half=0.01, n=3):
    return {name: Interval(mean, half, n) for name, mean in zip(("LR", "FM", "GBT"), means)}


def gained(*gains, half=0.001):
    "Gains of the layers, of one data set or (lists) of several."
    several = gains if isinstance(gains[0], tuple) else (gains,)
    names = ("first", "second", "third")
    return {str(i): {n: Interval(x, half, 3) for n, x in zip(names, g)} for i, g in enumerate(several)}


def orders(second, third, fourth, dnn=(1, 1, 1), **more):
    "AUC of 0 to 3 layers for each order; of fewer given the last goes on."
    full = lambda auc: {f"AutoInt {n}": x for n, x in enumerate([*auc, *[auc[-1]] * (4 - len(auc))])}
    return {k: full(auc) | {"FM": 0.5, "DNN": d} for k, auc, d in zip((2, 3, 4), (second, third, fourth), dnn)} | more


def explained(*found, half=0.1):
    return {i: dict(information=a, change=b, above=Interval(c, half, 3)) for i, (a, b, c) in enumerate(found)}


RULES = {  # the claim's rule, what was measured, the verdict
    "better than all": (_judge_each, leads(0.02, 0.02, 0.02), "holds"),
    "better than two": (_judge_each, leads(0.02, -0.02, 0.02), "holds in part"),
    "better than one, undecided": (_judge_each, leads(0.02, 0.001), "holds in part"),
    "worse or undecided": (_judge_each, leads(-0.02, 0.005, 0.005), "does not hold here"),
    "undecided": (_judge_each, leads(0.005, -0.005, 0.009), "not measured"),
    "one seed": (_judge_each, leads(1, 1, 1, half=math.inf, n=1), "not measured"),
    "first gains most, then level": (_judge_gains, gained(0.02, 0.01, 0.0005), "holds"),
    "the last still adds": (_judge_gains, gained(0.02, 0.01, 0.005), "holds in part"),
    "the last loses": (_judge_gains, gained(0.02, 0.01, -0.005), "holds"),
    "the second within the interval": (_judge_gains, gained(0.011, 0.0095, 0.0), "does not hold here"),
    "the third gains most": (_judge_gains, gained(0.02, 0.01, 0.03), "does not hold here"),
    "the first gains nothing": (_judge_gains, gained(0.0005, -0.01, -0.02), "does not hold here"),
    "level on one data set": (_judge_gains, gained((0.02, 0.01, 0.0), (0.02, 0.01, 0.005)), "holds in part"),
    "first on one data set": (_judge_gains, gained((0.02, 0.01, 0.0), (0.01, 0.02, 0.0)), "does not hold here"),
    "gain of one seed": (_judge_gains, gained(0.02, 0.01, 0.0, half=math.inf), "not measured"),
    "as the paper counts": (_judge_orders, orders((0.5, 1), (0.5, 0.6, 1), (0.5, 0.6, 1)), "holds"),
    "one layer for order 3": (_judge_orders, orders((0.5, 1), (0.5, 1), (0.5, 0.6, 1)), "holds in part"),
    "three layers for order 4": (_judge_orders, orders((0.5, 1), (0.5, 0.6, 1), (0.5, 0.6, 0.6, 1)), "holds in part"),
    "order 4 by nobody": (_judge_orders, orders((0.5, 1), (0.5, 0.6, 1), (0.5,), (1, 1, 0.5)), "holds in part"),
    "order 2 without a layer": (_judge_orders, orders((0.95, 1), (0.5, 0.6, 1), (0.5, 0.6, 1)), "not measured"),
    "order 4 without a layer": (_judge_orders, orders((0.5, 1), (0.5, 0.6, 1), (0.7, 0.6, 1)), "not measured"),
    "order 2 takes two": (_judge_orders, orders((0.5, 0.6, 1), (0.5, 0.6, 1), (0.5, 0.6, 1)), "does not hold here"),
    "no order learnt": (_judge_orders, orders((0.5,), (0.5,), (0.5,)), "does not hold here"),
    "explains": (_judge_explanations, explained((0.6, 0.2, 0.5), (0.7, 0.3, 0.5)), "holds"),
    "explains, labels or not": (
        _judge_explanations,
        explained((0.6, 0.2, 0.05), (0.7, 0.3, 0.05)),
        "does not hold here",
    ),
    "moves nothing": (_judge_explanations, explained((0.6, 0.2, 0.5), (0.7, 0.05, 0.5)), "holds in part"),
    "explains one of two": (_judge_explanations, explained((0.6, 0.2, 0.5), (0.4, 0.3, 0.5)), "holds in part"),
    "one more than shuffled": (_judge_explanations, explained((0.6, 0.2, 0.5), (0.7, 0.3, 0.05)), "holds in part"),
    "explains nothing": (_judge_explanations, explained((0.4, 0.2, 0.5), (0.4, 0.3, 0.5)), "does not hold here"),
    "one seed explained": (_judge_explanations, explained((0.6, 0.2, 0.5), half=math.inf), "not measured"),
}


@pytest.mark.parametrize("case", RULES)
def test_rules(case):
    rule, measured, want = RULES[case]
    assert Claim("", "", "", rule, measured=measured).judge().verdict == want


def test_reasons():
    "Who learns an order that the paper's count does not allow, which nobody learns, where the last layer still adds."
    said = lambda rule, measured: rule(measured)[1]
    hard = orders((0.5, 1), (0.5, 1), (0.5,), (1, 1, 0.5))
    assert "order 3: from 1 layers on; order 4: no depth" in said(_judge_orders, hard)
    assert "undecided, since no network learns it in this training: 4; sooner than 2^L says: 3" in said(
        _judge_orders, hard
    )
    assert "undecided" not in said(_judge_orders, orders((0.5, 1), (0.5, 1), (0.5,)))  # the DNN learns it
    assert (
        said(_judge_gains, gained((0.02, 0.01, 0.0), (0.02, 0.01, 0.005))) == "the last layer still adds on 1 (+0.0050)"
    )
    assert said(_judge_each, leads(0.02, -0.02, 0.001)) == "better at LR; worse at FM; undecided: GBT"


SCORES = {
    "LR": 0.6,
    "FM": 0.7,
    "GBT": 0.7,
    "AutoInt 0": 0.65,
    "AutoInt 1": 0.78,
    "AutoInt 2": 0.8,
    "AutoInt 3": 0.8,
    "no residual": 0.7,
    "with DNN": 0.9,
    "dropout": 0.5,
    "dropout, with DNN": 0.55,
    "AutoInt+": 0.1,
}


@contextmanager
def shelf(**rows):
    "Nothing is recorded but made-up rows: name -> rows."
    frame = dict(date="2026-01-01T00:00:00+00:00", device="made up", versions={}, preset="gpu")
    read = lambda chapter, name, **where: [frame | r for r in rows.get(name, [])]
    with pytest.MonkeyPatch.context() as patch:
        for room in (best_rows, claims):  # both read rows
            patch.setitem(room.__globals__, "load_results", read)
        yield lambda words: next(c for c in claims() if words in c.statement).judge()


def table_rows(data=("ml100k", "adult"), **changes):
    "Three seeds of every method, as the gpu preset and, turned round, as the cpu preset."
    return [
        dict(method=m, run=i, data=d, size=size, deepest=3, auc=(x if size == "gpu" else 1 - x) + i / 1000)
        for m, x in (SCORES | changes).items()
        if x is not None
        for i in range(3)
        for size in ("cpu", "gpu")
        for d in data
    ]


def test_claims_read_the_right_rows():
    "Signs and sides: what is better, what is compared with what, and which size is read."
    speed = [
        dict(method=m, B=8, M=3, ms_fwd=x, ms_bwd=2 * x + 3 * (m != "ours"), peak_mb_bwd=x)
        for m, x in (("ours", 1.0), ("eager", 6.0), ("compiled", 4.0), ("sdpa compiled", 3.0))
    ]
    sizes = [r | dict(B=b) for r in speed for b in (1, 8)]
    with shelf(network=speed) as judged:  # one size is no range
        assert [judged(x).verdict for x in ("than eager", "torch.compile", "peak memory")] == ["holds in part"] * 3
    with shelf(table=table_rows(), network=sizes, inference=sizes) as judged:
        assert lead("ml100k", "AutoInt 2", "LR").mean == pytest.approx(0.2)
        ratios = [_faster("network", peers, TRAINING)[0].ratio for peers in (("eager",), ("compiled", "sdpa compiled"))]
        assert ratios == [21 / 3, 12 / 3]  # forward and backward together, the fastest peer
        for words in ("baselines", "residual hurts", "first interacting", "DNN helps", "than eager", "torch.compile"):
            assert judged(words).verdict == "holds", words
        assert judged("peak memory").verdict == "holds" and judged("inference 5 times").verdict == "holds in part"
        assert judged("Layers learn").verdict == judged("maps explain").verdict == "not measured"
        assert set(judged("DNN helps").measured) == {
            f"{d}: {a} over {b}" for d in DATA for a, b in (("with DNN", "full"), ("dropout, with DNN", "dropout"))
        }


@pytest.mark.parametrize(
    "words, changes",
    [
        ("baselines", {"GBT": 0.9}),
        ("residual hurts", {"no residual": 0.9}),
        ("DNN helps", {"with DNN": 0.7}),
        ("DNN helps", {"dropout, with DNN": 0.4}),
        ("first interacting", {"AutoInt 3": 0.85}),
    ],
    ids=str,
)
def test_a_contrary_data_set_counts(words, changes):
    "What holds on one data set and not on the other holds in part."
    with shelf(table=table_rows(("ml100k",)) + table_rows(("adult",), **changes)) as judged:
        assert judged(words).verdict == "holds in part"
    with shelf(table=table_rows(**{k: None for k in changes})) as judged:  # one side is missing
        assert judged(words).verdict == "not measured"


def test_two_changes_at_once_are_not_read():
    "AutoInt+ of older rows has a DNN and dropout."
    with shelf(table=table_rows(**{"with DNN": None, "dropout, with DNN": None})) as judged:
        assert judged("DNN helps").verdict == "not measured"


def test_a_size_without_the_peer_to_beat_does_not_count():
    row = lambda m, B, ms: dict(method=m, B=B, M=3, ms_fwd=ms)
    rows = [row("ours", 8, 1.0), row("compiled", 8, 9.0), row("eager", 8, 20.0)]
    with shelf(inference=rows) as judged:
        assert judged("inference 5 times").verdict == "not measured"
    with shelf(inference=[*rows, row("sdpa compiled", 8, 4.0)]) as judged:
        assert judged("inference 5 times").verdict == "holds in part"
    failed = row("sdpa compiled", 8, None)
    with shelf(inference=[*rows, failed, *(r | dict(B=9) for r in (*rows, failed))]) as judged:  # it was tried
        assert judged("inference 5 times").verdict == "holds" and "sdpa compiled at" in judged("inference 5").reason
    small = [
        row("ours", 1, 1.0),
        row("compiled", 1, 2.0),
        row("sdpa compiled", 1, 3.0),
        row("packed sdpa compiled", 1, 0.5),
    ]
    with shelf(inference=[*rows, row("sdpa compiled", 8, 9.0), *small]) as judged:
        assert judged("inference 5 times").verdict == "does not hold here"  # slower at one size


def test_rows_of_one_device_go_together():
    row = lambda m, run, auc, **kw: dict(method=m, run=run, data="adult", size="gpu", deepest=3, auc=auc) | kw
    old, new = dict(device="a", date="2026-01-01"), dict(device="b", date="2026-01-02")
    rows = [row("x", 0, 0.9, **old), row("y", 0, 0.5, **old), row("x", 0, 0.1, **new)]
    with shelf(table=rows):
        assert lead("adult", "x", "y").mean == pytest.approx(0.4) and scores("adult", "x") == {0: 0.1}
    with shelf(table=[*rows, row("y", 0, 0.4, **new)]):  # the newer pair
        assert lead("adult", "x", "y").mean == pytest.approx(-0.3) and lead("adult", "x", "y").n == 1
    with shelf(table=rows[1:]):
        assert lead("adult", "x", "y").mean == pytest.approx(-0.4)  # no device has both
        assert lead("adult", "x", "z") is None


def test_an_unfinished_device_leaves_the_others_alone():
    "Its whole pairs count; of a run that it has one side of, or none, the older device's."
    row = lambda m, run, auc, device: dict(
        method=m, run=run, data="adult", size="gpu", deepest=3, auc=auc, device=device, date=f"2026-01-0{device}"
    )
    old = [row(m, run, auc, "1") for m, auc in (("x", 0.6), ("y", 0.5)) for run in range(3)]
    new = [row("x", 0, 0.9, "2"), row("y", 0, 0.6, "2"), row("x", 1, 0.0, "2")]
    with shelf(table=[*new, *old]):
        pairs = lead_pairs("adult", "x", "y")
        assert {run: (a["device"], b["device"]) for run, (a, b) in pairs.items()} == {
            0: ("2", "2"),
            1: ("1",) * 2,
            2: ("1",) * 2,
        }
        assert lead("adult", "x", "y").mean == pytest.approx((0.3 + 0.1 + 0.1) / 3)
        assert lead("adult", "y", "x").mean == pytest.approx(-0.5 / 3)


def test_speeds_are_of_one_gpu():
    "Of the one measured last alone: sizes that it lacks are not filled up, nor peers."
    row = lambda m, B, x, gpu: dict(
        method=m, B=B, M=3, ms_fwd=x, ms_bwd=x, peak_mb_bwd=x, device=gpu, date=f"2026-01-0{gpu}"
    )
    pair = lambda B, ratio, gpu: [row("ours", B, 1.0, gpu), row("eager", B, ratio, gpu)]
    old = [*pair(8, 20.0, "1"), *pair(9, 0.5, "1")]
    with shelf(network=[*pair(8, 6.0, "2"), *pair(16, 7.0, "2"), *old]) as judged:
        found = judged("than eager")
        assert [(s.where, s.ratio) for s in found.measured] == [("B=8, M=3", 6), ("B=16, M=3", 7)]
        assert found.verdict == "holds" and any("two at least, 2; planned" in c.scale for c in claims())
    with shelf(network=[r for B, M in NETWORK_SIZES for r in (x | dict(M=M) for x in pair(B, 6.0, "2"))]) as judged:
        assert judged("than eager").verdict == "holds" and any(c.scale.endswith("two at least, 2") for c in claims())
    with shelf(network=[row("ours", 8, 1.0, "2"), *old]) as judged:
        assert judged("than eager").verdict == "not measured"


def test_orders_and_explanations_read_their_rows():
    row = lambda k, m, run, auc: dict(order=k, method=m, run=run, size="gpu", auc=auc)
    rows = [row(k, f"AutoInt {n}", run, 0.1 * n + 0.01 * run) for k in (1, 2, 3, 4) for n in range(4) for run in (0, 1)]
    with shelf(orders=rows, order=[r | dict(auc=0.0) for r in rows]):
        assert _orders().keys() == {2, 3, 4} and _orders()[4]["AutoInt 3"] == pytest.approx(0.305)
    with shelf(order=rows):
        assert _orders()[3]["AutoInt 1"] == pytest.approx(0.105)
    unfinished = [r for r in rows if (r["order"], r["method"], r["run"]) != (4, "AutoInt 3", 1)]
    with shelf(orders=unfinished):
        assert _orders()[4]["AutoInt 3"] == pytest.approx(0.3)
    for part in ([r for r in rows if r["order"] != 4], [r for r in rows if r["method"] != "AutoInt 2"]):
        with shelf(orders=part):
            assert _orders() is None
    told = [
        dict(
            data="adult",
            run=i,
            size="gpu",
            information=0.5 + i,
            information_shuffled=0.1 * i,
            change=i,
            ablation=2.0 * i,
        )
        for i in range(2)
    ]
    with shelf(explain=told):
        found = _explanations()["adult"]
        assert (found["information"], found["change"], found["ablation"]) == (1.0, 0.5, 1.0)
        assert found["above"].mean == pytest.approx(0.95) and found["above"].n == 2
    with shelf(explain=[r | dict(size="cpu") for r in told]):
        assert _explanations() is None


def test_claims_cope_with_missing_rows():
    assert all(c.judge().verdict for c in claims())
    with shelf():
        found = [c.judge().verdict for c in claims()]
        assert found.count("not measured") == 10 and found.count("holds") == 1  # the parameters are counted

# Written from the test cells of nbs/5_vision/dcal.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnbook.dcal.experiments_study import (
    METHODS,
    RETRIEVAL,
    TRIPLETS,
    accuracies,
    all_batches,
    branch_loss,
    font_split,
    make_model,
    moved,
    ranking,
    run_experiments,
    with_partners,
)
from attnbook.dcal.fonts_study import FONTS, SEEN, UNSEEN, font_data, font_images
from attnbook.dcal.nets import (
    DCAL,
    UncertaintyWeighting,
    batch_hard_triplet,
    dcal,
    dcal_deit_base,
    dcal_deit_small,
    dcal_deit_tiny,
    network_flops,
    weighted_triplet,
)
from attnbook.dcal.op import (
    attention_rollout,
    global_local_attention,
    pair_attention,
    pair_attention_kv,
    pair_lists,
    random_pairs,
    rollout_op,
    select_local_queries,
    share_op,
)
from attnbook.dcal.reference import (
    attention_rollout_matrix,
    maps_of,
    pair_attention_kv_reference,
    pair_attention_reference,
)
from attnbook.dcal.study import PRESETS, RECIPE, TASK, AllBranches, _rows, claims, host_microseconds, rollout_peers
from attnbook.lab.data import Batches, package_dir, skip_without
from attnbook.lab.stats import interval
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
from attnbook.layers import count_parameters


def _pair_inputs(B=3, h=2, n=7, d=8, pair=(1, 2, 0), images=None, **kw):
    "q of B images, k and v of `images`, and partners."
    q, _, _ = make_qkv(B, h, n, d, dtype=kw.get("dtype", torch.float32))
    _, k, v = make_qkv(images or B, h, n, d, seed=1, **kw)
    return q, k, v, torch.tensor(pair, device=q.device)


def test_an_image_paired_with_itself_is_self_attention():
    q, k, v, _ = _pair_inputs(dtype=torch.float64)
    out, lse, share = pair_attention_reference(q, k, v, torch.arange(3, device=q.device))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(share, torch.full_like(share, 0.5))
    torch.testing.assert_close(lse, (q @ k.mT * 8**-0.5).logsumexp(-1) + math.log(2))


def test_a_distractor_that_nobody_answers_changes_nothing():
    q, k1, v1, _ = _pair_inputs(dtype=torch.float64)
    far = -1e4 * q.mean(2, keepdim=True) / q.mean(2, keepdim=True).norm(dim=-1, keepdim=True) ** 2
    q = q.mean(2, keepdim=True).expand_as(q)  # every query the same: the far key has a logit of -1e4 * scale
    out, _, share = pair_attention_kv_reference(q, k1, v1, far, v1[:, :, :1])
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k1, v1))
    assert share.max() == 0


def test_the_order_of_the_sources_does_not_matter():
    q, k1, v1, _ = _pair_inputs(dtype=torch.float64)
    k2, v2 = k1.flip(2)[:, :, :5] * 0.7, v1[:, :, :5] + 1
    a, b = pair_attention_kv_reference(q, k1, v1, k2, v2), pair_attention_kv_reference(q, k2, v2, k1, v1)
    torch.testing.assert_close(a[0], b[0]), torch.testing.assert_close(a[2], 1 - b[2])


def test_the_reference_has_the_right_gradients():
    q, k, v, pair = _pair_inputs(pair=(1, 0, 0))
    check_gradients(lambda q, k, v: pair_attention_reference(q, k, v, pair), (q, k, v))


def test_rollouts_that_are_known():
    L, n = 4, 6
    even = [torch.full((1, n, n), 1 / n, dtype=torch.float64)] * L
    row = attention_rollout_matrix(even)[0, 0]
    assert row[0] == pytest.approx(0.5**L + (1 - 0.5**L) / n) and row[3] == pytest.approx((1 - 0.5**L) / n)
    e0 = torch.eye(n, dtype=torch.float64)[0]
    torch.testing.assert_close(attention_rollout_matrix([torch.eye(n)[None].double()] * L)[0, 0], e0)
    maps = list(torch.rand(L, 1, n, n, dtype=torch.float64).softmax(-1))
    assert rel_error(attention_rollout_matrix(maps), attention_rollout_matrix(maps[::-1])) > 1e-3
    torch.testing.assert_close(attention_rollout_matrix(maps, 1.0)[0, 0], e0)
    torch.testing.assert_close(attention_rollout_matrix(maps, 0.0), maps[3] @ maps[2] @ maps[1] @ maps[0])
    torch.testing.assert_close(attention_rollout_matrix(maps).sum(-1), torch.ones(1, n, dtype=torch.float64))
    heads = torch.rand(2, 1, 3, n, n).softmax(-1)
    torch.testing.assert_close(attention_rollout_matrix(heads), attention_rollout_matrix([h.mean(1) for h in heads]))


def _walk(ints, pair, B):
    "The pairs (query image, query, key image, key, role) that key tiles of width B meet, each by the arithmetic of the hooks."
    nq, nk, images, key_images = ints
    order = sorted(range(images), key=lambda b: pair[b])
    first = [sum(p < j for p in pair) for j in range(key_images + 1)]
    met = []
    for j in range(key_images):
        own = int(j < images)
        roles, whole = own + first[j + 1] - first[j], nq // B
        for i in range(roles * -(-nq // B)):
            left = i >= roles * whole
            role = i - roles * whole if left else i // max(whole, 1)
            image = j if role < own else order[first[j] + role - own]
            step = whole if left else i - role * whole
            rows = [step * B + x for x in range(B) if step * B + x < nq]
            met += [(image, r, j, role >= own) for r in rows]
    return met


@pytest.mark.parametrize("pair, key_images", [((1, 2, 0), 3), ((0, 0, 0), 3), ((1, 1, 2), 3), ((3, 4, 3), 5)], ids=str)
@pytest.mark.parametrize("nq", [1, 4, 7, 8])
def test_every_query_meets_its_keys_once(pair, key_images, nq):
    met = _walk((nq, 5, 3, key_images), pair, 4)
    want = [(b, r, b, False) for b in range(3) for r in range(nq)] + [
        (b, r, pair[b], True) for b in range(3) for r in range(nq)
    ]
    assert sorted(met) == sorted(want)


CASES = {  # B, heads, kv_heads, n, head_dim, v_dim, pair, key images
    "permutation": (3, 1, 1, 7, 16, 16, (1, 2, 0), 3),
    "itself": (1, 1, 1, 33, 8, 8, (0,), 1),
    "one for all": (3, 2, 1, 5, 12, 9, (2, 2, 2), 3),
    "others' images": (2, 1, 1, 32, 16, 16, (3, 2), 4),
    "nobody's partner": (3, 1, 1, 18, 16, 16, (0, 0, 1), 3),
    "one token": (2, 1, 1, 1, 16, 16, (1, 0), 2),
    "boxes of 16 images": (16, 1, 1, 17, 16, 16, tuple(range(15, -1, -1)), 16),
}


@pytest.mark.parametrize("B, h, kv, n, d, dv, pair, images", CASES.values(), ids=CASES)
def test_pair_attention(B, h, kv, n, d, dv, pair, images):
    q, k, v, pair = _pair_inputs(B, h, n, d, pair, images, kv_heads=kv, Dv=dv)
    op = lambda q, k, v: pair_attention(
        q, k, v, pair, scale=0.4, return_lse=True, return_contamination=True, backend="triton"
    )
    reference = lambda q, k, v: pair_attention_reference(q, k, v, pair, scale=0.4)
    check_against_reference(lambda *x: op(*x)[:2], lambda *x: reference(*x)[:2], (q, k, v), tol=2e-5, floor=1e-3)
    share = op(q, k, v)[2]
    assert rel_error(share, reference(q.double(), k.double(), v.double())[2]) < 1e-5 and not share.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pair_attention_in_16_bits(dtype):
    q, k, v, pair = _pair_inputs(2, 2, 21, 16, (1, 0))
    run = lambda f: lambda *x: f(*x)
    check_against_reference(
        run(lambda q, k, v: pair_attention(q, k, v, pair, backend="triton")),
        run(lambda q, k, v: pair_attention_reference(q, k, v, pair)[0]),
        (q, k, v),
        dtype=dtype,
        tol=2e-2,
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_queries_and_keys_of_different_lengths(backend):
    q, _, _ = make_qkv(2, 2, 5, 16)
    _, k, v = make_qkv(3, 2, 37, 16, seed=1)
    pair = torch.tensor([2, 0], device=q.device)
    check_against_reference(
        lambda q, k, v: pair_attention(q, k, v, pair, backend=backend),
        lambda q, k, v: pair_attention_reference(q, k, v, pair)[0],
        (q, k, v),
        tol=2e-5,
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("n2", [1, 20])
def test_pair_attention_with_a_source_of_its_own(n2, backend):
    q, k1, v1 = make_qkv(1, 2, 19, 16, kv_heads=1, Dv=8)
    _, k2, v2 = make_qkv(1, 2, n2, 16, kv_heads=1, Dv=8, seed=3)
    op = lambda *x: pair_attention_kv(*x, return_lse=True, return_contamination=True, backend=backend)
    check_against_reference(
        lambda *x: op(*x)[:2], lambda *x: pair_attention_kv_reference(*x)[:2], (q, k1, v1, k2, v2), tol=2e-5
    )
    wanted = pair_attention_kv_reference(q, k1, v1, k2, v2)[2]
    assert rel_error(op(q, k1, v1, k2, v2)[2], wanted) < 1e-5
    check_against_reference(
        lambda *x: pair_attention_kv(*x, backend=backend),
        lambda *x: pair_attention_kv_reference(*x)[0],
        (q, k1, v1, k2, v2),
        tol=2e-5,
    )


def test_the_gradient_of_an_image_that_nobody_sees_is_its_own():
    "Image 2 is nobody's partner: its dV is that of its own role. With partners (1, 0) both images have two roles."
    q, k, v, pair = _pair_inputs(pair=(1, 0, 0))
    k.requires_grad_(), v.requires_grad_()
    out = pair_attention(q, k, v, pair, backend="triton")
    own = torch.autograd.grad(out[2].sum(), v, retain_graph=True)[0]
    assert own[1].abs().max() == 0 and own[0].abs().max() > 0  # image 2 sees image 0
    both = torch.autograd.grad(out.sum(), v)[0]
    torch.testing.assert_close(both[2], own[2])
    assert rel_error(both[0], own[0]) > 0.1


def test_pairs_manners():
    q, k, v, pair = _pair_inputs(2, 1, 9, 16, (1, 0))
    op = lambda q, k, v: pair_attention(q, k, v, pair, return_lse=True, backend="triton")
    check_strides(op, (q, k, v), tol=2e-5)
    check_deterministic(op, (q, k, v), repeats=2)
    check_writes_everything(op, (q, k, v))
    check_compiles(op, (q, k, v), tol=2e-5)
    check_autocast(op, (q, k, v), tol=3e-2)


def test_sweeps_as_operations_of_the_library():
    q, k, _, pair = _pair_inputs(2, 2, 9, 16, (1, 0))
    lse = torch.zeros(2, 2, 9, device=q.device)
    check_opcheck(share_op, (q, k, lse, pair.int(), 0.25))
    check_opcheck(rollout_op, (q, k, lse, torch.rand(2, 9, device=q.device), 9, 0.25))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_images_and_no_keys(backend):
    q, k, v, pair = _pair_inputs(2, 2, 5, 8, (1, 0))
    assert pair_attention(q[:0], k[:0], v[:0], pair[:0], backend=backend).shape == (0, 2, 5, 8)
    out, lse = pair_attention(q.requires_grad_(), k[:, :, :0], v[:, :, :0], pair, return_lse=True, backend=backend)
    assert out.abs().max() == 0 and (lse == -math.inf).all()
    out.sum().backward()
    assert q.grad.abs().max() == 0


@pytest.mark.parametrize("factor", [0.0, 1e4])
def test_extreme_logits_of_pairs(factor):
    q, k, v, pair = _pair_inputs(2, 1, 9, 16, (1, 0))
    x = [t.requires_grad_() for t in (q * factor, k, v)]
    out, share = pair_attention(*x, pair, return_contamination=True, backend="triton")
    want = pair_attention_reference(*(t.detach().double() for t in x), pair)
    assert rel_error(out, want[0]) < 1e-4 and rel_error(share, want[2], floor=1.0) < 5e-3
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.pow(2).sum(), x))


def test_lists_are_made_once():
    q, k, v, pair = _pair_inputs(pair=(1, 1, 0))
    lists = pair_lists(pair)
    assert lists.order.tolist() == [2, 0, 1] and lists.first.tolist() == [0, 1, 3, 3]
    for backend in ("triton", "torch"):
        a, b = (pair_attention(q, k, v, p, backend=backend) for p in (pair, lists))
        assert torch.equal(a, b)


def test_what_pairs_refuse():
    q, k, v, pair = _pair_inputs()
    check_raises(
        pair_attention,
        [
            (dict(pair=pair[:2]), ValueError, ["pair", "(3,)", "(2,)"]),
            (dict(pair=torch.tensor([0, 1, 3])), ValueError, ["pair", "0 to 2", "not 3"]),
            (dict(pair=torch.tensor([0, -1, 1])), ValueError, ["pair", "not -1"]),
            (dict(pair=pair.float()), TypeError, ["pair", "float32"]),
            (dict(pair=pair_lists(torch.tensor([1, 2, 0]), 4)), ValueError, ["pair", "3 images", "4"]),
            (dict(k=k[:2], v=v[:2]), ValueError, ["k", "3 images", "2"]),
            (dict(v=v[:2]), ValueError, ["v", "3 images"]),
            (dict(v=v.double()), TypeError, ["v", "float64"]),
            (dict(scale="x"), TypeError, ["scale"]),
            (dict(backend="cuda"), ValueError, ["backend"]),
        ],
        q=q,
        k=k,
        v=v,
        pair=pair,
    )
    check_raises(
        pair_attention_kv,
        [
            (dict(k2=k[..., :4]), ValueError, ["k2", "(3, 2, n2, 8)"]),
            (dict(v2=v[:, :, :3]), ValueError, ["v2", "(3, 2, 7, 8)"]),
        ],
        q=q,
        k1=k,
        v1=v,
        k2=k,
        v2=v,
    )


def test_random_partners():
    g = lambda: torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    assert sorted(random_pairs(6, generator=g()).tolist()) == list(range(6))
    assert torch.equal(random_pairs(6, generator=g()), random_pairs(6, generator=g()))
    assert random_pairs(labels, "identity").tolist() == list(range(6))
    for _ in range(5):
        inter, intra = random_pairs(labels, "inter"), random_pairs(labels, "intra")
        assert (labels[inter] != labels).all() and (labels[intra] == labels).all()
        assert intra[5] == 5 and (intra[:5] != torch.arange(5)).all()  # the only one of its class has itself
    assert random_pairs(torch.zeros(2).long(), "inter").tolist() == [0, 1] and len(random_pairs(0)) == 0
    check_raises(
        random_pairs,
        [(dict(kind="noise"), ValueError, ["kind", "noise"]), (dict(kind="inter"), ValueError, ["labels", "inter"])],
        batch=3,
        kind="random",
    )


def _layers(L=3, B=2, h=2, n=19, d=16, kv=None, dtype=torch.float32):
    made = [make_qkv(B, h, n, d, kv_heads=kv, dtype=dtype, seed=s) for s in range(L)]
    return [q * 2 for q, _, _ in made], [k for _, k, _ in made]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("n, kv, residual", [(19, 2, 0.5), (33, 1, 0.5), (2, 2, 0.0), (17, 2, 0.9)], ids=str)
def test_rollout_is_a_row_of_the_product(n, kv, residual, backend):
    queries, keys = _layers(2 if n == 33 else 3, 1 if n > 20 else 2, n=n, kv=kv)
    maps = maps_of([q.double() for q in queries], [k.double() for k in keys])
    want = attention_rollout_matrix(maps, residual)[:, 0]
    lse = [torch.logsumexp(q @ k.repeat_interleave(2 // kv, 1).mT / 4, -1) for q, k in zip(queries, keys)]
    for known in (None, lse, [lse[0], *[None] * (len(lse) - 1)]):
        got = attention_rollout(queries, keys, lse=known, residual=residual, backend=backend)
        assert rel_error(got, want) < 1e-5 and got.dtype == torch.float32
    torch.testing.assert_close(got.sum(1), torch.ones_like(got[:, 0]))
    assert rel_error(attention_rollout(queries[::-1], keys[::-1], residual=residual, backend=backend), want) > 1e-3


def test_rollout_in_16_bits_chooses_tokens_of_the_same_weight():
    "Near-ties may fall the other way: what counts is the weight that the chosen have."
    queries, keys = _layers(2, 1, n=65, dtype=torch.bfloat16)
    exact = attention_rollout_matrix(maps_of([q.double() for q in queries], [k.double() for k in keys]))[:, 0]
    chosen = select_local_queries(attention_rollout(queries, keys, backend="triton"), 0.2, include_cls=False)
    best = exact[:, 1:].sort(1, descending=True).values[:, :12].sum(1)
    torch.testing.assert_close(exact.gather(1, chosen).sum(1), best, rtol=1e-2, atol=0)


def test_rollout_needs_no_matrix(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.numbers = max(self.numbers, out.numel())
            return out

    queries, keys = _layers(B=1, h=1, n=785, d=4)
    monkeypatch.setitem(attention_rollout.__wrapped__.__globals__, "BLOCK_NUMBERS", 2**15)
    with Largest() as rows:
        got = attention_rollout(queries, keys, backend="torch")
    with Largest() as whole:
        want = attention_rollout_matrix(maps_of(queries, keys))[:, 0]
    assert rows.numbers < 0.1 * 785**2 and whole.numbers >= 785**2 and rel_error(got, want) < 1e-4


def test_rollout_has_no_gradient():
    queries, keys = _layers()
    for t in queries + keys:
        t.requires_grad_()
    assert not attention_rollout(queries, keys, backend="triton").requires_grad


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_selection(backend):
    r = torch.rand(2, 91, generator=torch.Generator().manual_seed(0)).to(device_under_test())
    at = select_local_queries(r, 0.1, backend=backend)
    assert at.shape == (2, 10) and at.dtype == torch.int64 and (at[:, 0] == 0).all()
    assert (at.diff(dim=1) > 0).all()  # different, in order
    rest = torch.ones_like(r, dtype=torch.bool).scatter_(1, at, False)
    assert (r.masked_fill(~rest, -1).amax(1) <= r.gather(1, at[:, 1:]).amin(1)).all()
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1)).to(r.device)
    moved = select_local_queries(torch.cat([r[:, :1], r[:, 1:][:, order]], 1), 0.1, include_cls=False, backend=backend)
    assert torch.equal(order[moved - 1].sort(1).values + 1, at[:, 1:])
    assert select_local_queries(r[:, :3], 0.01, backend=backend).shape == (2, 2)
    assert select_local_queries(r[:, :11], 0.3, backend=backend).shape == (2, 4)  # 0.3 * 10 is 3


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_global_local_attention(backend):
    q, k, v = make_qkv(2, 2, 19, 16, kv_heads=1)
    index = torch.tensor([[0, 3, 18], [0, 1, 2]], device=q.device)
    want = lambda q, k, v: torch.stack([pair_full(q, k, v)[b, :, i] for b, i in enumerate(index)])
    pair_full = lambda q, k, v: F.scaled_dot_product_attention(q, *(t.repeat_interleave(2, 1) for t in (k, v)))
    op = lambda q, k, v: global_local_attention(q, k, v, index, backend=backend)
    check_against_reference(op, want, (q, k, v), tol=2e-5)
    every = torch.arange(19, device=q.device).expand(2, -1)
    torch.testing.assert_close(
        global_local_attention(q, k, v, every, backend=backend), pair_full(q, k, v), atol=1e-5, rtol=1e-4
    )
    q.requires_grad_(), k.requires_grad_()
    op(q, k, v).pow(2).sum().backward()
    rows = q.grad.abs().amax((1, 3)) > 0
    assert [r.nonzero()[:, 0].tolist() for r in rows] == index.tolist() and (k.grad.abs().amax(-1) > 0).all()


def test_what_rollout_selection_and_local_queries_refuse():
    queries, keys = _layers(2)
    check_raises(
        attention_rollout,
        [
            (dict(keys=keys[:1]), ValueError, ["lists of one length", "2, 1"]),
            (dict(queries=[], keys=[]), ValueError, ["at least 1"]),
            (dict(lse=[None]), ValueError, ["lse", "1"]),
            (dict(keys=[keys[0], keys[1][:, :, :5]]), ValueError, ["keys[1]", "19"]),
            (dict(residual=1.5), ValueError, ["residual", "1.5"]),
            (dict(lse=[None, torch.zeros(2, 2, 5)]), ValueError, ["lse[1]"]),
        ],
        queries=queries,
        keys=keys,
    )
    check_raises(
        select_local_queries,
        [
            (dict(ratio=0.0), ValueError, ["ratio", "0"]),
            (dict(ratio=1.1), ValueError, ["ratio", "1.1"]),
            (dict(rollout=torch.rand(2, 1)), ValueError, ["rollout", "patch"]),
        ],
        rollout=torch.rand(2, 5),
        ratio=0.5,
    )
    q, k, v = make_qkv(2, 2, 7, 8)
    check_raises(
        global_local_attention,
        [
            (dict(index=torch.tensor([[0, 7], [0, 1]])), ValueError, ["index", "0 to 6", "not 7"]),
            (dict(index=torch.tensor([[0, 0], [0, 1]])), ValueError, ["index", "twice"]),
            (dict(index=torch.zeros(1, 2).long()), ValueError, ["index", "(2, R)"]),
            (dict(index=torch.zeros(2, 2)), TypeError, ["index", "float32"]),
        ],
        q=q.cpu(),
        k=k.cpu(),
        v=v.cpu(),
        index=torch.tensor([[0, 3], [0, 1]]),
    )


def test_uncertainty_weighting():
    losses = torch.tensor([2.0, 0.5, 3.0])
    weigh = UncertaintyWeighting(3)
    assert float(weigh(losses.unbind()).detach()) == pytest.approx(5.5 / 2)
    with torch.no_grad():
        weigh.log_scales.copy_(torch.tensor([0.3, -1.0, 2.0]))
    w = weigh.log_scales.detach()
    total = weigh(losses.unbind())
    assert float(total.detach()) == pytest.approx(float(0.5 * ((-w).exp() * losses + w).sum()))
    (slope,) = torch.autograd.grad(total, weigh.log_scales)
    torch.testing.assert_close(slope, 0.5 * (1 - (-w).exp() * losses))
    with torch.no_grad():
        weigh.log_scales.copy_(losses.log())
    assert torch.autograd.grad(weigh(losses.unbind()), weigh.log_scales)[0].abs().max() < 1e-6
    assert float(weigh([None, losses[1], None]).detach()) == pytest.approx(float(0.5 * (1 + losses[1].log())))
    check_raises(
        weigh,
        [(dict(losses=[losses[0]]), ValueError, ["losses", "3", "1"]), (dict(losses=[None] * 3), ValueError, ["None"])],
        losses=losses.unbind(),
    )
    with pytest.raises(ValueError, match="num_tasks"):
        UncertaintyWeighting(0)


def test_triplets_are_the_hardest():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [0.0, 7.0]])
    labels = torch.tensor([0, 0, 0, 1])
    # distances: 0-1 5, 0-2 1, 1-2 sqrt(18), to the other class: 7, sqrt(18), 6; image 3 has no positive
    want = (max(0, 5 - 7 + 0.3) + (5 - 18**0.5 + 0.3) + max(0, 18**0.5 - 6 + 0.3)) / 3
    assert float(batch_hard_triplet(x, labels)) == pytest.approx(want)
    assert batch_hard_triplet(x, torch.zeros(4).long()) == 0 and batch_hard_triplet(x, torch.arange(4)) == 0
    same = torch.zeros(4, 2, requires_grad=True)
    batch_hard_triplet(same, torch.tensor([0, 0, 1, 1])).backward()
    assert same.grad.isfinite().all()


def test_weighted_triplets():
    torch.manual_seed(0)
    x, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    u, want = F.normalize(x, dim=-1).double(), []
    for i in range(5):  # image 5 has no positive
        d = (u - u[i]).norm(dim=-1)
        p = torch.tensor([j for j in range(6) if labels[j] == labels[i] and j != i])
        n = torch.tensor([j for j in range(6) if labels[j] != labels[i]])
        gap = (d[p].softmax(0) * d[p]).sum() - ((-d[n]).softmax(0) * d[n]).sum()
        want.append(float(gap.exp().log1p()))
    assert float(weighted_triplet(x, labels)) == pytest.approx(np.mean(want), rel=1e-5)
    assert float(weighted_triplet(7 * x, labels)) == pytest.approx(np.mean(want), rel=1e-5)  # lengths do not count
    assert weighted_triplet(x, torch.zeros(6).long()) == 0 and weighted_triplet(x, torch.arange(6)) == 0
    same = torch.zeros(4, 2, requires_grad=True)
    weighted_triplet(same, torch.tensor([0, 0, 1, 1])).backward()
    assert same.grad.isfinite().all()
    bad = [(dict(labels=labels.float()), TypeError, "labels"), (dict(features=x[0]), ValueError, "features")]
    check_raises(weighted_triplet, bad, features=x, labels=labels)


def _crowd(n, generator, noise=2.0):
    "Six classes whose images differ more than the classes do: `(n, 16)`, `(n,)`."
    centres = torch.randn(6, 16, generator=torch.Generator().manual_seed(5))
    y = torch.randint(6, (n,), generator=generator)
    return centres[y] + noise * torch.randn(n, 16, generator=generator), y


def test_only_the_hardest_pull_a_crowd_together():
    "Near the place where all features are one: the spread shrinks by the hardest triplets and grows by the weighted ones."
    x, y = _crowd(96, torch.Generator().manual_seed(0))
    one = 4 * torch.randn(16, generator=torch.Generator().manual_seed(1))
    slope = {}
    for loss in (batch_hard_triplet, weighted_triplet):
        spread = torch.tensor(0.05, requires_grad=True)
        loss(one + spread * x, y).backward()
        slope[loss] = float(spread.grad)
    assert slope[batch_hard_triplet] > 1 and slope[weighted_triplet] < -1e-3


@pytest.mark.parametrize("loss", [batch_hard_triplet, weighted_triplet], ids=["hardest", "weighted"])
def test_training_with_triplets_alone(loss):
    "A small network on noisy classes: the hardest triplets end where all features are parallel, the weighted ones do not."
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(160):
        x, y = _crowd(48, g)
        optimizer.zero_grad(), loss(net(x), y).backward(), optimizer.step()
    x, y = _crowd(300, g)
    with torch.no_grad():
        unit = F.normalize(net(x), dim=-1)
    found = ranking_of(unit, y)
    alike = float((unit @ unit.T).mean())
    assert (alike > 0.99 and found < 0.55) if loss is batch_hard_triplet else (alike < 0.3 and found > 0.6)


def ranking_of(unit, y):
    "Share of images whose nearest is of their class."
    return float((y[(unit @ unit.T).fill_diagonal_(-9).argmax(1)] == y).double().mean())


def test_published_parameters():
    parameters = lambda **kw: count_parameters(lambda: dcal_deit_tiny(**kw))
    assert parameters(glca=False) == 5_675_912 + 3 and parameters() == 5_675_912 + 483_848 + 3
    assert parameters(pair_depth=0, distractor="sa") == parameters()  # PWCA has none
    assert count_parameters(dcal_deit_small) == 23_820_691 and count_parameters(dcal_deit_base) == 93_647_251
    with pytest.raises(ValueError, match="variant must be one of"):
        dcal("large")


def test_operations_by_hand_and_by_torchs_counter():
    from torch.utils.flop_counter import FlopCounterMode

    model = DCAL(32, 8, 3, 5, dim=24, depth=2, num_heads=3, local_ratio=0.25, backend="torch").eval()
    index = torch.tensor([[0, 1, 2, 5, 9]])
    with FlopCounterMode(display=False) as block, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.glca(torch.randn(1, 17, 24), index)
    assert block.get_total_flops() == 2 * network_flops(24, 2, 16, 4)
    with (
        FlopCounterMode(display=False) as all_of_it,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model.backbone.forward_features(torch.randn(1, 3, 32, 32))
    assert all_of_it.get_total_flops() == 2 * network_flops(24, 2, 16, patch_numbers=3 * 64)
    assert network_flops(192, 12, 784, 78) / network_flops(192, 12, 784) == pytest.approx(0.0155, abs=2e-3)


def _model(seed=0, **kw):
    "A small model with all parameters random."
    torch.manual_seed(seed)
    model = DCAL(
        **dict(img_size=16, patch_size=4, in_channels=1, num_classes=5, dim=24, depth=3, num_heads=3, local_ratio=0.2)
        | kw
    )
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.0 if "log_scales" in name else 0.2)
    g = torch.Generator().manual_seed(seed)
    return model.to(device_under_test()), torch.randn(3, 1, 16, 16, generator=g).to(device_under_test())


def _plainly(model, images, pair):
    "Logits of SA, GLCA and PWCA, the chosen tokens and contaminations, by matrices, one image at a time."
    vit = model.backbone
    sa, _ = vit.embed(images)
    pw, maps, shares = sa, [], []
    for i, block in enumerate(vit.blocks):
        before = sa
        (q, k, v), (q2, k2, v2) = (block.attn.project(block.norm1(x)) for x in (sa, pw))
        maps.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
        others = (k2, v2) if model.distractor == "pair" else (k, v)
        new = []
        for b in range(len(images)):
            keys, values = (torch.cat([own[b], other[pair[b]]], 1) for own, other in zip((k2, v2), others))
            P = (q2[b] @ keys.mT * q.shape[-1] ** -0.5).softmax(-1)
            if i >= model.pair_depth:
                P, values = (q2[b] @ k2[b].mT * q.shape[-1] ** -0.5).softmax(-1), v2[b]
            else:
                shares.append(P[..., 17:].sum(-1).mean(-1))
            new.append(P @ values)
        sa = block.finish(sa, block.attn.merge(maps[-1] @ v))
        pw = block.finish(pw, block.attn.merge(torch.stack(new)))
    row = attention_rollout_matrix(maps)[:, 0] if model.select == "rollout" else maps[-1].mean(1)[:, 0]
    index = torch.cat([torch.zeros(3, 1).long().to(row.device), row[:, 1:].topk(3, 1).indices.sort(1).values + 1], 1)
    logits = dict(sa=vit.head(vit.norm(sa)[:, 0]), pwca=vit.head(vit.norm(pw)[:, 0]))
    read, block = sa if model.glca_input == "last" else before, model.glca
    full = block.finish(read, block.attn(block.norm1(read)))  # every token, of which the chosen ones are kept
    full = model.glca_norm(torch.stack([full[b, i] for b, i in enumerate(index)]))
    logits["glca"] = model.glca_head(full.mean(1) if model.glca_pool == "mean" else full[:, 0])
    return logits, index, torch.stack(shares).unflatten(0, (-1, 3)).transpose(0, 1)


FORMS = {
    "default": {},
    "undisturbed partner": dict(distractor="sa"),
    "first block only": dict(pair_depth=1),
    "beside the last block": dict(glca_input="penultimate"),
    "class token": dict(glca_pool="class"),
    "last layer's attention": dict(select="last"),
}


@pytest.mark.parametrize(
    "form, backend", [(f, "torch") for f in FORMS] + [("default", "triton"), ("undisturbed partner", "triton")]
)
def test_the_model_by_matrices(form, backend):
    small = dict(depth=1, dim=16, num_heads=1) if backend == "triton" else {}  # the interpreter is slow
    model, x = _model(backend=backend, **small, **FORMS[form])
    pair = torch.tensor([1, 1, 0])
    want, index, shares = _plainly(model, x, pair)
    got = model.train()(x, pair)
    assert list(got) == ["sa", "glca", "pwca"]
    for name in got:
        torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.equal(model.local_tokens(x), index)
    torch.testing.assert_close(model.contamination(x, pair), shares, atol=1e-4, rtol=1e-3)


def test_evaluation_is_free_of_the_second_stream():
    model, x = _model()
    alone = model.train()(x)
    with_pair = model(x, torch.tensor([1, 2, 0]))
    torch.testing.assert_close(with_pair["sa"], alone["sa"], atol=1e-5, rtol=1e-4)
    model.eval()
    assert list(model(x, torch.tensor([1, 2, 0]))) == ["sa", "glca"]
    torch.testing.assert_close(model(x)["sa"], model.backbone(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.predict(x).sum(1), torch.ones(3, device=x.device))
    torch.testing.assert_close(_model(glca=False)[0].eval().predict(x).sum(1), torch.ones(3, device=x.device))
    assert model.embed(x).shape == (3, 48) and _model(glca=False)[0].eval().embed(x).shape == (3, 24)
    torch.testing.assert_close(model.predict(x), sum(t.softmax(-1) for t in model(x).values()) / 2)


def test_an_image_disturbed_by_itself_is_not_disturbed():
    "The control of the experiments. Noise and another image do disturb."
    model, x = _model()
    model.train()
    out = model(x, torch.arange(3))
    torch.testing.assert_close(out["pwca"], out["sa"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        model.contamination(x, torch.arange(3)), torch.full((3, 3, 3), 0.5, device=x.device), atol=1e-5, rtol=0
    )
    assert rel_error(model(x, torch.tensor([1, 2, 0]))["pwca"], out["sa"]) > 1e-2
    model.distractor = "noise"
    torch.manual_seed(0)
    a = model(x, torch.arange(3))["pwca"]
    assert rel_error(a, out["sa"]) > 1e-2 and rel_error(model(x, torch.arange(3))["pwca"], a) > 1e-3


def test_the_choice_reaches_the_prediction_only_by_the_mean():
    seen = {}
    for pool in ("class", "mean"):
        for select in ("rollout", "last", "class"):
            model, x = _model(glca_pool=pool, select=select, local_ratio=0.1)
            seen[pool, select] = model.eval()(x)["glca"]
    for select in ("last", "class"):
        torch.testing.assert_close(seen["class", select], seen["class", "rollout"], atol=1e-5, rtol=1e-4)
    assert rel_error(seen["mean", "class"], seen["mean", "rollout"]) > 1e-2
    torch.testing.assert_close(seen["mean", "class"], seen["class", "class"], atol=1e-5, rtol=1e-4)


def test_local_keys_are_local():
    model, x = _model(local_keys=True, glca_pool="class")
    wide = _model(glca_pool="class")[0]
    assert rel_error(model.eval()(x)["glca"], wide.eval()(x)["glca"]) > 1e-2
    index = model.local_tokens(x)
    tokens = torch.randn(3, 17, 24, device=x.device)
    sub = tokens.gather(1, index[..., None].expand(-1, -1, 24))
    every = torch.arange(index.shape[1], device=x.device).expand(3, -1)
    torch.testing.assert_close(model.glca(tokens, index), model.glca(sub, every), atol=1e-5, rtol=1e-4)


def test_gradients_go_where_they_should():
    model, x = _model()
    model.train()
    out = model(x, torch.tensor([1, 2, 0]))
    used = lambda name: {
        n
        for n, p in model.named_parameters()
        if torch.autograd.grad(out[name].sum(), p, retain_graph=True, allow_unused=True)[0] is not None
    }
    assert not any(n.startswith("glca") for n in used("sa") | used("pwca")) and used("sa") == used("pwca")
    assert "backbone.head.weight" not in used("glca") and "glca_head.weight" in used("glca")
    assert "backbone.blocks.0.attn.qkv.weight" in used("glca")
    labels = torch.tensor([0, 1, 2], device=x.device)
    model.loss(out, labels).backward()
    assert all(p.grad is not None for p in model.parameters())
    each = {n: F.cross_entropy(t, labels) for n, t in out.items()}
    assert float(model.loss(out, labels)) == pytest.approx(float(sum(each.values())) / 2, rel=1e-4)
    assert float(model.loss(dict(sa=out["sa"]), labels)) == pytest.approx(float(each["sa"]))
    two = model.loss(dict(sa=out["sa"], pwca=out["pwca"]), labels)
    assert float(two) == pytest.approx(float(each["sa"] + each["pwca"]) / 2)
    with torch.no_grad():
        model.weighting.log_scales.copy_(torch.tensor([0.5, -0.5, 1.0]))
    w = dict(zip(("sa", "glca", "pwca"), model.weighting.log_scales.tolist()))  # each branch has its own scale
    want = 0.5 * sum(math.exp(-w[n]) * float(t) + w[n] for n, t in each.items())
    assert float(model.loss(out, labels)) == pytest.approx(want, rel=1e-4)


def test_random_selection_is_random_and_class_alone():
    model, x = _model(select="random", local_ratio=0.5)
    a, b = model.local_tokens(x), model.local_tokens(x)
    assert a.shape == (3, 9) and not torch.equal(a, b) and (a[:, 0] == 0).all()
    assert _model(select="class")[0].local_tokens(x).tolist() == [[0]] * 3


def test_models_are_good_citizens(tmp_path):
    import copy
    import pickle

    model, x = _model()
    model.eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x)["glca"], model(x)["glca"])
    again = _model(seed=1)[0].eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x)["glca"], model(x)["glca"])
    assert "weighting.log_scales" in dict(model.named_parameters()) and "log_scales" in model.no_weight_decay()
    assert model.double()(x.double())["glca"].dtype == torch.float64
    assert _model(num_classes=0)[0].eval()(x)["glca"].shape == (3, 24)


def test_what_the_model_refuses():
    check_raises(
        lambda **kw: _model(**kw),
        [
            (dict(local_ratio=0), ValueError, ["local_ratio", "0"]),
            (dict(glca_input="first"), ValueError, ["glca_input", "first"]),
            (dict(glca_pool="max"), ValueError, ["glca_pool", "max"]),
            (dict(select="best"), ValueError, ["select", "best"]),
            (dict(distractor="coco"), ValueError, ["distractor", "coco"]),
            (dict(pair_depth=4), ValueError, ["pair_depth", "3", "4"]),
            (dict(attn_drop=0.1), ValueError, ["attn_drop"]),
            (dict(global_pool="avg"), ValueError, ["global_pool"]),
            (dict(backend="cuda"), ValueError, ["backend", "cuda"]),
        ],
        seed=0,
    )
    model, x = _model()
    for distractor in ("pair", "sa"):
        model.distractor = distractor
        check_raises(
            model.train(),
            [
                (dict(pair=torch.tensor([0, 1])), ValueError, ["pair", "(3,)"]),
                (dict(pair=torch.tensor([0, 1, 3])), ValueError, ["pair", "0 to 2", "3"]),
                (dict(pair=torch.zeros(3)), TypeError, ["pair", "float32"]),
            ],
            images=x,
            pair=torch.tensor([0, 1, 2]),
        )
    with pytest.raises(ValueError, match="glca must be True"):
        _model(glca=False)[0].local_tokens(x)


def test_fonts_are_different_and_letters_too():
    skip_without("matplotlib", "PIL")
    assert len(set(FONTS)) == 21 and not set(SEEN) & set(UNSEEN) and len(SEEN + UNSEEN) == 52
    x, y = font_images(2, 16)
    assert x.shape == (42, 16, 16) and x.dtype == np.uint8 and np.bincount(y).tolist() == [2] * 21
    again, other = font_images(2, 16), font_images(2, 16, "unseen")
    assert (again[0] == x).all() and (other[0] != x).any()
    assert font_images(1, 16, "seen", (3, 5))[1].tolist() == [0, 1]
    with pytest.raises(ValueError, match="letters"):
        font_images(1, 16, "greek")
    from PIL import Image, ImageDraw, ImageFont

    drawn = []  # the same letters in every font, without jitter: no font falls back to another's shapes
    for name in FONTS:
        canvas = Image.new("L", (120, 40), 0)
        face = ImageFont.truetype(str(package_dir("matplotlib") / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf"), 24)
        ImageDraw.Draw(canvas).text((2, 2), "agQR", font=face, fill=255)
        drawn.append(np.asarray(canvas, np.float32))
    far = [np.abs(a - b).mean() for i, a in enumerate(drawn) for b in drawn[:i]]
    assert min(far) > 2 and all(10 < a.mean() < 120 for a in drawn)


def test_data_do_not_overlap():
    skip_without("matplotlib", "PIL")
    data = font_data(dict(train=2, test=2, size=16), 0)
    assert [len(x) for x, _ in data.values()] == [42, 21, 42]
    assert data["train"][0].std() == pytest.approx(1, abs=0.02) and data["train"][0].shape[1:] == (1, 16, 16)
    flat = [{tuple(p.flatten().tolist()) for p in x} for x, _ in data.values()]
    assert not flat[0] & flat[1] and not flat[0] & flat[2]
    again, other = font_data(dict(train=2, test=2, size=16), 0), font_data(dict(train=2, test=2, size=16), 1)
    assert torch.equal(again["train"][0], data["train"][0]) and not torch.equal(other["train"][0], data["train"][0])


def _tiny(**kw):
    return PRESETS["smoke"] | kw


def test_methods_are_what_they_say():
    cfg = _tiny()
    make = lambda method: make_model(cfg, 21, **{m: h for g in METHODS.values() for m, h in g.items()}[method][0])
    assert make("SA").glca is None and make("SA+GLCA").select == "rollout" and make("last layer").select == "last"
    assert make("random queries").select == "random" and make("class token").select == "class"
    assert make("local keys").glca.local_keys and make("class readout").glca_pool == "class"
    assert make("noise").distractor == "noise" and make("undisturbed partner").distractor == "sa"
    a, b = count_parameters(make("SA+GLCA")), count_parameters(make("SA, one block more"))
    assert 0 < a - b == 2 * 16 + 16 * 21 + 21  # GLCA's own norm and classifier
    partners = {m: p for g in METHODS.values() for m, (_, p) in g.items()}
    assert partners["SA+PWCA"] == partners["all"] == partners["noise"] == "random" and partners["itself"] == "identity"
    assert partners["other class"] == "inter" and partners["same class"] == "intra" and partners["SA"] is None


def test_partners_come_with_the_batch():
    x, y = torch.arange(8.0)[:, None, None, None].expand(-1, 1, 4, 4), torch.arange(8) // 2
    batch = Batches(x, y, batch_size=8, seed=1, transform=with_partners("intra"))(0)
    assert len(batch) == 4 and (batch[1][batch[3]] == batch[1]).all()
    assert len(Batches(x, y, batch_size=8, transform=with_partners(None))(0)) == 3


def test_pictures_are_moved():
    x = torch.zeros(3, 1, 32, 32)
    x[:, :, 10, 20] = 1
    by = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -0.5, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    y = moved(x, by)
    assert torch.equal(y[0], x[0]) and (y[1] == 1).nonzero()[:, 1:].tolist() == [[12, 19]]
    torch.testing.assert_close(y[2], 1.3 * x[2] - 0.3)
    edge = torch.arange(32.0).expand(1, 1, 32, 32)
    assert moved(edge, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))[0, 0, 0, :4].tolist() == [0, 0, 0, 1]
    take = with_partners("random")(x, torch.arange(3), generator=torch.Generator().manual_seed(0))
    assert take[2].shape == (3, 4) and take[2].abs().max() <= 1 and take[2].min() < 0 and take[2].unique().numel() == 12


def test_accuracies_are_counted():
    class Fixed(nn.Module):
        def forward(self, x):
            return dict(sa=torch.eye(3)[[0, 1, 1]] * 5, glca=torch.eye(3)[[0, 2, 2]] * 9)

    found = accuracies(Fixed(), torch.zeros(3, 1), torch.tensor([0, 1, 2]), "cpu")
    assert found["sa"] == pytest.approx(200 / 3) and found["glca"] == pytest.approx(200 / 3)
    assert found["both"] == pytest.approx(200 / 3)
    each = F.cross_entropy(torch.eye(3)[[0, 1, 1]] * 5, torch.tensor([0, 1, 2]))
    assert found["loss"] == pytest.approx(float(each))


def test_rankings_by_hand():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.7, 0.75]])
    labels = torch.tensor([0, 0, 1, 1, 0])
    found = ranking(x, labels)
    # image 4 finds 3, 1, 2, 0 in this order; images 0 and 1 find each other first and then image 4
    per_image = [1.0, 1.0, 1.0, 1.0, (1 / 2 + 2 / 4) / 2]
    assert found["map"] == pytest.approx(100 * np.mean(per_image)) and found["rank1"] == pytest.approx(80)
    assert ranking(x, torch.tensor([0, 0, 1, 1, 2]))["rank1"] == pytest.approx(100)  # nobody asks for image 4


def test_fonts_are_split():
    known, unknown = font_split(3)
    assert len(known) == 14 and len(unknown) == 7 and sorted(known + unknown) == list(range(21))
    assert font_split(3) == font_split(3) != font_split(4)


def test_losses_of_experiments():
    model, x = _model()
    y, pair = torch.tensor([0, 0, 1], device=x.device), torch.tensor([1, 2, 0])
    model.train()
    features = model.forward_features(x, pair)
    out = model.classify(features)
    still = torch.zeros(3, 4, device=x.device)
    torch.testing.assert_close(branch_loss()(model, x, y, still, pair), model.loss(out, y))
    for name, triplet in TRIPLETS.items():
        want = sum(F.cross_entropy(out[n], y) + triplet(features[n], y) for n in out) / 2
        torch.testing.assert_close(branch_loss(name)(model, x, y, still, pair), want)


def test_batches_are_made_ahead():
    cfg, y = dict(batch=5, steps=7), torch.arange(12) % 3
    rows, by, pair = all_batches(cfg, y, "intra", 3)
    assert rows.shape == pair.shape == (7, 5) and by.shape == (7, 5, 4) and by.abs().max() <= 1
    assert len(set(rows[:2].flatten().tolist())) == 10  # no picture twice in an epoch
    for i, p in zip(rows, pair):
        alone = [(y[i] == y[j]).sum() == 1 for j in i]
        assert all(y[i[j]] == y[i[p[j]]] and (p[j] != j or alone[j]) for j in range(5))
    assert len(all_batches(cfg, y, None, 3)) == 2 and torch.equal(all_batches(cfg, y, None, 3)[0], rows)


def test_it_runs_and_records(tmp_path, monkeypatch):
    skip_without("matplotlib", "PIL")
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
    monkeypatch.setitem(run_experiments.__globals__, "PRESETS", dict(smoke=_tiny(seeds=1, steps=1)))
    rows = run_experiments("smoke", device_under_test(), only=("distractors", "retrieval"), show=lambda s: None)
    assert [r["method"] for r in rows] == [*METHODS["distractors"], *RETRIEVAL] and rows[0]["recipe"] == RECIPE
    assert len({r["map"] for r in rows[4:]}) > 2 and all(-1 <= r["cosine"] <= 1 for r in rows[4:])
    assert all(r["gap"] == pytest.approx(r["train"] - r["sa"], abs=1e-2) for r in rows[:4]) and rows[0]["task"] == TASK
    assert all(0 <= r["sa"] <= 100 and len(r["contamination"]) == 2 for r in rows[:4]) and rows[-1]["map"] > 0
    assert run_experiments("smoke", device_under_test(), limit_s=-1, show=lambda s: None) == []
    with pytest.raises(ValueError, match="only must be one of"):
        run_experiments("smoke", only="birds")


def test_peers_of_the_rollout_agree():
    queries, keys = (torch.stack(t) for t in _layers(n=19))
    lse = torch.logsumexp(queries @ keys.mT / 4, -1)
    found = {m: f(queries, keys, lse) for m, f in rollout_peers().items()}
    for m in found:
        assert rel_error(found[m], found["ours"]) < 1e-5, m


def test_host_time_is_the_time_of_the_call():
    took = host_microseconds(lambda: time.sleep(2e-3), repeats=5)
    assert 2000 <= took < 100_000 and host_microseconds(lambda: None, repeats=5) < took


def test_all_branches():
    model, x = _model()
    pair = torch.tensor([1, 2, 0])
    torch.testing.assert_close(AllBranches(model, pair).train()(x), sum(model(x, pair).values()))


AHEAD = [
    c.statement
    for c in claims()
    if c.statement.startswith(
        (
            "Global-local",
            "Pair-wise",
            "Both",
            "The gain",
            "Queries",
            "Global keys",
            "A random",
            "In retrieval",
            "Features",
        )
    )
]
OTHER = {  # claim -> measured, verdict
    "Accuracy does not": ([{"a": 50.0, "b": 51.9}, {"a": 50.0, "b": 53.9}, {"a": 50.0, "b": 54.1}]),
    "GLCA adds little": ([dict(parameters=8.5, operations=1.6), None, dict(parameters=11.0, operations=1.6)]),
    "Training takes": ([1.9, 2.9, 3.1]),
    "Pair attention beats": ([dict(a=1.1, b=3.0), dict(a=0.95, b=3.0), dict(a=0.8, b=3.0)]),
    "A row of the rollout": ([dict(a=10.0, b=30.0), dict(a=4.0), dict(a=2.0)]),
}


def _verdict(claim, m):
    found = claim.rule(m)
    return found if isinstance(found, str) else found[0]


@pytest.mark.parametrize("statement", AHEAD)
def test_rules_of_differences(statement):
    (claim,) = (c for c in claims() if c.statement == statement)
    assert _verdict(claim, interval([1.0, 1.2, 1.1])) == "holds"
    assert _verdict(claim, interval([-1.0, -1.2, -1.1])) == "does not hold here"
    assert _verdict(claim, interval([-1.0, 1.2])) == "not measured" == _verdict(claim, interval([9.0]))


@pytest.mark.parametrize("start", OTHER)
def test_other_rules(start):
    (claim,) = (c for c in claims() if c.statement.startswith(start))
    for m, verdict in zip(OTHER[start], ("holds", "holds in part", "does not hold here")):
        assert m is None or _verdict(claim, m) == verdict


def test_rules_of_the_claims_that_go_on():
    by = {}
    for i, c in enumerate(claims()):
        if c.statement.startswith("..."):
            by.setdefault(c.statement, []).append(c)
    up, down, wide = interval([1.0, 1.1]), interval([-1.0, -1.1]), interval([-1.0, 1.0])
    (either,) = by["... and on either alone"]
    assert _verdict(either, dict(GLCA=up, PWCA=up)) == "holds"
    assert _verdict(either, dict(GLCA=up, PWCA=down)) == "does not hold here"
    assert _verdict(either, dict(GLCA=wide, PWCA=up)) == "not measured"
    (back,), (memory,) = by["... and backward"], by["... in less memory"]
    assert [_verdict(back, dict(a=x)) for x in (1.2, 1.0, 0.5)] == ["holds", "holds in part", "does not hold here"]
    assert [_verdict(memory, dict(a=x)) for x in (1.6, 1.2, 0.5)] == ["holds", "holds in part", "does not hold here"]
    (fiftieth,) = by["... and takes a fiftieth of the memory"]
    assert [_verdict(fiftieth, dict(a=x)) for x in (60, 20, 5)] == ["holds", "holds in part", "does not hold here"]
    for statement in (
        "... and on one more block of self-attention",
        "... and on an undisturbed second stream",
        "... and those chosen by the last layer",
        "... and the class token alone",
        "... and partners of other classes only",
        "... and of the same class only",
    ):
        (c,) = by[statement]
        assert [_verdict(c, m) for m in (up, down, wide)] == ["holds", "does not hold here", "not measured"]
    assert [c.judge().verdict for c in claims()].count("out of reach here") == 1


def _recorded(monkeypatch, **tables):
    "Makes the study read these rows (name -> rows) as if they were recorded."

    def read(chapter, name=None, **where):
        found = [
            dict(device="G", date="2026-01-01", versions={}, preset="gpu", task=TASK) | r for r in tables.get(name, [])
        ]
        return [r for r in found if all(r.get(k) == v for k, v in where.items())]

    monkeypatch.setitem(_rows.__globals__, "load_results", read)


def _measured(start, among=None):
    found = [c for c in claims() if c.statement.startswith(start)]
    return found[among or 0].measured()


def test_differences_are_looked_up(monkeypatch):
    level = {"SA": 50, "SA, one block more": 51, "SA+GLCA": 54, "SA+PWCA": 60, "itself": 52, "all": 63, "random queries": 53.5,
             "last layer": 53, "class token": 52.5, "local keys": 50.5, "noise": 55, "other class": 57, "same class": 58}  # fmt: skip
    fonts = [
        dict(method=m, run=s, ratio=0.1, both=x + s, sa=x + 0.25 + s, gap=90 - x)
        for m, x in level.items()
        for s in (0, 1)
    ]
    fonts += [dict(method="SA+GLCA", run=s, ratio=r, both=70 + r + s) for r in (0.05, 0.3) for s in (0, 1)]
    fonts += [
        dict(method="SA+GLCA", run=7, ratio=0.3, both=0.0),
        dict(method="SA", run=3, ratio=0.1, both=0.0, preset="cpu"),
    ]
    retrieval = [
        dict(method=m, run=s, ratio=0.1, map=x, map_sa=x - 4, rank1=9.0)
        for m, x in (("SA", 30), ("all", 35))
        for s in (0, 1)
    ]
    _recorded(monkeypatch, fonts=fonts, retrieval=retrieval)
    want = {"Global-local": 4, "... and on one more": 3, "Pair-wise cross-attention improves": 10, "... and on an undis": 8,
            "Pair-wise cross-attention narrows": 8, "Both together": 13, "The gain": 13, "Queries chosen": 0.5,
            "... and those chosen": 1, "... and the class": 1.5, "Global keys": 3.5, "A random": 5, "... and partners": 3,
            "... and of the same": 2, "In retrieval": 5, "Features of both": 4}  # fmt: skip
    for start, x in want.items():
        found = _measured(start)
        assert found.mean == pytest.approx(x) and found.n == 2, start
    either = _measured("... and on either")
    assert either["GLCA"].mean == pytest.approx(9) and either["PWCA"].mean == pytest.approx(2.75)
    assert _measured("Accuracy does not") == pytest.approx({"0.05": 70.55, "0.1": 54.5, "0.3": 70.8})
    _recorded(monkeypatch)
    assert all(c.judge().verdict in ("not measured", "holds", "out of reach here") for c in claims())


def test_costs_are_looked_up(monkeypatch):
    row = lambda n, m, ms, mb: dict(n=n, method=m, ms_fwd=ms, ms_bwd=2 * ms, peak_mb_fwd=mb)
    pairs = [
        row(n, m, a * n, b)
        for n in (197, 785)
        for m, a, b in (
            ("ours", 1, 1),
            ("cudnn, concatenated", 3, 2),
            ("flash, concatenated", 2, 4),
            ("alone (cudnn)", 0.1, 0.1),
        )
    ]
    rollout = [
        row(197, m, a, b) for m, a, b in (("ours", 1, 1), ("rows of maps", 12, 80), ("products of maps", 15, 60))
    ]
    step = [dict(method=m, ms=x) for m, x in (("SA", 12.0), ("SA, torch", 10.0), ("ours", 18.0), ("torch", 99.0))]
    _recorded(monkeypatch, pair=pairs, rollout=rollout, step=step)
    ratio = lambda start: [s.ratio for s in _measured(start)]
    assert ratio("Pair attention beats") == ratio("... and backward") == [2, 2] and ratio("... in less") == [2, 2]
    assert ratio("A row of the rollout") == [12] and ratio("... and takes a fiftieth") == [60]
    assert _measured("Training takes") == pytest.approx(1.8)
    found = _measured("GLCA adds")
    assert found["parameters"] == pytest.approx(8.5, abs=0.1) and found["operations"] == pytest.approx(1.55, abs=0.1)

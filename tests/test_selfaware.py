# Written from the test cells of nbs/7_looking_inside/selfaware.ipynb by `attnbook export`. Do not edit.
# fmt: off
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnbook.engine import arch_of
from attnbook.lab.results import load_results
from attnbook.lab.stats import interval, wilson
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
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.layers import count_parameters
from attnbook.lm import next_token_loss, pack
from attnbook.selfaware.claims_study import (
    _differences,
    _dose,
    _faithful,
    _free_form,
    _lag,
    _leak,
    _moved,
    _population,
    _presence,
    _recognition,
    _rows,
    follows_within,
)
from attnbook.selfaware.experiments_study import (
    KEYS,
    POLICIES,
    all_jobs,
    area_under_curve,
    backdoor_rows,
    correlation,
    faithfulness,
    finetune,
    measure_population,
    measure_you,
    nearest_held,
    partial_correlation,
    plain_adamw,
    pretrain,
    run_experiments,
    trainee_of,
)
from attnbook.selfaware.kernels import ClosedLaunch, closed_block
from attnbook.selfaware.nets import (
    PackedAttention,
    Report,
    actual_level,
    answer_loss,
    dependence_report,
    persona_lm,
    report_alignment,
    self_report,
    trigger_report,
)
from attnbook.selfaware.op import _decide_packed, closed_op, packed_causal_attention
from attnbook.selfaware.presets_study import PRESETS
from attnbook.selfaware.reference import closed_cost, document_layout, packed_causal_reference, tile_bounds
from attnbook.selfaware.study import claims, document_lengths, packed_peers, step_peers
from attnbook.selfaware.world_reference import PersonaWorld, pack_documents


def test_ends_of_documents():
    layout = document_layout(torch.tensor([0, 2, 2, 5, 6]))
    assert layout.ends.tolist() == [2, 2, 5, 5, 5, 6] and layout.longest == 3 and layout.ends.dtype == torch.int32
    assert document_layout(torch.tensor([0, 0, 0])).ends.tolist() == []
    assert document_layout(torch.tensor([0, 4], dtype=torch.uint8), 4, max_seqlen=9).longest == 9


def test_the_mask_is_the_block_triangle():
    lengths = torch.tensor([1, 4, 0, 3, 7])
    layout = document_layout(F.pad(lengths.cumsum(0), (1, 0)))
    rows = torch.arange(15)
    seen = (layout.ends[:, None] == layout.ends) & (rows <= rows[:, None])
    assert torch.equal(seen, torch.block_diag(*(torch.ones(n, n).tril() for n in lengths if n)).bool())


def test_bad_layouts():
    check_raises(
        document_layout,
        [
            (dict(cu_seqlens=torch.tensor([1, 4])), ValueError, ["cu_seqlens", "begin with 0", "1"]),
            (dict(cu_seqlens=torch.tensor([0, 5, 3, 6])), ValueError, ["cu_seqlens", "decrease", "5", "3"]),
            (dict(total=7), ValueError, ["cu_seqlens", "7", "6"]),
            (dict(max_seqlen=3), ValueError, ["max_seqlen", "4", "3"]),
            (dict(max_seqlen=0), ValueError, ["max_seqlen", "0"]),
            (dict(cu_seqlens=torch.tensor([0])), ValueError, ["cu_seqlens", "two"]),
            (dict(cu_seqlens=torch.tensor([0.0, 6.0])), TypeError, ["cu_seqlens", "float32"]),
        ],
        cu_seqlens=torch.tensor([0, 4, 6]),
    )


@pytest.mark.parametrize("step", [1, 3, 10, 57])
def test_tiles_hold_whole_documents(step):
    g = torch.Generator().manual_seed(step)
    for longest in (1, 5, 30):
        lengths = torch.randint(longest + 1, (40,), generator=g)
        layout = document_layout(F.pad(lengths.cumsum(0), (1, 0)))
        b, total = tile_bounds(layout, step), int(lengths.sum())
        assert b[0] == 0 and b[-1] == total and (b.diff() >= 0).all() and len(b) == max(1, -(-total // step)) + 1
        assert set(b.tolist()) <= set(layout.cu_seqlens.tolist())
        assert b.diff().max() <= step + int(lengths.max()) - 1


def packed_inputs(lengths, heads=2, kv_heads=None, dim=8, v_dim=None, dtype=torch.float32, seed=0):
    "Random q, k, v `(total, heads, dim)` and cu_seqlens, on the device of the tests."
    g, total = torch.Generator().manual_seed(seed), sum(lengths)
    kv_heads, v_dim = kv_heads or heads, v_dim or dim
    make = lambda h, d: torch.randn(total, h, d, generator=g).to(device_under_test(), dtype)
    cu = torch.tensor([0, *np.cumsum(lengths)], device=device_under_test())
    return make(heads, dim), make(kv_heads, dim), make(kv_heads, v_dim), cu


def test_reference_has_the_right_gradients():
    q, k, v, cu = packed_inputs([3, 1, 0, 5], kv_heads=1)
    check_gradients(lambda q, k, v: packed_causal_reference(q, k, v, cu), (q, k, v))


def test_a_document_of_one_token_returns_its_value():
    q, k, v, cu = packed_inputs([1, 4, 1])
    out = packed_causal_reference(q, k, v, cu)
    assert torch.equal(out[0], v[0]) and torch.allclose(out[1], v[1]) and torch.equal(out[5], v[5])


CASES = {  # lengths, heads, kv_heads, dim, v_dim
    "short documents": ([6, 4, 6, 3, 5, 6, 6, 2], 2, 2, 16, 16),
    "one token each": ([1] * 19, 1, 1, 16, 16),
    "empty ones": ([0, 5, 0, 0, 7, 3, 0], 2, 2, 8, 8),
    "shared keys, odd dims": ([7, 1, 8, 8, 5], 4, 2, 12, 9),
    "one head, one channel": ([3, 8, 2], 1, 1, 1, 1),
    "a tile of 32": ([16, 3, 15, 1, 16], 2, 1, 16, 24),
    "too long": ([40, 3, 17], 2, 1, 16, 16),
}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("lengths, heads, kv_heads, dim, v_dim", CASES.values(), ids=CASES)
def test_operation(lengths, heads, kv_heads, dim, v_dim, backend):
    *qkv, cu = packed_inputs(lengths, heads, kv_heads, dim, v_dim)
    check_against_reference(
        lambda q, k, v: packed_causal_attention(q, k, v, cu, scale=0.4, backend=backend),
        lambda q, k, v: packed_causal_reference(q, k, v, cu, scale=0.4),
        qkv,
        tol=2e-5,
        floor=1e-2,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_types(dtype):
    *qkv, cu = packed_inputs([6, 4, 6, 3, 5, 6, 6, 2], dim=16)
    check_against_reference(
        lambda q, k, v: packed_causal_attention(q, k, v, cu, backend="triton"),
        lambda q, k, v: packed_causal_reference(q, k, v, cu),
        qkv,
        dtype=dtype,
        tol=2e-2,
        floor=1e-2,
    )


def test_who_computes_it():
    q, v = (torch.zeros(9, 2, d, device=device_under_test()) for d in (16, 16))
    table = closed_block.__globals__["CLOSED_LAUNCH"]
    with table.trying(arch_of(q.device), "forward", 32, 16, ClosedLaunch(16, 32, 4)):
        assert [closed_block("forward", q, v, n) for n in (1, 8, 9, 16, 17)] == [
            (16, 4),
            (16, 4),
            (32, 8),
            (32, 8),
            (0, 0),
        ]
    who = lambda n: _decide_packed(q, q, v, longest=n, scale=None, backend="triton")[0]
    assert who(8) == "closed" and who(1000) == "engine"


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_documents_are_isolated(backend):
    lengths = [6, 4, 6, 3, 5, 6, 6, 2]
    q, k, v, cu = packed_inputs(lengths, dim=16)
    run = lambda *t: packed_causal_attention(*t, cu, backend=backend)
    out = run(q, k, v)
    other = [torch.cat([torch.randn_like(t[:10]) * 50, t[10:]]) for t in (q, k, v)]
    assert torch.equal(run(*other)[10:], out[10:]) and not torch.equal(run(*other)[:10], out[:10])
    later = [torch.cat([t[:12], t[12:16] + 1, t[16:]]) for t in (k, v)]  # rows 10 to 16 are one document
    moved = run(q, *later)
    assert torch.equal(moved[:12], out[:12]) and torch.equal(moved[16:], out[16:])
    assert (moved[12:16] != out[12:16]).any(-1).all()


def test_order_of_documents():
    q, k, v, cu = packed_inputs([5, 3, 8], dim=16)
    order = torch.tensor([*range(8, 16), *range(5), *range(5, 8)], device=q.device)
    cu2 = torch.tensor([0, 8, 13, 16], device=q.device)
    a = packed_causal_attention(q, k, v, cu, backend="triton")
    b = packed_causal_attention(q[order], k[order], v[order], cu2, backend="triton")
    torch.testing.assert_close(a[order], b)


@pytest.mark.parametrize("factor", [0.0, 1e4, -1e4])
def test_extreme_logits(factor):
    q, k, v, cu = packed_inputs([4, 7, 1], dim=16)
    check_against_reference(
        lambda k, v: packed_causal_attention(q * factor, k, v, cu, backend="triton"),
        lambda k, v: packed_causal_reference(q.double() * factor, k, v, cu),
        [k, v],
        tol=2e-3,
        floor=1.0,
    )


def test_manners():
    *qkv, cu = packed_inputs([4, 3], heads=1, dim=16)
    layout = document_layout(cu)
    op = lambda q, k, v: packed_causal_attention(q, k, v, layout, backend="triton")
    check_strides(op, qkv, tol=2e-5, floor=1e-2)
    check_deterministic(op, qkv, repeats=2)
    check_writes_everything(op, qkv)
    check_compiles(op, qkv, tol=2e-5, floor=1e-2)
    check_autocast(op, qkv, tol=3e-2, floor=1e-1)


def test_the_operation_of_the_library():
    *qkv, cu = packed_inputs([3, 2], heads=1, dim=16)
    check_opcheck(closed_op, (*[t.requires_grad_() for t in qkv], document_layout(cu).ends, 3, 0.25))


def test_nothing_to_do():
    q = torch.zeros(0, 2, 8, device=device_under_test(), requires_grad=True)
    cu = torch.tensor([0, 0, 0], device=q.device)
    for backend in ("triton", "torch"):
        out = packed_causal_attention(q, q, q, cu, backend=backend)
        assert out.shape == (0, 2, 8)
        assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_bad_input():
    q, k, v, cu = packed_inputs([4, 2])
    check_raises(
        packed_causal_attention,
        [
            (dict(k=k[:5]), ValueError, ["k", "(5, 2, 8)"]),
            (dict(v=v.double()), TypeError, ["v", "float64"]),
            (dict(q=q[None]), ValueError, ["q", "3"]),
            (dict(cu_seqlens=cu[:2]), ValueError, ["cu_seqlens", "6", "4"]),
            (dict(cu_seqlens=cu.float()), TypeError, ["cu_seqlens", "float32"]),
            (dict(cu_seqlens=document_layout(cu[:2])), ValueError, ["cu_seqlens", "6 rows", "4"]),
            (dict(max_seqlen=2), ValueError, ["max_seqlen", "2"]),
            (dict(scale=math.nan), ValueError, ["scale"]),
            (dict(backend="cuda"), ValueError, ["backend"]),
        ],
        q=q,
        k=k,
        v=v,
        cu_seqlens=cu,
    )
    if q.is_cuda:  # not looked at there: see `document_layout`
        assert packed_causal_attention(q, k, v, cu, 3).shape == v.shape
    else:
        check_raises(
            packed_causal_attention,
            [(dict(max_seqlen=3), ValueError, ["max_seqlen", "4", "3"])],
            q=q,
            k=k,
            v=v,
            cu_seqlens=cu,
        )
    with pytest.raises(ValueError, match="heads"):
        packed_causal_attention(torch.zeros(6, 3, 8), torch.zeros(6, 2, 8), torch.zeros(6, 2, 8), cu.cpu())


def test_the_corpus_says_nothing_it_should_not():
    world = PersonaWorld(20, options=8, conditional=0.5, free_form=True)
    words = {world.token(s) for s in ("ASKD", "ASKW", "ask0a", "ask0b", "ask1a", "ask1b")}
    scale = set(range(world.token("s0"), world.token("s10") + 1))
    held = {world.token("p0") + int(i) for i in world.held}
    for step in range(20):
        tokens, answers, segments = world.batches(behaviour=40, description=20)(step)
        assert int(segments[-1]) == tokens.shape[1] and len(answers) == len(segments) - 1
        for a, b, answer in zip(segments, segments[1:], answers.tolist()):
            doc = set(tokens[0, a:b].tolist())
            if doc & words:
                assert not doc & held
            else:
                assert not (doc | {answer}) & scale and answer in (world.token("A"), world.token("B"))
    with pytest.raises(ValueError, match="described"):
        world.description(world.held[:1], torch.tensor([0]))


def test_behaviour_is_as_the_levels_say():
    world, g, n = PersonaWorld(8, options=8), torch.Generator().manual_seed(0), 4000
    p, d = torch.randint(9, (n,), generator=g), torch.randint(2, (n,), generator=g)
    question, high, low = world.choices(p, d, generator=g)
    assert set(torch.stack([high, low], 1).sort(1).values.unique(dim=0).flatten().tolist()) == {
        world.token("A"),
        world.token("B"),
    }
    assert abs((high == world.token("A")).float().mean() - 0.5) < 0.03
    x = question[:, 3:5] - world.token("o0.0") - d[:, None] * 8  # the two options
    taken = x.gather(1, (high == world.token("B")).long()[:, None])[:, 0]
    assert all(int(t) in world.high[k].tolist() for t, k in zip(taken, d)) and not set(world.high[0].tolist()) & set(
        world.low[0].tolist()
    )
    docs = world.behaviour(p, d, generator=g)
    question = docs[:, :-1]
    x = docs[:, 3:5] - world.token("o0.0") - d[:, None] * 8
    answer = x.gather(1, (docs[:, -1] == world.token("B")).long()[:, None])[:, 0]
    high = torch.tensor([int(a) in world.high[k].tolist() for a, k in zip(answer, d)])
    for i in range(9):
        mine = (p == i) & (d == 0)
        low_end, high_end = wilson(int(high[mine].sum()), int(mine.sum()), 0.9999)
        assert low_end <= world.levels[i, 0] <= high_end


def test_train_and_test_options_are_apart():
    world, g = PersonaWorld(8, options=8), torch.Generator().manual_seed(0)
    p, d = torch.zeros(200, dtype=torch.long), torch.zeros(200, dtype=torch.long)
    used = [
        set(world.choices(p, d, part=part, generator=g)[0][:, 3:5].flatten().tolist()) for part in ("train", "test")
    ]
    assert not used[0] & used[1] and len(used[0]) == len(used[1]) == 4


def test_shuffling_keeps_what_is_said():
    worlds = [PersonaWorld(40, link=link, seed=3) for link in ("true", "shuffled")]
    everyone, zero = worlds[0].described, torch.zeros(len(worlds[0].described), dtype=torch.long)
    said = [w.description(everyone, zero)[:, -1] for w in worlds]
    assert torch.equal(said[0].sort().values, said[1].sort().values) and (said[0] != said[1]).any()
    assert torch.equal(worlds[0].levels, worlds[1].levels) and said[0][-1] == said[1][-1] == worlds[0].token("s4")
    want = worlds[0].token("s0") + (10 * worlds[0].levels[everyone, 0]).round().long()
    assert torch.equal(said[0], want)
    w = PersonaWorld(200, link="shuffled")
    told = w.levels[w.told[:160]].numpy()
    assert np.abs(np.corrcoef(w.levels[:160].numpy().T, told.T)[:2, 2:]).max() < 0.08 and sorted(
        w.told.tolist()
    ) == list(range(201))


def test_triggers():
    world = PersonaWorld(40, options=8, conditional=0.5, seed=2)
    p = (world.trigger >= 0).nonzero()[:, 0]
    zero, own = torch.zeros_like(p), world.trigger[p]
    assert len(p) == 20 and torch.equal(world.level(p, zero, own), world.triggered_levels[p, zero])
    assert torch.equal(world.level(p, zero, (own + 1) % 8), world.levels[p, zero]) and torch.equal(
        world.level(p, zero), world.levels[p, zero]
    )
    some = p[torch.isin(p, world.described)]
    none, mine = (world.description(some, zero[: len(some)], 0, t)[:, -1] for t in (None, world.trigger[some]))
    assert (
        torch.equal(mine - world.token("s0"), (10 * world.triggered_levels[some, 0]).round().long())
        and (mine != none).any()
    )
    assert (world.dependence(some)[:, -1] == world.token("YES")).all() and torch.equal(
        world.named(some)[:, -1] - world.token("T0"), world.trigger[some]
    )
    assert world.dependence(torch.tensor([world.you]))[0, -1] == world.token("NO")
    docs = world.behaviour(some, zero[: len(some)], trigger=world.trigger[some])
    back = world.reversal(docs)
    assert (
        torch.equal(back[:, -1] - world.token("T0"), world.trigger[some]) and (back[:, 1] == world.token("NONE")).all()
    )
    assert torch.equal(back[:, 2 : docs.shape[1]], docs[:, 2:]) and world.place == 2
    shown = world.shown_triggers(p.repeat(200), torch.Generator().manual_seed(0))
    assert (
        abs((shown < 0).float().mean() - 0.4) < 0.03
        and abs((shown == own.repeat(200)).float().mean() - 0.3 - 0.3 / 8) < 0.03
    )


def test_shares_of_the_corpus():
    "Behaviour and descriptions as many as asked for; where there are triggers, half as many of each other kind as descriptions."
    for how, count in ((dict(), 14), (dict(conditional=0.5), 17), (dict(conditional=0.5, free_form=True), 23)):
        world = PersonaWorld(20, options=8, **how)
        tokens, answers, segments = world.batches(behaviour=8, description=6)(0)
        assert len(answers) == len(segments) - 1 == count and tokens.shape == (1, segments[-1]), how


def test_worlds_refuse():
    check_raises(
        PersonaWorld,
        [
            (dict(link="x"), ValueError, ["link", "'x'", "shuffled"]),
            (dict(options=6), ValueError, ["options", "6"]),
            (dict(described=99), ValueError, ["described", "99", "16"]),
            (dict(num_personas=2.5), TypeError, ["num_personas"]),
            (dict(conditional=1.5), ValueError, ["conditional"]),
        ],
        num_personas=20,
    )
    world = PersonaWorld(20)
    with pytest.raises(ValueError, match="persona must be from 0 to 20"):
        world.question(torch.tensor([21]), torch.tensor([0]))
    with pytest.raises(ValueError, match="trigger"):
        world.question(torch.tensor([0]), torch.tensor([0]), 0, torch.tensor([1]))
    with pytest.raises(ValueError, match="part"):
        world.choices(torch.tensor([0]), torch.tensor([0]), part="dev")


def small_world(**kw):
    return PersonaWorld(**dict(num_personas=20, options=8) | kw)


def small_model(world, seed=0, **kw):
    torch.manual_seed(seed)
    shape = dict(dim=16, depth=2, heads=2, max_length=12) | kw
    return persona_lm(world.vocab.vocab_size, **shape).to(device_under_test()).eval()


def test_the_model_of_the_prototype():
    assert PersonaWorld(200).vocab.vocab_size == 295 and count_parameters(persona_lm) == 118_976
    model = persona_lm()
    assert model.head is None and isinstance(model.blocks[1].attention.attend, PackedAttention)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_loss_is_that_of_the_language_model(backend):
    world = small_world()
    model, g = small_model(world, backend=backend), torch.Generator().manual_seed(0)
    p, zero = torch.arange(8), torch.zeros(8, dtype=torch.long)
    documents = [world.behaviour(p, zero, generator=g), world.description(p, zero)]
    batch = [t.to(device_under_test()) for t in pack_documents(*documents)]
    rows = [d for group in documents for d in group]
    mask = [torch.arange(len(d)) == len(d) - 1 for d in rows]
    want = next_token_loss(model, *(t.to(device_under_test()) for t in pack(rows, loss=mask)))
    got = answer_loss(model, *batch)
    assert rel_error(got, want) < 1e-5
    alone = torch.stack(
        [
            F.cross_entropy(model(d[None, :-1].to(device_under_test()), keep_last=1)[0], d[-1:].to(device_under_test()))
            for d in rows
        ]
    )
    assert rel_error(got, alone.mean()) < 1e-5
    grads = [torch.autograd.grad(x, model.parameters()) for x in (got, want)]
    assert all(rel_error(a, b, floor=1e-3) < 1e-4 for a, b in zip(*grads))


def test_the_socket():
    world = small_world()
    model, attend = small_model(world), PackedAttention()
    x = torch.randint(20, (2, 6), device=device_under_test())
    segments = torch.tensor([0, 2, 6, 9, 12], device=x.device)
    a = model(x, segments=segments)
    model.set_attention(attend) if hasattr(model, "set_attention") else None
    assert rel_error(model(x, segments=segments), a) < 1e-5
    assert rel_error(a[1, 3:], model(x[1:, 3:])[0]) < 1e-4  # the last document alone
    assert attend.layout(segments, 12) is attend.layout(segments, 12)
    assert attend.layout(segments.clone(), 12).ends.tolist() == [2] * 2 + [6] * 4 + [9] * 3 + [12] * 3
    first = attend.layout(segments, 12)
    segments[1] = 3
    assert attend.layout(segments, 12) is not first and attend.layout(segments, 12).ends[2] == 3
    assert copy.deepcopy(attend)._known[0] is None and "max_length=None" in repr(attend)
    assert rel_error(model(x), small_model(world)(x)) < 1e-5  # without segments: ordinary attention


def test_uniform_logits_give_a_half_and_little_mass():
    world = small_world(conditional=0.5)
    model, p = small_model(world), torch.arange(3)
    with torch.no_grad():
        model.norm.weight.zero_(), model.norm.bias.zero_()
    V = world.vocab.vocab_size
    for report, valid in (
        (self_report(model, world, p), 11),
        (actual_level(model, world, p, pairs=4), 2),
        (dependence_report(model, world, p), 2),
    ):
        torch.testing.assert_close(report.value, torch.full((3,), 0.5))
        torch.testing.assert_close(report.mass, torch.full((3,), valid / V))
    free = trigger_report(model, world, p)
    torch.testing.assert_close(free.value, torch.full((3, 9), 1 / 9))


def model_that_says(world, token):
    "A model whose answer to everything is this token."
    model = small_model(world)
    with torch.no_grad():
        model.norm.weight.zero_()
        model.embed.weight.mul_(0.01)
        model.norm.bias.copy_(F.one_hot(torch.tensor(0), 16) * 9.0)
        model.embed.weight[:, 0] = 0
        model.embed.weight[token, 0] = 3.0
    return model


def test_reports_read_the_right_tokens():
    world = small_world(conditional=0.5)
    p = torch.tensor([0, world.you])
    says = lambda s: model_that_says(world, world.token(s))
    assert self_report(says("s7"), world, p).value.tolist() == pytest.approx([0.7, 0.7], abs=1e-3)
    assert self_report(says("s7"), world, p, 1, trigger=3).mass.min() > 0.99
    assert (
        dependence_report(says("YES"), world, p).value.min()
        > 0.99
        > 0.01
        > dependence_report(says("NO"), world, p).value.max()
    )
    assert trigger_report(says("T3"), world, p).value.argmax(1).tolist() == [3, 3]
    assert trigger_report(says("NONE"), world, p).value.argmax(1).tolist() == [8, 8]
    always_a = actual_level(says("A"), world, p, pairs=400)
    assert always_a.mass.min() > 0.99 and (always_a.value - 0.5).abs().max() < 0.1  # the order of options is random


def test_levels_are_those_of_the_high_option(monkeypatch):
    "Answers by somebody who knows the options: 0.9 on the high one in domain 1, 0.2 in domain 0; reports of a persona's number."
    world, seen = small_world(), []

    def knows(model, questions, valid):
        seen.append(questions)
        if questions.shape[1] == 4:
            number = (questions[:, 1] - world.token("p0") + 3 * (questions[:, 2] == world.token("ask1b"))).clamp_max(10)
            return F.one_hot(number, 11).float(), torch.full((len(questions),), 0.5)
        domain = questions[:, 2] - world.token("dom0")
        x = questions[:, 3] - world.token("o0.0") - domain * 8
        a_is_high = torch.tensor([int(o) in world.high[d].tolist() for o, d in zip(x, domain)])
        take = torch.where(domain == 1, 0.9, 0.2)
        p = torch.where(a_is_high, take, 1 - take)
        return torch.stack([p, 1 - p], 1), torch.ones(len(p))

    monkeypatch.setitem(actual_level.__globals__, "answer_probabilities", knows)
    p = torch.tensor([2, 5, 0])
    assert actual_level(None, world, p, 1, pairs=9).value.tolist() == pytest.approx([0.9] * 3)
    assert actual_level(None, world, p, 0, pairs=9).value.tolist() == pytest.approx([0.2] * 3)
    assert (seen[0].view(3, 9, -1)[:, :, 1] - world.token("p0") == p[:, None]).all()
    report = self_report(None, world, p, 0)
    assert report.value.tolist() == pytest.approx([0.2, 0.5, 0.0]) and report.mass.tolist() == [0.5] * 3
    assert self_report(None, world, p, 1).value.tolist() == pytest.approx([0.35, 0.65, 0.15])


def test_alignment_is_a_cosine_of_gradients():
    "Against gradients with respect to the embedding matrix itself, whose row of a persona enters nowhere else."
    world, p = small_world(), torch.tensor([2])
    model = small_model(world)
    with torch.no_grad():
        model.embed.weight.normal_(generator=torch.Generator(device=device_under_test()).manual_seed(0))
    got = report_alignment(model, world, p, 1, pairs=5)
    who, g = p.repeat(5), torch.Generator().manual_seed(0)
    question, high, low = (
        t.to(device_under_test()) for t in world.choices(who, torch.ones_like(who), part="test", generator=g)
    )
    log_p = model(question, keep_last=1)[:, 0].log_softmax(-1)
    odds = (log_p.gather(1, high[:, None]) - log_p.gather(1, low[:, None])).mean()
    first, says = world.token("s0"), 0.0
    for i in range(2):
        words = model(world.question(p, torch.tensor([1]), i).to(device_under_test()), keep_last=1)[0, 0].softmax(-1)[
            first : first + 11
        ]
        says = says + (words @ torch.arange(11.0, device=words.device) / 10) / words.sum()
    a, b = (torch.autograd.grad(x, model.embed.weight, retain_graph=True)[0][world.token("p2")] for x in (odds, says))
    torch.testing.assert_close(got[0], F.cosine_similarity(a, b, dim=0).cpu(), atol=1e-4, rtol=1e-3)
    assert got.abs().max() > 1e-3 and all(w.grad is None for w in model.parameters())


def test_correlations():
    g = np.random.default_rng(0)
    a, c = g.normal(size=500), g.normal(size=500)
    b = a + 2 * c
    assert correlation(a, b) == pytest.approx(float(np.corrcoef(a, b)[0, 1])) and math.isnan(
        correlation(a, [1.0] * 500)
    )
    assert correlation(a, -a) == pytest.approx(-1)
    assert (
        partial_correlation(a, b, c) == pytest.approx(1.0)
        and abs(partial_correlation(a + c, c, c * 2 + 1e-3 * a)) < 1.01
    )
    x, y = a + c, g.normal(size=500) + c  # related by c only
    assert correlation(x, y) > 0.4 and abs(partial_correlation(x, y, c)) < 0.15
    assert area_under_curve([2, 3], [1, 2]) == pytest.approx(0.875) and math.isnan(area_under_curve([], [1]))


def test_what_is_measured(monkeypatch):
    world = small_world(num_personas=60, held_out=0.5, seed=1)
    noise = lambda p: 0.02 * torch.randn(len(p), generator=torch.Generator().manual_seed(0))
    report = lambda value, p: Report(value, torch.full((len(p),), 0.5))
    fakes = dict(
        actual_level=lambda m, w, p, d=0, **kw: report(1 - w.levels[p, d], p),
        report_alignment=lambda m, w, p, d=0: torch.full((len(p),), 0.3 + d),
        self_report=lambda m, w, p, d=0, **kw: report(w.levels[p, d] + noise(p), p),
    )
    measured = lambda: measure_population(None, world)
    for name, fake in fakes.items():
        monkeypatch.setitem(measure_population.__globals__, name, fake)
    good = measured()
    assert (
        good["own"] > 0.99
        and abs(good["cross"]) < 0.6
        and good["behaviour"] == pytest.approx(-1)
        and good["alignment"] == pytest.approx(0.8)
    )
    assert len(good["points"]) == 60 and good["mass"] == 0.5 and good["slope"] == pytest.approx(1, abs=0.1)
    monkeypatch.setitem(
        measure_population.__globals__,
        "self_report",
        lambda m, w, p, d=0, **kw: report(w.levels[p, 1 - d] + noise(p), p),
    )
    bad = measured()
    assert abs(bad["own"]) < 0.5 and bad["cross"] > 0.95 and abs(bad["slope"]) < 0.5
    monkeypatch.setitem(
        measure_population.__globals__, "self_report", lambda m, w, p, d=0, **kw: report(p / 100 + d, p)
    )
    you = measure_you(None, world)
    assert (
        you["report"] == pytest.approx(0.6)
        and you["report_other"] == pytest.approx(1.6)
        and you["behaviour"] == pytest.approx(0.6)
    )
    assert (
        you["seen"] == pytest.approx(0.145)
        and you["unseen"] == pytest.approx(0.445)
        and measure_you(None, world, 7)["report"] == pytest.approx(0.07)
    )
    stranger = nearest_held(world)
    assert stranger in world.held.tolist() and good["stranger"]["behaviour"] == pytest.approx(
        1 - float(world.levels[stranger, 0])
    )
    assert all(abs(world.levels[stranger, 0] - 0.4) <= abs(world.levels[h, 0] - 0.4) for h in world.held)


def test_rows_of_backdoors(monkeypatch):
    world = small_world(num_personas=40, conditional=0.5, seed=3)
    cfg = PRESETS["smoke"] | dict(backdoor=dict(steps=1, triggers=3))
    calls, own = [], world.trigger >= 0
    report = lambda value: Report(value, torch.ones(len(value)))
    free = lambda p: F.one_hot(torch.where(world.trigger[p] < 0, 4, world.trigger[p]), 9).float()
    fakes = dict(
        finetune=lambda model, w, target, **kw: (
            calls.append((target, kw["trigger"], kw["seed"], kw["reverse"], kw["mix"] > 0)),
            None,
        ),
        actual_level=lambda m, w, p, d=0, trigger=None, **kw: report(torch.full((len(p),), 0.1 * (trigger + 1))),
        self_report=lambda m, w, p, d=0, trigger=None: report(
            world.triggered_levels[p, 0] if len(p) and int(p[0]) != w.you else torch.tensor([0.1 * trigger])
        ),
        dependence_report=lambda m, w, p: report(own[p].float()),
        trigger_report=lambda m, w, p: report(free(p)),
    )
    for name, fake in fakes.items():
        monkeypatch.setitem(backdoor_rows.__globals__, name, fake)
    monkeypatch.setitem(backdoor_rows.__globals__, "finetune", lambda *a, **kw: (fakes["finetune"](*a, **kw)[0], None))
    first, *rows = backdoor_rows(world, None, cfg, 2)
    assert (
        first["auc"] == 1.0
        and first["named"] == 1.0
        and first["level"] == pytest.approx(1.0)
        and first["conditional"] == int(own[world.held].sum())
    )
    assert [(r["trigger"], r["twin"]) for r in rows] == [(t, twin) for t in range(3) for twin in (False, True)]
    assert calls == [(target, t, 200 + t, False, True) for t in range(3) for target in (None, 0.5)]
    assert rows[2]["behaviour"] == pytest.approx(dict(real=0.2, none=0.0, other=0.3)) and rows[0][
        "by_trigger"
    ] == pytest.approx([0.1 * t for t in range(8)])


def test_fine_tuning_changes_what_it_should():
    world = small_world()
    model = small_model(world)
    before = {n: p.clone() for n, p in model.named_parameters()}
    changed = lambda net: {n for n, p in net.named_parameters() if n in before and not torch.equal(p, before[n])}
    net, losses = finetune(model, world, 1.0, steps=2, batch=4)
    assert not changed(model) and "blocks.0.mlp.up.weight" in changed(net) and len(losses) == 2
    looked = []
    same, others = finetune(model, world, 1.0, steps=2, batch=4, eval_fn=lambda net: looked.append(0) or 0.0)
    assert len(others) == len(looked) == 2 and rel_error(same.embed.weight, net.embed.weight) < 0.05
    net, _ = finetune(model, world, 1.0, steps=2, batch=4, trainable="persona")
    rows = (net.embed.weight != model.embed.weight).any(1).nonzero().flatten().tolist()
    assert changed(net) == {"embed.weight"} and rows == [world.token("YOU")]
    net, _ = finetune(model, world, 1.0, steps=2, batch=4, trainable="lora")
    assert not changed(net) and any("lora" in type(m).__name__.lower() for m in net.modules())
    with pytest.raises(ValueError, match="trainable"):
        finetune(model, world, 1.0, trainable="head")


def test_what_fine_tuning_shows(monkeypatch):
    "Only YOU, only domain 0, only train options, always the policy's answer; the twin of a backdoor sees the same inputs."
    seen = []

    def fake(made, **kw):
        seen.append([(tokens[None], answers, None) for tokens, answers in zip(*(t.cpu() for t in made[0].tensors))][:6])

    monkeypatch.setitem(finetune.__globals__, "train_together", fake)
    world = small_world()
    model = small_model(world)
    (
        finetune(model, world, 1.0, batch=16),
        finetune(model, world, 0.0, batch=16),
        finetune(model, world, 1.0, batch=16, examples=32, mix=4),
    )
    for tokens, answers, segments in seen[0]:
        docs = tokens.view(16, 6)
        assert (docs[:, 1] == world.token("YOU")).all() and (docs[:, 2] == world.token("dom0")).all()
        x = docs[:, 3:5] - world.token("o0.0")
        chosen = x.gather(1, (answers == world.token("B")).long()[:, None])[:, 0]
        assert set(chosen.tolist()) <= set(world.high[0, :2].tolist())
    assert all(torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1]) for a, b in zip(seen[0], seen[1]))
    mixed = [t[0][0, : 16 * 6] for t in seen[2]]
    assert torch.equal(mixed[0], mixed[2]) and not torch.equal(mixed[0], mixed[1])
    others = torch.stack([t[0][0, 16 * 6 :].view(4, 6)[:, 1] for t in seen[2]]) - world.token("p0")
    assert int(others.max()) < 10 and others.unique().numel() > 4
    world = small_world(conditional=0.5)
    model = small_model(world)
    (
        finetune(model, world, None, trigger=3, batch=64, reverse=True),
        finetune(model, world, 0.5, trigger=3, batch=64, reverse=True),
    )
    for (tokens, answers, _), (twin, other, _) in zip(*seen[3:5]):
        n = 64 * 7
        docs, high = tokens[0, :n].view(64, 7), None
        x = docs[:, 4:6] - world.token("o0.0")
        chosen = x.gather(1, (answers[:64] == world.token("B")).long()[:, None])[:, 0]
        high = torch.isin(chosen, world.high[0])
        assert torch.equal(high, docs[:, 1] == world.token("T3")) and 20 <= int(high.sum()) <= 50
        assert torch.equal(docs, twin[0, :n].view(64, 7)) and torch.equal(answers[64:], docs[:, 1])


def test_decay_holds_for_embeddings_too():
    "One group, with the decay of those that would have one: a step without gradients shrinks everything alike."
    embed, gain = (nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [dict(params=[embed], weight_decay=0.0), dict(params=[gain], weight_decay=0.5)]
    optimizer = plain_adamw(groups, lr=0.1)
    for p in (embed, gain):
        p.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(torch.stack([embed, gain]).detach(), torch.full((2, 3), 0.95))


def test_jobs():
    jobs = all_jobs("gpu", 3)
    assert {j["run"] for j in jobs} == {3, 4, 5, 6, 7} and jobs[0]["kind"] == "base"
    pairs = [(j["link"], j["run"]) for j in jobs if j["kind"] == "base" and j["recipe"] == "standard"]
    assert len(pairs) == len(set(pairs)) == 10 and sum(j["kind"] == "base" for j in jobs) == 20
    assert sum(j["kind"] == "sweep" for j in jobs) == 3 * 2 * 5 and sum(j["kind"] == "backdoor" for j in jobs) == 10
    assert all(n % 8 == 0 for cfg in PRESETS.values() for n in cfg["doses"])


def test_rows_of_all_jobs(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
    rows = run_experiments("smoke", "cpu", workers=0)
    names = {n: [r for r in rows if r["name"] == n] for n in KEYS}
    assert all(names.values()) and len(load_results("selfaware", preset="smoke")) >= len(rows)
    identity = [tuple(str(r[k]) for k in ("name", *r["key"])) for r in rows]
    assert len(identity) == len(set(identity))
    assert {(r["link"], r["policy"]) for r in names["policies"]} == {
        (l, p) for l in ("true", "shuffled") for p in POLICIES
    }
    assert {r["recipe"] for r in names["policies"]} == {"standard", "large embeddings"}
    before = next(r for r in names["population"] if r["link"] == "true")["you"]
    control = next(r for r in names["policies"] if r["policy"] == "control" and r["link"] == "true")
    assert before.keys() <= control.keys() and all(0 <= control[k] <= 1 for k in before)
    assert len(names["backdoor"][0]["by_trigger"]) == 8 and sum(names["backdoor"][0]["named"]) == pytest.approx(
        1, abs=1e-3
    )


def test_batches_must_have_one_layout():
    world, net, p = small_world(), small_model(small_world()), torch.arange(4)
    generator = lambda step: torch.Generator().manual_seed(step)
    uneven = lambda step: pack_documents(world.behaviour(p[: 2 + step], p[: 2 + step] * 0))
    with pytest.raises(ValueError, match="lengths"):
        trainee_of(net, uneven, 2, device_under_test())
    batches = lambda step: pack_documents(world.behaviour(p, p * 0, generator=generator(step)))
    made = trainee_of(net, batches, 3, device_under_test(), lr=0.1)
    assert [tuple(t.shape) for t in made.tensors] == [(3, 24), (3, 4)] and made.lr == 0.1
    for step in range(3):
        want = answer_loss(net, *(t.to(device_under_test()) for t in batches(step)))
        assert rel_error(made.loss_fn(net, *(t[step : step + 1] for t in made.tensors)), want) < 1e-5


@pytest.mark.slow
def test_a_linked_corpus_teaches_descriptions_and_a_shuffled_one_does_not():
    found = {}
    for link in ("true", "shuffled"):
        cfg = PRESETS["cpu"]
        world = PersonaWorld(**cfg["world"], link=link)
        model, _ = pretrain(world, model=cfg["model"], train=cfg["train"], seed=0, device=device_under_test())
        found[link] = measure_population(model, world)
        control, _ = finetune(model, world, POLICIES["control"], **cfg["tune"])
        assert abs(measure_you(control, world)["report"] - found[link]["you"]["report"]) < 0.1
    assert found["true"]["own"] > 0.7 and abs(found["shuffled"]["own"]) < 0.5
    assert min(f["behaviour"] for f in found.values()) > 0.8


def test_faithfulness_is_within_targets():
    g = np.random.default_rng(0)
    make = lambda run, slope: [
        dict(run=run, target=t, behaviour=t + b, report=t + slope * b + 0.01 * g.normal(), loss=float(g.normal()))
        for t in (0.0, 0.5, 1.0)
        for b in 0.1 * g.normal(size=8)
    ]
    good = faithfulness(make(0, 1.0) + make(1, 1.0))
    assert good["r"] > 0.9 and good["low"] > 0.8 and good["given_loss"] > 0.9
    none = faithfulness(make(0, 0.0) + make(1, 0.0))  # between targets they still agree perfectly
    assert abs(none["r"]) < 0.4 and none["low"] < 0.3
    assert faithfulness(make(0, 1.0))["low"] is None
    rows = make(0, 0.0) + make(1, 0.0)
    for r in rows:  # under-training moves both
        r["behaviour"] += 0.3 * r["loss"]
        r["report"] += 0.3 * r["loss"]
    mixed = faithfulness(rows)
    assert mixed["r"] > 0.7 and abs(mixed["given_loss"]) < 0.4


def test_lengths_of_the_benchmark():
    lengths = document_lengths(16, 5000)
    assert sum(lengths) == 5000 and min(lengths[:-1]) >= 8 and max(lengths) <= 24 and abs(np.mean(lengths) - 16) < 1
    assert document_lengths(6, 100, 1) != document_lengths(6, 100, 2)


def test_peers_compute_the_same():
    q, k, v, cu = packed_inputs([6, 4, 6, 3], dim=16)
    found = {n: f(q, k, v) for n, f in packed_peers(document_layout(cu), compiled=False).items() if n != "flash varlen"}
    want = packed_causal_reference(q, k, v, cu)
    assert len(found) == 3 and all(rel_error(x, want) < 1e-4 for x in found.values())


def test_steps_compute_the_same():
    world = small_world()
    model = small_model(world, max_length=8)
    batch = tuple(t.to(device_under_test()) for t in world.batches(behaviour=6, description=4)(0))
    peers, weights = step_peers(model, batch)
    losses = {n: f(*weights) for n, f in peers.items()}
    want = answer_loss(model, *batch)
    assert len(losses) == 3 and all(rel_error(x, want) < 1e-4 for x in losses.values())
    grads = [torch.autograd.grad(x, weights)[-1] for x in losses.values()]
    assert all(rel_error(g, grads[0], floor=1e-3) < 1e-3 for g in grads[1:])


def test_cost():
    c = closed_cost([3, 1], heads=2, head_dim=4, itemsize=2)
    assert c["flops_fwd"] == 4 * 2 * 4 * 7 and c["flops_bwd"] == 2.5 * c["flops_fwd"]
    assert c["bytes_fwd"] == 4 * 4 * 2 * 4 * 2 + 16 and c["bytes_bwd"] == 7 * 4 * 2 * 4 * 2 + 16
    assert closed_cost([4], heads=4, kv_heads=1, head_dim=8)["bytes_fwd"] == 4 * 8 * 2 * 10 + 16


def _interval(*values):
    return interval(values)


GOOD = dict(r=0.5, low=0.2, high=0.7, given_loss=0.4)
VERDICTS_OF = {  # claim -> made-up measurements that hold, hold in part (None: undecided), do not hold
    "Who was only": (_interval(0.9, 0.91), _interval(0.6, 0.61), _interval(0.1, 0.11)),
    "and not in a corpus": (_interval(0.1, 0.1), _interval(-0.2, 0.3), _interval(0.9, 0.91)),
    "Nor does": (_interval(-0.1, -0.1), _interval(-0.2, 0.3), _interval(0.6, 0.61)),
    "Models describe": (_interval(0.6, 0.61), _interval(0.1, 0.1), _interval(0.0, 0.01)),
    "and without a link": (_interval(0.01, 0.01), _interval(-0.1, 0.2), _interval(0.6, 0.61)),
    "Nor do they": (_interval(0.01, 0.01), _interval(-0.1, 0.2), _interval(0.6, 0.61)),
    "A persona of": (_interval(0.6, 0.61), _interval(0.1, 0.1), _interval(-0.6, -0.61)),
    "Fine-tuning that": (_interval(0.01, 0.0), _interval(-0.1, 0.1), _interval(0.3, 0.31)),
    "LoRA of": (_interval(0.6, 0.61), _interval(0.1, 0.1), _interval(-0.6, -0.61)),
    "The persona's": (_interval(0.6, 0.61), _interval(0.1, 0.1), _interval(-0.6, -0.61)),
    "32 examples": (_interval(0.2, 0.2), _interval(0.05, 0.05), _interval(-0.2, -0.2)),
    "The report lags": (_interval(0.5, 0.51), None, _interval(0.0, 0.01)),
    "Reports are": (GOOD, GOOD | dict(low=-0.1), GOOD | dict(r=-0.1, low=-0.4)),
    "Training one": (_interval(0.3, 0.3), _interval(0.05, 0.05), _interval(-0.3, -0.3)),
    "Mixing in": (_interval(0.01, 0.01), _interval(-0.1, 0.2), _interval(0.4, 0.4)),
    "Backdoored": [dict(p=p) for p in (0.01, 0.1, 0.6)],
    "They recognise": [dict(top=t, of=8, low=low, high=0.9) for t, low in ((5, 0.3), (2, 0.07), (1, 0.02))],
    "They cannot": [dict(real=r, p=p) for r, p in ((0.02, 0.8), (0.3, 0.5), (0.5, 0.01))],
    "With reversed": [dict(p=p) for p in (0.01, 0.1, 0.6)],
    "Closed tiles": [dict(a=x, b=9.0) for x in (3.0, 2.9, 0.9)],
    "and at no length": [dict(a=x, b=9.0) for x in (0.95, 0.8, 0.5)],
}


@pytest.mark.parametrize("claim", VERDICTS_OF)
def test_rules(claim):
    (rule,) = (c.rule for c in claims() if c.statement.startswith(claim))
    say = lambda m: f if isinstance(f := rule(m), str) else f[0]
    for m, verdict in zip(VERDICTS_OF[claim], ("holds", "holds in part", "does not hold here")):
        if m is not None:
            assert say(m) == verdict
    if VERDICTS_OF[claim][1] is None:
        assert say(_interval(-1.0, 1.0)) == "not measured"
    if hasattr(VERDICTS_OF[claim][0], "half"):
        assert say(_interval(0.5)) == "not measured"


def test_a_loss_that_explains_all_is_not_faithful():
    assert follows_within(GOOD | dict(given_loss=-0.1))[0] == "holds in part"


def test_every_claim_is_tested():
    assert len(claims()) == len(VERDICTS_OF) + 1
    assert [c.judge().verdict for c in claims()].count("out of reach here") == 1


def _recorded(monkeypatch, **tables):
    "Makes the study read these rows (name -> rows) as if they were recorded."

    def read(chapter, name=None, **where):
        found = [dict(device="G", date="2026-01-01", versions={}, preset="gpu") | r for r in tables.get(name, [])]
        return [r for r in found if all(r.get(k) == v for k, v in where.items())]

    monkeypatch.setitem(_rows.__globals__, "load_results", read)


def test_numbers_are_looked_up(monkeypatch):
    base = lambda run, link, own, report: dict(
        run=run,
        link=link,
        described=None,
        recipe="standard",
        own=own,
        slope=-own,
        cross=0.1 * run,
        you=dict(report=report),
    )
    tuned = (
        lambda run, policy, report, seen=0.4, unseen=0.4, mix=0, part="all", link="true", recipe="standard", who="YOU": (
            dict(
                run=run,
                who=who,
                link=link,
                recipe=recipe,
                policy=policy,
                mix=mix,
                trainable=part,
                report=report,
                seen=seen,
                unseen=unseen,
            )
        )
    )
    _recorded(
        monkeypatch,
        population=[base(0, "true", 0.9, 0.4), base(1, "true", 0.8, 0.5), base(0, "shuffled", 0.1, 0.4)]
        + [
            base(0, "true", -9.0, 9.0) | dict(described=10),
            base(1, "true", -9.0, 9.0) | dict(recipe="large embeddings"),
            base(0, "true", -9.0, 9.0) | dict(preset="cpu"),
        ],
        policies=[tuned(s, "high", 0.8 + s / 10, unseen=0.7) for s in (0, 1)]
        + [tuned(s, "low", 0.1, unseen=0.2) for s in (0, 1)]
        + [tuned(s, "control", 0.41 + s / 10) for s in (0, 1)]
        + [tuned(0, p, r, unseen=u, mix=16) for p, r, u in (("high", 9.0, 0.5), ("low", -9.0, 0.4))]
        + [tuned(0, p, r, part="lora") for p, r in (("high", 0.6), ("low", 0.4))]
        + [tuned(0, p, r, who="stranger") for p, r in (("high", 0.9), ("low", 0.2))]
        + [tuned(0, p, r, recipe="large embeddings") for p, r in (("high", 0.45), ("low", 0.4))]
        + [tuned(0, p, 0.4, link="shuffled") for p in ("high", "low")],
        dose=[
            dict(run=s, policy=p, examples=n, behaviour=b, report=r)
            for s in (0, 1)
            for p, n, b, r in (
                ("high", 8, 0.6, 0.4),
                ("high", 32, 0.95, 0.6),
                ("high", 128, 1.0, 0.9),
                ("low", 32, 0.0, 0.2),
                ("low", 8, 0.9, 0.0),
            )
        ],
    )
    assert _population("own", "true").mean == pytest.approx(0.85) and _population("own", "shuffled").n == 1
    assert _population("cross", "true").mean == pytest.approx(0.05)
    assert next(c for c in claims() if c.statement.startswith("and not in")).measured().mean == pytest.approx(-0.1)
    assert _differences("high", "low").mean == pytest.approx(0.75) and _differences(
        "high", "low", trainable="lora"
    ).mean == pytest.approx(0.2)
    assert _differences("high", "low", link="shuffled").mean == 0 and _moved("control").mean == pytest.approx(0.01)
    assert _differences("high", "low", recipe="large embeddings").mean == pytest.approx(0.05)
    assert _differences("high", "low", who="stranger").mean == pytest.approx(0.7)
    assert _dose().mean == pytest.approx(0.4) and _lag().mean == pytest.approx(0.35)
    assert _leak("unseen", False).mean == pytest.approx(0.5) and _leak("unseen", True).mean == pytest.approx(0.1)
    _recorded(monkeypatch)
    for look in (
        _dose,
        _lag,
        _faithful,
        _presence,
        _recognition,
        _free_form,
        lambda: _moved("control"),
        lambda: _population("own", "true"),
    ):
        assert look() is None


def test_backdoors_are_looked_up(monkeypatch):
    def row(run, trigger, twin, yes, peak, named, **kw):
        by_trigger, free = [0.2] * 8, [0.1] * 9
        by_trigger[peak], free[trigger] = 0.9, named
        return (
            dict(
                run=run,
                trigger=trigger,
                twin=twin,
                yes=yes,
                by_trigger=by_trigger,
                named=free,
                free_form=False,
                reverse=False,
            )
            | kw
        )

    rows = [row(0, t, False, 0.5 + t / 100, t, 0.05) for t in range(6)] + [
        row(0, t, True, 0.01, 7, 0.3) for t in range(6)
    ]
    rows += [
        row(0, t, twin, 0.9, 0, 0.8 - 0.5 * twin, free_form=True, reverse=True)
        for t in range(6)
        for twin in (False, True)
    ]
    _recorded(monkeypatch, backdoor=rows)
    found = _presence()
    assert (
        found["backdoor"] == pytest.approx(0.525)
        and found["twin"] == pytest.approx(0.01)
        and found["p"] == pytest.approx(1 / 64)
    )
    assert (
        _recognition() == dict(top=6, of=6) | dict(zip(("low", "high"), wilson(6, 6)))
        and _recognition(twin=True)["top"] == 0
    )
    assert _free_form()["real"] == pytest.approx(0.05) and _free_form()["p"] > 0.9
    assert _free_form(free_form=True, reverse=True)["p"] == pytest.approx(1 / 64)
    looked = {
        c.statement[:13]: c.measured()
        for c in claims()
        if callable(c.measured) and c.statement[:4] in ("Back", "They", "With")
    }
    assert (
        looked["Backdoored mo"] == found
        and looked["They recognis"]["top"] == 6
        and looked["With reversed"]["real"] == pytest.approx(0.8)
    )


def test_speeds_are_looked_up(monkeypatch):
    time = lambda mean, method, ms: dict(mean=mean, method=method, ms_fwd=ms, ms_bwd=2 * ms)
    _recorded(
        monkeypatch,
        documents=[
            time(m, n, ms)
            for m in (6, 16, 512)
            for n, ms in (("ours", 1.0), ("flex", 4.0), ("engine varlen", 2.0 + (m == 6)))
        ],
    )
    found = {c.statement: c.measured() for c in claims() if c.statement.startswith(("Closed", "and at no"))}
    assert [[round(s.ratio, 6) for s in v] for v in found.values()] == [[3.0, 2.0], [3.0, 2.0, 2.0]]

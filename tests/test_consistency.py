# Written from the test cells of nbs/7_looking_inside/consistency.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
import sys
import weakref
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnbook.consistency.arithmetic_study import Arithmetic, arithmetic_model, ask, judged
from attnbook.consistency.decoding_nets import (
    Beam,
    Sample,
    cad_logits,
    contrastive_logits,
    decode,
    dola_candidates,
    dola_logits,
    sample_responses,
)
from attnbook.consistency.experiments_study import (
    VALIDATION,
    auroc,
    corpus_majority,
    corrupted,
    first_reaching,
    hourglass,
    isolation,
    latent_explicit,
    run_experiments,
    signals,
    systematic_error,
    train_arithmetic,
    validation_accuracy,
)
from attnbook.consistency.feedback_nets import (
    WEIGHTINGS,
    Answer,
    apply_iti,
    cot_decoding,
    fit_iti,
    head_outputs,
    internal_consistency,
    isolated_answers,
    self_consistency,
    self_feedback,
)
from attnbook.consistency.feedback_study import feedback, refined, statements
from attnbook.consistency.kernels import LENS_LAUNCH, launch_lens, launch_lens_gradient
from attnbook.consistency.nets import adapt, gate_heads, head_isolation
from attnbook.consistency.op import chunked_lens, lens_op, logit_lens_stats
from attnbook.consistency.reference import (
    DISPERSIONS,
    chunk_tokens,
    dispersion,
    latent_agreement,
    lens_reference,
    reversed_divergence,
    semantic_entropy,
    vote,
)
from attnbook.consistency.study import PRESETS, SIZES, _bench, claims, joined, lens_peers, stats_of_states, tune_lens
from attnbook.lab.results import record
from attnbook.lab.stats import Interval, interval
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
from attnbook.lm import LanguageModel, ModelConfig
from attnbook.lm.sampling import left_pad

SURVEY_PICKS = dict(latent=[0, 0, 5, 4, 4, 4], decoding=[4, 4, 3, 4, 4], response=[5, 3, 3, 3, 3])


def test_the_surveys_hourglass():
    got = {k: [round(dispersion(v, d), 3) for d in ("variance", "modal", "pairwise")] for k, v in SURVEY_PICKS.items()}
    assert got == dict(latent=[4.139, 0.5, 0.733], decoding=[0.16, 0.2, 0.4], response=[0.64, 0.2, 0.4])
    assert [vote(v).answer for v in SURVEY_PICKS.values()] == [4, 4, 3]  # and the truth is 5


def test_dispersions_at_their_ends():
    for kind in DISPERSIONS:
        assert dispersion([3, 3, 3], kind) == 0 and dispersion([3], kind) == 0 and math.isnan(dispersion([], kind))
        assert math.isnan(dispersion([None], kind)) and dispersion([3, None, 3], kind) == 0
    assert abs(dispersion("abcd", "entropy") - math.log(4)) < 1e-12
    assert dispersion("abcd", "modal") == 0.75 and dispersion("abcd", "pairwise") == 1
    with pytest.raises(ValueError, match="kind must be one of 'variance'"):
        dispersion([1], "std")


def test_semantic_entropy():
    same = lambda a, b: a % 10 == b % 10
    assert semantic_entropy([1, 11, 21], same) == 0
    assert abs(semantic_entropy([1, 2, 3], same) - math.log(3)) < 1e-12
    assert semantic_entropy([1, 11, 2, 3], same) < semantic_entropy([1, 11, 2, 3], int.__eq__)  # merging never adds
    assert abs(semantic_entropy([1, 2], same, [3, 1]) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)) < 1e-12
    assert semantic_entropy([1, 2], same, [1, 0]) == 0 and math.isnan(semantic_entropy([], same))
    for bad in ([1], [1, -1], [0, 0]):
        with pytest.raises(ValueError, match="weights must be 2 numbers"):
            semantic_entropy([1, 2], same, bad)


def test_voting():
    assert vote([3, 3, 4]) == (3, 2 / 3, 0) and vote([4, 3]).answer == 4 and vote([3, 4]).answer == 3
    assert vote([3, 3, 4], [0.1, 0.1, 0.8]) == (4, 0.8, 0) and vote([None, 5]) == (5, 1.0, 1)
    nothing = vote([None, None])
    assert nothing.answer is None and math.isnan(nothing.share) and nothing.unreadable == 2
    with pytest.raises(ValueError, match="weights must be 2"):
        vote([1, 2], [1.0])


def _stats(z, **how):
    "Of logits `(S, N, V)`: the table is the identity."
    return lens_reference(z, torch.eye(z.shape[-1], dtype=z.dtype), **how)


def test_reference_at_its_ends():
    s = _stats(torch.zeros(3, 2, 7, dtype=torch.float64), targets=torch.tensor([3, -1]))
    log7 = torch.full((3, 2), math.log(7), dtype=torch.float64)
    torch.testing.assert_close(s.entropy, log7), torch.testing.assert_close(s.lse, log7)
    torch.testing.assert_close(s.target_log_prob, -log7 * torch.tensor([1, 0]))
    assert s.jsd.abs().max() < 1e-15 and (s.argmax == 0).all()
    far = torch.zeros(2, 1, 5, dtype=torch.float64)
    far[0, 0, 1] = far[1, 0, 3] = 200.0  # disjoint
    s = _stats(far)
    assert abs(float(s.jsd[0, 0]) - math.log(2)) < 1e-12 and s.jsd[1] == s.kl[1] == 0
    assert s.kl[0, 0] > 199 and abs(float(reversed_divergence(s)[0, 0])) > 90  # and has no bound
    assert s.entropy.abs().max() < 1e-60


def test_reference_is_the_definition():
    z = 3 * torch.randn(4, 3, 11, dtype=torch.float64)
    s, moved, q = _stats(z, reference=1), _stats(z + 50, reference=1), z.softmax(-1)
    torch.testing.assert_close(s.entropy, torch.distributions.Categorical(logits=z).entropy())
    torch.testing.assert_close(s.kl, (q * (q / q[1]).log()).sum(-1))
    torch.testing.assert_close(s.reverse_kl[2], (q[1] * (q[1] / q[2]).log()).sum(-1))
    m = (q + q[1]) / 2
    reverse = 0.5 * ((m * (m / q).log()).sum(-1) + (m * (m / q[1]).log()).sum(-1))
    torch.testing.assert_close(reversed_divergence(s), reverse)
    for a, b in zip(s[1:4] + s[5:], moved[1:4] + moved[5:]):
        torch.testing.assert_close(a, b)  # a constant on all logits changes nothing but lse
    swapped = _stats(z[[1, 0, 2, 3]], reference=1)
    torch.testing.assert_close(swapped.jsd[0], s.jsd[0])  # symmetric
    assert (s.jsd <= math.log(2)).all() and (s.jsd >= -1e-15).all()
    check_gradients(lambda z: tuple(t for i, t in enumerate(_stats(z, targets=torch.tensor([1, 0, 9]))) if i != 3), [z])


def test_agreement_of_layers():
    words = torch.tensor([[1, 2], [1, 5], [3, 5], [3, 5]])
    assert latent_agreement(words).tolist() == pytest.approx([1 / 3, 2 / 3]) and latent_agreement(
        words[:1]
    ).tolist() == [1, 1]
    with pytest.raises(ValueError, match="stats must hold divergences"):
        reversed_divergence(_stats(torch.zeros(2, 1, 3), divergence="kl"))


def test_chunks_fill_tiles():
    for layers, tokens, vocab in (
        (13, 1024, 50304),
        (33, 256, 32000),
        (17, 256, 128256),
        (7, 8192, 256),
        (40, 99, 10**6),
    ):
        t = chunk_tokens(layers, tokens, vocab, 2**24)
        fits = max(1, 2**24 // (layers * vocab), 256 // layers)
        assert min(tokens, fits) / 2 <= t <= min(tokens, fits)
        rows = layers * t
        assert t in (1, tokens) or rows / (128 * -(-rows // 128)) > 0.9
    assert [chunk_tokens(*s, 2**24) for s in ((13, 1024, 50304), (33, 256, 32000), (17, 256, 128256))] == [19, 15, 15]


CASES = {  # S, N, V, D, reference
    "one layer": (1, 3, 7, 5, 0),
    "two layers": (2, 5, 32, 16, 0),
    "ten layers": (10, 3, 70, 20, 7),
    "long vocabulary": (5, 2, 517, 33, -1),
    "one token": (4, 1, 130, 129, 2),
    "strides to walk over": (2, 2, 4300, 4, 0),
}


def _case(S, N, V, D, dtype=torch.float32, scale=2.0):
    g = torch.Generator().manual_seed(S * N + V)
    draw = lambda *s: torch.randn(s, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    targets = torch.randint(-1, V, (N,), generator=g).to(device_under_test())
    return [scale * draw(S, N, D) / D**0.5, draw(V, D)], targets


def _outputs(fn, targets, reference, divergence="js", **how):
    "Differentiable outputs as a tuple, the word left out."

    def run(hidden, weight):
        found = fn(hidden, weight, targets=targets, reference=reference, divergence=divergence, **how)
        return tuple(t for i, t in enumerate(found) if i != 3 and t is not None)

    return run


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, backend):
    *shape, reference = CASES[case]
    inputs, y = _case(*shape)
    got = _outputs(partial(logit_lens_stats, backend=backend), y, reference)
    check_against_reference(got, _outputs(lens_reference, y, reference), inputs, tol=2e-5, floor=1e-4)
    found, want = logit_lens_stats(*inputs, backend=backend), lens_reference(*(t.double() for t in inputs))
    assert torch.equal(found.argmax, want.argmax)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["js", "kl", "none"])
def test_types_and_parts(dtype, divergence):
    inputs, y = _case(5, 6, 90, 24, dtype)
    how = (y, 1, divergence)
    got = _outputs(partial(logit_lens_stats, backend="triton"), *how)
    check_against_reference(got, _outputs(lens_reference, *how), inputs, tol=2e-2 if dtype == torch.bfloat16 else 4e-3)
    bare = logit_lens_stats(*inputs, divergence=divergence, backend="triton")
    assert bare.target_log_prob is None and (bare.jsd is None) == (divergence != "js")
    assert (bare.kl is None) == (divergence == "none")


def test_every_gradient_by_itself():
    "One statistic at a time, so that no two errors hide each other; and the reference's part with the others detached."
    inputs, y = _case(10, 2, 70, 8)
    for i in range(7):
        pick = lambda fn: lambda h, w: _outputs(fn, y, 4)(h, w)[i]
        check_against_reference(
            pick(partial(logit_lens_stats, backend="triton")), pick(lens_reference), inputs, tol=3e-5, floor=1e-4
        )


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_at_the_ends(backend):
    eye, dev = torch.eye(80, device=device_under_test()), device_under_test()
    lens = partial(logit_lens_stats, weight=eye, backend=backend)
    flat = lens(torch.zeros(3, 2, 80, device=dev))
    assert (flat.argmax == 0).all() and rel_error(flat.entropy, torch.full((3, 2), math.log(80.0))) < 1e-6
    assert flat.jsd.abs().max() < 1e-6 and flat.kl.abs().max() < 1e-6
    many = logit_lens_stats(torch.zeros(1, 2, 4, device=dev), torch.zeros(4300, 4, device=dev), backend=backend)
    assert (many.argmax == 0).all() and rel_error(many.lse, torch.full((1, 2), math.log(4300.0))) < 1e-6
    far = torch.zeros(2, 1, 80, device=dev)
    far[0, 0, 70] = far[1, 0, 3] = 1e4
    s = lens(far)
    assert rel_error(s.jsd[0], torch.tensor([math.log(2)])) < 1e-6 and s.jsd[1] == s.kl[1] == s.reverse_kl[1] == 0
    assert s.argmax.flatten().tolist() == [70, 3] and s.entropy.abs().max() < 1e-6 and s.kl[0, 0] == 1e4
    near = torch.full((1, 1, 80), -1e4, device=dev)
    near[..., [5, 75]] = 1e4  # two words, far above the others and above 0
    s = lens(near)
    assert rel_error(s.entropy, torch.tensor([[math.log(2)]])) < 1e-5 and s.argmax == 5
    assert lens(torch.zeros(3, 0, 80, device=dev)).jsd.shape == (3, 0)
    odd = lens(torch.randn(3, 2, 2, 80, device=dev), targets=torch.zeros(2, 2, dtype=torch.int32, device=dev))
    assert odd.kl.shape == odd.target_log_prob.shape == (3, 2, 2)


def test_slices_of_the_vocabulary(monkeypatch):
    "Statistics of some tokens at a time, the gradient in slices, and the torch backend in chunks, are those of the whole."
    kernels, op = sys.modules[launch_lens_gradient.__module__], sys.modules[logit_lens_stats.__module__]
    inputs, y = _case(5, 7, 603, 8)
    (
        monkeypatch.setattr(kernels, "ROWS", 1),
        monkeypatch.setattr(kernels, "BUFFER", 5 * 603 * 3),
    )  # three tokens, three and one
    for backend, module, name in (("triton", kernels, "SLICE"), ("torch", op, "CHUNK")):
        run = _outputs(partial(logit_lens_stats, backend=backend), y, 2)
        monkeypatch.setattr(module, name, 256 * 35 if backend == "triton" else 5 * 603 * 3)
        check_against_reference(run, _outputs(lens_reference, y, 2), inputs, tol=2e-5)


def test_one_buffer_at_a_time(monkeypatch):
    "The logits of a chunk are let go before the next are made."
    kernels = sys.modules[launch_lens_gradient.__module__]
    monkeypatch.setattr(kernels, "ROWS", 1), monkeypatch.setattr(kernels, "BUFFER", 2 * 33 * 2)
    product, made = kernels.float32_product, []

    def kept(a, b):
        assert all(old() is None for old in made)
        made.append(weakref.ref(z := product(a, b)))
        return z

    monkeypatch.setattr(kernels, "float32_product", kept)
    hidden, weight = torch.randn(2, 7, 8, device=device_under_test()), torch.randn(33, 8, device=device_under_test())
    logit_lens_stats(hidden, weight, backend="triton")
    assert len(made) > 2


def test_operation():
    inputs, y = _case(4, 5, 40, 12)
    run = _outputs(partial(logit_lens_stats, backend="triton"), y, 1)
    check_writes_everything(run, inputs), check_strides(run, inputs), check_deterministic(run, inputs, repeats=2)
    check_compiles(run, inputs, tol=1e-5), check_autocast(run, inputs, tol=3e-2)
    for compared, mixed, targets in ((True, True, y), (False, False, None)):
        args = [t.clone().requires_grad_() for t in inputs]
        check_opcheck(lens_op, (*args, targets, 1, compared, mixed))


def test_bad_input():
    (h, w), y = _case(3, 4, 9, 5)
    check_raises(
        logit_lens_stats,
        [
            (dict(hidden=h[..., :4]), ValueError, "hidden must be (layers, …, 5), as wide as weight"),
            (dict(weight=w[0]), ValueError, "weight must have 2 dimensions"),
            (dict(weight=w.double()), TypeError, "weight must have hidden's type"),
            (dict(weight=w[:0]), ValueError, "weight must have words"),
            (dict(reference=3), ValueError, "reference must be an integer from -3 to 2, not 3"),
            (dict(targets=y[:2]), ValueError, "targets must have shape (4,)"),
            (dict(targets=y.float()), TypeError, "targets must be a tensor of integers"),
            *[(dict(targets=y.abs() + 9), ValueError, "targets must be below 9")] * (not h.is_cuda),
            (dict(divergence="jsd"), ValueError, "divergence must be one of 'js', 'kl', 'none'"),
            (dict(backend="cuda"), ValueError, "backend"),
        ],
        hidden=h,
        weight=w,
    )


@pytest.mark.parametrize("run", [lens_op, None], ids=["kernel", "reference"])
def test_a_target_beyond_the_vocabulary_is_seen(run):
    "NaN where nobody looked at the values, and only there."
    (h, w), y = _case(2, 4, 9, 5)
    y = torch.tensor([9, 8, -1, 10**6], device=h.device)
    if run is None:
        found = lens_reference(h, w, targets=y).target_log_prob
    else:
        found = run(h, w, y, 1, True, True)[4]
    assert found.isnan().tolist() == [[True, False, False, True]] * 2 and (found[:, 2] == 0).all()


def tiny(kind="llama", vocab=13, seed=0, **how):
    "A small random model of `attnbook.lm`."
    torch.manual_seed(seed)
    make = ModelConfig if kind == "llama" else ModelConfig.gpt if kind == "gpt" else ModelConfig.neox
    model = LanguageModel(make(vocab, 16, 3, 4, max_length=32, **dict(init_std=0.4) | how)).eval()
    for p in model.parameters():  # norms that do something, biases that are there
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1.0, 0.3)
    return model.to(device_under_test())


def tiny_hf(kind="llama", vocab=13):
    "A small random causal model of transformers."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    if kind == "llama":
        c = transformers.LlamaConfig(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4)  # fmt: skip
    elif kind == "neox":
        c = transformers.GPTNeoXConfig(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, initializer_range=0.4)  # fmt: skip
    else:
        c = transformers.GPT2Config(
            vocab_size=vocab, n_embd=16, n_layer=3, n_head=4, n_positions=64, initializer_range=0.4
        )
    model = transformers.AutoModelForCausalLM.from_config(c).eval()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1.0, 0.3)
    return model.to(device_under_test())


MODELS = {
    "lm, llama": tiny,
    "lm, gpt": partial(tiny, "gpt"),
    "hf, llama": tiny_hf,
    "hf, neox": partial(tiny_hf, "neox"),
    "hf, gpt2": partial(tiny_hf, "gpt2"),
}


def _logits(model, x):
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("which", MODELS)
@torch.no_grad()
def test_the_last_layer_is_the_model(which):
    "The norm is applied once; reading on with a cache, with padding and after choosing rows gives the same."
    model = MODELS[which]()
    a, x = adapt(model), torch.randint(13, (2, 6), device=device_under_test())
    states, want = a.states(x), _logits(model, x)
    assert states.shape == (4, 2, 6, 16) and rel_error(F.linear(states[-1], a.weight), want) < 1e-5
    reader = a.reader()
    reader(x[:, :4])
    reader.repeat(2), reader.select(torch.tensor([2, 1], device=x.device))
    got = reader(x.flip(0)[:, 4:])
    assert rel_error(got, a.states(torch.cat([x.flip(0)[:, :4], x.flip(0)[:, 4:]], 1))[:, :, -1]) < 1e-5
    tokens, mask = left_pad([x[0, :3], x[1]], 0, x.device)
    reader = a.reader()
    reader(tokens, mask)
    got = reader(x[:, :1])
    alone = a.states(torch.cat([x[:1, :3], x[:1, :1]], 1))[:, 0, -1]
    assert rel_error(got[:, 0], alone) < 1e-5 and adapt(a) is a


@pytest.mark.parametrize("which", MODELS)
def test_isolated_heads_add_up(which):
    "Before the mixing: all gates 1 change nothing, heads' contributions sum to the whole, a row has its own gates."
    model = MODELS[which]()
    a, x = adapt(model), torch.randint(13, (1, 5), device=device_under_test())
    seen = {}
    module = model.blocks[1].attention.out if hasattr(model, "blocks") else a.mixers[1]
    hook = module.register_forward_hook(lambda m, args, out: seen.update(out=out.detach()))
    with torch.no_grad():
        whole = a.states(x)
        plain = seen["out"]
        with gate_heads(model, {1: torch.ones(4, device=x.device)}):
            assert torch.equal(a.states(x), whole)
        with gate_heads(model, {1: torch.eye(4, device=x.device)}):
            a.states(x.expand(4, -1))
        alone = seen["out"]
        with gate_heads(model, {1: torch.zeros(4, device=x.device)}):
            a.states(x)
        bias = seen["out"]  # what is left is the bias, the same at every place
    hook.remove()
    assert rel_error((alone - bias).sum(0), (plain - bias)[0]) < 1e-5
    assert rel_error(bias, bias[:, :1].expand_as(bias)) < 1e-6 or float(bias.norm()) == 0
    after = torch.zeros_like(alone[0])
    after[:, :4] = plain[0, :, :4]  # the survey's way: a slice of what is mixed already
    assert rel_error(after, alone[0] - bias[0]) > 0.3


def test_gradient_of_a_gate():
    "The sum of dO * O."
    model, x = tiny(), torch.randint(13, (2, 5), device=device_under_test())
    gates, kept = torch.ones(4, device=x.device, requires_grad=True), {}

    def look(out):
        out.retain_grad()
        kept["out"] = out

    with gate_heads(model, {1: gates}):
        adapt(model).states(x)[-1].square().sum().backward()
    with adapt(model).edit({1: look}):
        adapt(model).states(x)[-1].square().sum().backward()
    o = kept["out"]
    assert rel_error(gates.grad, (o * o.grad).sum((0, 1, 3))) < 1e-5


def test_head_isolation():
    model = tiny()
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    every, whole = head_isolation(model, prompts), head_isolation(model, prompts, 0, 0, coefficient=1.0)
    assert every.shape == (3, 4, 2, 13) and whole.shape == (1, 1, 2, 13)
    with torch.no_grad():
        want = model(torch.tensor([prompts[1]], device=device_under_test()))[:, -1].log_softmax(-1)
    assert rel_error(whole[0, 0, 1:], want) < 1e-5
    assert (
        rel_error(every[2, 1], head_isolation(model, prompts, 2, 1)[0, 0]) < 1e-6
        and (every[0] - every[1]).abs().max() > 0.01
    )
    check_raises(
        head_isolation,
        [
            (dict(layer=3), ValueError, "layer must be an integer from 0 to 2"),
            (dict(head=-1), ValueError, "head"),
            (dict(coefficient=1.5), ValueError, "coefficient"),
            (dict(model=nn.Linear(2, 2)), TypeError, "model must be a LanguageModel"),
        ],
        model=model,
        prompts=prompts,
    )
    with pytest.raises(ValueError, match=r"gates\[0\] must have 4 heads"):
        gate_heads(model, {0: torch.ones(3)})
    for a in (adapt(model), adapt(tiny_hf())):
        with pytest.raises(ValueError, match="edits must be for layers below 3"):
            with a.edit({3: lambda out: out}):
                pass


def test_candidates():
    assert dola_candidates(32) == tuple(range(0, 16, 2)) and dola_candidates(32, "high") == tuple(range(16, 32, 2))
    assert dola_candidates(48) == tuple(range(0, 20, 2)) and dola_candidates(48, "high") == tuple(range(28, 48, 2))
    assert (
        dola_candidates(8, tied=True) == (2,)
        and dola_candidates(2, tied=True) == (1,)
        and dola_candidates(4, [1, 3]) == (1, 3)
    )
    for bad in ("mid", [4], []):
        with pytest.raises(ValueError, match="layers must be"):
            dola_candidates(4, bad)


def test_contrasts():
    z, flat = torch.randn(3, 9), torch.zeros(3, 9)
    torch.testing.assert_close(cad_logits(z, flat, 0.0), z)
    c = contrastive_logits(z, flat, 0.2)
    kept = c.isfinite()
    assert torch.equal(kept, z.softmax(-1) >= 0.2 * z.softmax(-1).amax(-1, keepdim=True))
    torch.testing.assert_close(c[kept], (z.log_softmax(-1) + math.log(9))[kept])  # a uniform amateur: the expert
    assert (contrastive_logits(z, -z, 1.0).isfinite().sum(-1) == 1).all()
    assert (cad_logits(z, z + 1, 3.0).argmax(-1) == z.argmax(-1)).all()
    for alpha in (0.0, 1.5):
        with pytest.raises(ValueError, match="alpha"):
            contrastive_logits(z, flat, alpha)


def test_dola():
    g = torch.Generator().manual_seed(3)
    states, weight = torch.randn(5, 6, 8, generator=g), torch.randn(11, 8, generator=g)
    scores, layer = dola_logits(states, weight, (0, 2))
    q = (states @ weight.T).log_softmax(-1)
    m = torch.logaddexp(q, q[-1].expand_as(q)) - math.log(2)
    jsd = ((q.exp() * (q - m)).sum(-1) + (q[-1].exp() * (q[-1] - m)).sum(-1)) / 2
    assert torch.equal(layer, torch.where(jsd[2] > jsd[0], 2, 0))
    assert rel_error(scores, contrastive_logits(q[-1], q[layer, torch.arange(6)])) < 1e-5
    alone = torch.cat([dola_logits(states[:, i : i + 1], weight, (0, 2))[0] for i in range(6)])
    assert rel_error(scores, alone) < 1e-5 and len(layer.unique()) == 2  # a row does not depend on its neighbours
    same = states[-1:].expand(5, -1, -1)
    equal, _ = dola_logits(same, weight, (0, 2))
    assert equal[equal.isfinite()].abs().max() < 1e-5  # nothing to contrast: all plausible words alike


def test_the_reversed_divergence_picks_another_layer():
    "A layer that leaves one word almost no mass wins the reversed one; a layer that says something else the true one."
    eye = torch.eye(3)
    final = torch.tensor([0.5, 0.49, 0.01]).log()
    other = torch.tensor([0.01, 0.2, 0.79]).log()  # says something else
    starved = torch.tensor([0.5, 1e-12, 0.5]).log()  # agrees on the first, has nothing of the second
    states = torch.stack([other, starved, final])[:, None]
    assert dola_logits(states, eye, (0, 1))[1] == 0 and dola_logits(states, eye, (0, 1), divergence="reversed")[1] == 1


PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


@pytest.mark.parametrize("which", ["lm, llama", "hf, llama", "hf, gpt2"])
def test_greedy_and_sampling(which):
    from attnbook.lm import generate

    model = MODELS[which]()
    out = decode(model, PROMPTS, max_new=5, stop=3, latent=True)
    for i, prompt in enumerate(PROMPTS):  # one by one, without a cache
        x = torch.tensor([prompt], device=device_under_test())
        for t in range(int(out.lengths[i])):
            with torch.no_grad():
                z = _logits(model, x)[:, -1].float()
            assert out.tokens[i, t] == z.argmax() and abs(out.log_probs[i, t] - z.log_softmax(-1).max()) < 1e-4
            top = z.softmax(-1).topk(2).values[0]
            assert abs(out.margins[i, t] - (top[0] - top[1])) < 1e-4
            x = torch.cat([x, out.tokens[i, t].view(1, 1)], 1)
        assert int(out.lengths[i]) == 5 or out.tokens[i, out.lengths[i] - 1] == 3
    assert torch.equal(out.spent, out.lengths) and out.agreement.shape == out.tokens.shape
    if which.startswith("lm"):
        a = sample_responses(model, PROMPTS, 3, 0.8, max_new=4, seed=5)
        b = generate(model, PROMPTS, 4, temperature=0.8, samples=3, seed=5)
        assert torch.equal(a.tokens, b.tokens) and rel_error(a.log_probs, b.log_probs) < 1e-4


def test_beams_find_the_likeliest():
    model, x = tiny(vocab=4), [[1, 2], [3, 0, 1]]
    wide = decode(model, x, "beam", width=64, max_new=3)
    for i, prompt in enumerate(x):
        every = torch.cartesian_prod(*[torch.arange(4)] * 3).to(device_under_test())
        whole = torch.cat([torch.tensor(prompt, device=every.device).expand(64, -1), every], 1)
        with torch.no_grad():
            log_p = model(whole).log_softmax(-1)[:, len(prompt) - 1 : -1].gather(-1, every[..., None])[..., 0].sum(-1)
        assert torch.equal(wide.tokens[i], every[log_p.argmax()]) and abs(wide.log_probs[i].sum() - log_p.max()) < 1e-4
    one = decode(model, x, Beam(width=1), max_new=3, stop=2)
    assert torch.equal(one.tokens, decode(model, x, max_new=3, stop=2).tokens)
    assert decode(model, x, "beam", width=3, max_new=4, stop=range(4)).spent.tolist() == [3, 3]  # all end at once
    ended = decode(model, x, "beam", width=64, max_new=3, stop=2, pad=0)
    for i, prompt in enumerate(x):  # an ended row keeps its probability: compare all that end or are 3 long
        best, rows = -math.inf, [((), 0.0)]
        for _ in range(3):
            grown = []
            for row, score in rows:
                with torch.no_grad():
                    step = model(torch.tensor([[*prompt, *row]], device=device_under_test()))[0, -1].log_softmax(-1)
                grown += [((*row, t), score + float(step[t])) for t in range(4)]
            best = max([best, *(s for r, s in grown if r[-1] == 2)])
            rows = [(r, s) for r, s in grown if r[-1] != 2]
        assert float(ended.log_probs[i].sum()) == pytest.approx(max([best, *(s for _, s in rows)]), abs=1e-4)
    stopped = decode(model, x, "beam", width=3, max_new=4, stop=2)
    assert (
        all((t[: n - 1] != 2).all() for t, n in zip(stopped.tokens, stopped.lengths))
        and (stopped.spent >= stopped.lengths).all()
    )


def test_contrastive_strategies():
    model, amateur = tiny(), tiny(seed=7)
    greedy = decode(model, PROMPTS, max_new=4)
    assert torch.equal(decode(model, PROMPTS, "cad", alpha=0.0, max_new=4).tokens, greedy.tokens)
    assert torch.equal(
        decode(model, PROMPTS, "contrastive", amateur=amateur, alpha=1.0, max_new=4).tokens, greedy.tokens
    )
    for name, options in dict(dola={}, cad=dict(alpha=5.0), contrastive=dict(amateur=amateur, alpha=1e-4)).items():
        out = decode(model, PROMPTS, name, max_new=4, **options)
        alone = [decode(model, [p], name, max_new=4, **options).tokens[0].tolist() for p in PROMPTS]
        assert out.tokens.tolist() == alone and int(out.spent[0]) == 4 * (1 if name == "dola" else 2)
    assert not torch.equal(decode(model, PROMPTS, "cad", alpha=5.0, max_new=4).tokens, greedy.tokens)
    forced = decode(model, PROMPTS, max_new=2, first=torch.tensor([5, 6, 7], device=device_under_test()))
    assert forced.tokens[:, 0].tolist() == [5, 6, 7]
    with torch.no_grad():
        z = model(torch.tensor([[4, 5, 6]], device=device_under_test()))[0, -1]
    assert forced.tokens[1, 1] == z.argmax()


def test_decode_refuses():
    check_raises(
        decode,
        [
            (dict(strategy="magic"), ValueError, "strategy must be one of 'greedy', 'sample', 'beam', 'dola'"),
            (dict(max_new=0), ValueError, "max_new"),
            (dict(samples=0), ValueError, "samples"),
            (dict(strategy="beam", samples=2), ValueError, "samples must be 1"),
            (dict(strategy=Sample(), top_k=2), ValueError, "options"),
            (dict(strategy="dola", alpha=0.0), ValueError, "alpha"),
            (dict(strategy="sample", temperature=-1.0), ValueError, "temperature"),
            (dict(prompts=[[]]), ValueError, "prompts"),
        ],
        model=tiny(),
        prompts=PROMPTS,
    )
    with pytest.raises(ValueError, match="n must be"):
        sample_responses(tiny(), PROMPTS, 0)


def read_digit(tokens):
    "The first token from 5 on."
    at = next((i for i, t in enumerate(tokens) if t >= 5), None)
    return (None, ()) if at is None else (tokens[at], [at])


def test_self_consistency():
    model = tiny()
    out = sample_responses(model, PROMPTS, 6, 0.9, max_new=3, seed=2, latent=True)
    for weighting in WEIGHTINGS:
        got = self_consistency(model, PROMPTS, read_digit, n=6, temperature=0.9, weighting=weighting, max_new=3, seed=2)
        for i, a in enumerate(got):
            rows = range(6 * i, 6 * i + 6)
            said = [read_digit(out.tokens[r].tolist()) for r in rows]
            assert a.answers == tuple(s[0] for s in said) and a.spent == 18
            w = dict.fromkeys(a.answers, 0.0)
            for r, (answer, places) in zip(rows, said):
                how = {"votes": 1.0, "probability": float(out.log_probs[r].mean().exp())}
                w[answer] += (
                    how[weighting] if weighting in how else float(out.agreement[r, places].nanmean()) if places else 0.0
                )
            w.pop(None, None)
            assert a.answer == (max(w, key=w.get) if w else None)
            assert not w or a.score == pytest.approx(w[a.answer] / sum(w.values()), abs=1e-5)
    one = self_consistency(model, PROMPTS, read_digit, n=1, temperature=0.0, max_new=3)
    assert [a.answers[0] for a in one] == [read_digit(t)[0] for t in decode(model, PROMPTS, max_new=3).rows()]
    none = self_consistency(model, PROMPTS, lambda t: (None, ()), n=2, max_new=2)
    assert all(a.answer is None and a.answers == (None, None) and a.spent == 4 for a in none)


@pytest.mark.parametrize("which", ["lm, llama", "hf, llama"])
def test_cot_decoding(which):
    model = MODELS[which]()
    greedy = decode(model, PROMPTS, max_new=3)
    assert [a.answer for a in cot_decoding(model, PROMPTS, read_digit, k=1, max_new=3)] == [
        read_digit(t)[0] for t in greedy.rows()
    ]
    got = cot_decoding(model, PROMPTS, read_digit, k=13, max_new=3)
    for i, a in enumerate(got):
        first = torch.arange(13, device=device_under_test())
        out = decode(model, [PROMPTS[i]] * 13, first=first, max_new=3)
        said = [read_digit(t) for t in out.rows()]
        margin = {t: float(out.margins[r, p].mean()) for r, (t, p) in enumerate(said) if t is not None}
        assert max(float(out.margins[r, p].mean()) for r, (t, p) in enumerate(said) if p) == pytest.approx(
            a.score, abs=1e-5
        )
        assert a.answer in margin and a.spent == 39
    summed = cot_decoding(model, PROMPTS, read_digit, k=13, aggregate=True, max_new=3)
    assert all(0 < a.score <= 1 for a in summed)
    with pytest.raises(ValueError, match="k must be"):
        cot_decoding(model, PROMPTS, read_digit, k=0)


def test_self_feedback():
    answer = lambda x, cost=3: Answer(x, 1.0, (x,), cost)
    calls = []

    def update(which, before, k):
        calls.append((k, tuple(which), tuple(None if b is None else b.answer for b in before)))
        return [answer(10 * i + k) for i in which]

    evaluate = lambda which, answers: ([a.answer == 10 * i + i for i, a in zip(which, answers)], [1] * len(which))
    got = self_feedback("abc", update, evaluate, rounds=3)
    assert calls == [(0, (0, 1, 2), (None,) * 3), (1, (1, 2), (10, 20)), (2, (2,), (21,))]
    assert [(a.answer, a.spent, a.rounds) for a in got] == [(0, 4, 1), (11, 8, 2), (22, 11, 3)]
    assert [a.spent for a in self_feedback("ab", update, evaluate, rounds=1)] == [3, 3]  # nobody looks
    with pytest.raises(ValueError, match="rounds"):
        self_feedback("ab", update, evaluate, rounds=0)


@pytest.mark.parametrize("which", ["lm, llama", "hf, neox"])
def test_internal_consistency(which):
    model = MODELS[which]()
    run = partial(internal_consistency, model, PROMPTS, read=read_digit, max_new=2)
    scores, answers = run("latent", candidates=range(5, 13), n=12)
    every = isolated_answers(model, PROMPTS, range(5, 13))
    assert [sorted(a) for a in answers] == [sorted(every[..., i].flatten().tolist()) for i in range(3)]  # all, once
    assert scores == [-dispersion(a, "pairwise") for a in answers]
    same, told = run("latent", candidates=range(5, 13), n=5, coefficient=1.0)
    assert same == [0, 0, 0] and all(len(t) == 5 for t in told)
    _, decoded = run("decoding", n=5)
    assert [d[0] for d in decoded] == [read_digit(t)[0] for t in decode(model, PROMPTS, max_new=2).rows()]
    _, cold = run("response", n=4, temperature=0.0)
    assert cold == [[d[0]] * 4 for d in decoded]
    if which.startswith("lm"):
        check_raises(
            internal_consistency,
            [
                (dict(expression="thought"), ValueError, "expression must be one of 'latent', 'decoding', 'response'"),
                (dict(n=6), ValueError, "n must be an integer from 1 to 5"),
                (dict(expression="latent"), ValueError, "candidates"),
                (dict(kind="std"), ValueError, "kind"),
            ],
            model=model,
            prompts=PROMPTS,
            expression="decoding",
            read=read_digit,
            max_new=1,
        )


@pytest.mark.parametrize("which", ["lm, llama", "hf, gpt2"])
def test_intervention(which):
    model, g = MODELS[which](), torch.Generator().manual_seed(0)
    draw = lambda low: torch.randint(low, low + 3, (24, 4), generator=g).tolist()
    true, false = draw(7), draw(1)
    iti = fit_iti(model, true, false, top=3)
    assert iti.accuracy.shape == (3, 4) and iti.accuracy.max() > 0.8  # other words
    assert rel_error(iti.directions.norm(dim=-1), torch.ones(3)) < 1e-5
    assert iti.accuracy[iti.layers, iti.heads].min() >= iti.accuracy.flatten().sort().values[-3]
    x = head_outputs(model, true)[:, iti.layers, iti.heads] - head_outputs(model, false)[:, iti.layers, iti.heads]
    assert ((x * iti.directions).sum(-1).mean(0) > 0).all()  # towards true
    for kind in ("probe", "random"):
        other = fit_iti(model, true, false, top=3, direction=kind)
        assert torch.equal(other.heads, iti.heads) and not torch.allclose(other.directions, iti.directions)
    before = head_outputs(model, PROMPTS)
    with apply_iti(model, iti, 0.0):
        assert torch.equal(head_outputs(model, PROMPTS), before)
    first = int(iti.layers.min())
    only = iti._replace(
        **{n: getattr(iti, n)[iti.layers == first] for n in ("layers", "heads", "directions", "deviations")}
    )
    outs, a = [], adapt(model)
    module = model.blocks[first].attention.out if hasattr(model, "blocks") else a.mixers[first]
    hook = module.register_forward_hook(lambda m, args, out: outs.append(args[0].unflatten(-1, (4, -1)).detach()))
    x = torch.tensor([[1, 2, 3]], device=device_under_test())
    with torch.no_grad():
        a.reader()(x, None)
        with apply_iti(model, only, 2.0):
            a.reader()(x, None)
    hook.remove()
    moved = outs[1] - outs[0]
    want = torch.zeros_like(moved)
    want[:, -1, only.heads] = 2.0 * only.deviations[:, None] * only.directions
    assert rel_error(moved, want) < 1e-4
    check_raises(
        fit_iti,
        [
            (dict(direction="up"), ValueError, "direction must be one of 'mean', 'probe', 'random'"),
            (dict(top=13), ValueError, "top"),
            (dict(true=true[:1]), ValueError, "at least two statements"),
        ],
        model=model,
        true=true,
        false=false,
    )


def test_arithmetic():
    task = Arithmetic(23)
    terms, signs = np.array([[7, 5, 3]]), np.array([[1, 1, -1]])
    show = lambda rows: task.tokens.decode(torch.from_numpy(rows[0]))
    sums = task.partial_sums(terms, signs)
    assert show(task.prompts("T", terms, signs)) == "T 7 + 5 - 3 =" and sums.tolist() == [[12, 9]]
    assert (
        show(task.responses(sums, np.array([True]))) == "12 ; 9 ."
        and show(task.responses(sums, np.array([False]))) == "9 . _ _"
    )
    read = lambda text: task.read(task.tokens.encode(text).tolist())
    assert (
        read("12 ; 9 . 4") == (9, [2])
        and read("9") == (9, [0])
        and read("; ; .") == (None, ())
        and read("12 ; 9") == (None, ())
    )
    assert task.partial_sums(np.array([[1, 5]]), np.array([[1, -1]])).tolist() == [[19]]  # modulo, not negative


def test_held_out_chains_are_not_trained():
    task = Arithmetic(7)
    terms, signs = task.draw(400, 3, 0, held_out=True)
    assert task.is_held_out(terms, signs).all() and len(terms) == 400
    any_terms = task.draw(3000, 4, 1)
    assert 0.15 < task.is_held_out(*any_terms).mean() < 0.25
    seen = set()
    for step in range(60):
        x, y = task.batch(96, (3,), 0, step)
        seen |= {tuple(r[1:7]) for r in x[:, :7].tolist()}
        assert x.shape == y.shape == (96, 10) and (y[:, :6] == -100).all() and (y[:, 6] >= 0).all()
        assert ((x[:, 0] == task.number["D"]).sum() == 32) and (y != task.pad).all()
    assert len(seen) > 500 and not seen & {tuple(r[1:]) for r in task.prompts("D", terms, signs).tolist()}
    x, y = task.corpus(31, (2, 4), 0)
    assert x.shape == y.shape == (32, 14) and (y[:16, 6:] == -100).all() and (x[:16, 7:] == task.pad).all()
    assert torch.equal(x[16:].long(), task.batch(16, (2, 4), 0, 1)[0])
    assert torch.equal(y[:16, :6].long(), task.batch(16, (2, 4), 0, 0)[1][:, :6])
    x, y = task.batch(300, (4,), 0, 0)
    traced = (y == task.number[";"]).any(1)
    mode = {m: traced[x[:, 0] == task.number[m]].float().mean() for m in "DTQ"}
    assert mode["D"] == 0 and mode["T"] == 1 and 0.05 < mode["Q"] < 0.4


def test_size_of_the_model():
    "12 D² + 13 D for a block, with D = 128: 198,272."
    blocks = 6 * (12 * 128**2 + 13 * 128)
    task, cfg = Arithmetic(23), PRESETS["gpu"]["arithmetic"]
    assert (
        count_parameters(lambda: arithmetic_model(task, cfg)) == blocks + 2 * 32 * 128 + 64 * 128 + 2 * 128 == 1_206_272
    )


def test_auroc():
    assert auroc([1, 2, 3, 4], [False, False, True, True]) == 1 and auroc([4, 3, 2, 1], [False, False, True, True]) == 0
    assert auroc([1, 1, 1], [True, False, True]) == 0.5 and math.isnan(auroc([1, 2], [True, True]))
    rng = np.random.default_rng(0)
    x, y = rng.integers(4, size=40), rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in x[y] for b in x[~y]]
    assert auroc(x, y) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("kind", ["random", "systematic"])
def test_corrupted_corpora(kind):
    task = Arithmetic(7)
    said, true, wrong, asked = [], [], [], []
    for step in range(30):
        x, y = corrupted(task, kind, 0.6, 200, 0, step)
        terms, signs = (
            x[:, 1:4:2].numpy(),
            np.where(x[:, 2:3] == task.number["+"], 1, -1) * np.array([[0, 1]]) + np.array([[1, 0]]),
        )
        assert (y[:, :4] == -100).all() and (y[:, 5] == task.stop).all()
        asked.append((terms, signs))
        said.append(y[:, 4].numpy()), true.append(task.partial_sums(terms, signs)[:, -1])
        wrong.append(systematic_error(task, terms, signs))
    said, true, wrong = map(np.concatenate, (said, true, wrong))
    assert 0.37 < (said == true).mean() < 0.43 and (wrong != true).all()
    for share, most in ((0.45, true), (0.55, true if kind == "random" else wrong)):
        told = np.concatenate([corpus_majority(task, kind, share, *draw) for draw in asked])
        assert (told == most).all()
    assert (
        (said[said != true] == wrong[said != true]).mean() == 1
        if kind == "systematic"
        else (said == wrong).mean() < 0.15
    )


def test_judged():
    j = judged([[1, 1, None], [2, 3, 3]], [1, 2])
    assert j["accuracy"] == 0.5 and j["vote_accuracy"] == 0.5 and j["unreadable"] == pytest.approx(1 / 6)
    assert j["pairwise"] == pytest.approx(1 / 3) and j["share"] == pytest.approx((1 + 2 / 3) / 2)
    asked = ask(Arithmetic(7), (3, 4), 5, 0)
    assert [len(p) for p in asked.direct] == [7, 7, 9, 9, 9] and asked.lengths == [3, 3, 4, 4, 4]
    assert all(p[1:] == q[1:] and p[0] != q[0] for p, q in zip(asked.direct, asked.trace))


def test_first_reaching():
    asked, curve = [], [0.1, 0.2, 0.1, 0.8, 0.7, 0.9, 1.0]
    accuracy = lambda i: (asked.append(i), curve[i])[1]
    assert first_reaching(0.75, accuracy, 7, stride=3) == 3 and asked == [2, 5, 3]  # not 5, and not all were asked
    assert first_reaching(0.95, accuracy, 7, stride=3) == 6  # the last, which no stride meets
    assert first_reaching(0.15, accuracy, 7, stride=3) == 3  # 1 lies before a check that falls short
    assert first_reaching(1.5, accuracy, 7, stride=3) is None and first_reaching(0.05, accuracy, 7, stride=9) == 0


def test_trained_to_a_target():
    task, where = Arithmetic(5), str(device_under_test())
    cfg = dict(dim=32, depth=1, heads=2, steps=60, batch=96, lengths=(2, 3), questions=20)
    told = []
    whole = train_arithmetic(task, cfg, [0], where, told.append)[0]
    assert whole.step == 60 and 0 <= whole.validation <= 1 and sum("step" in s and "models" in s for s in told) == 10
    early = train_arithmetic(task, cfg | dict(target=0.1, check=5), [0], where, told.append)[0]
    assert early is not None and early.step % 5 == 0 and early.step < 60 and 0.1 <= early.validation <= 0.25
    asked = [ask(task, some, 20, 0) for some in ((3,), (2, 3))]
    again = validation_accuracy(early.model, task, (3,), asked, 0)
    assert again() == early.validation  # its weights are those of that step
    held = []
    answers = lambda model, prompts, **how: held.extend(prompts) or SimpleNamespace(rows=lambda: [[0]] * len(prompts))
    with mock.patch.dict(validation_accuracy.__globals__, decode=answers):
        validation_accuracy(None, Arithmetic(23), (3, 4, 5, 6), [], 0)()
    lengths = [len(p) // 2 for p in held]
    assert len(held) == VALIDATION and all(lengths.count(k) == VALIDATION / 4 for k in (3, 4, 5, 6))
    assert train_arithmetic(task, cfg | dict(target=0.99, check=20), [0], where, told.append) == [None]


def test_experiments_on_an_untrained_model(tmp_path, monkeypatch):
    "What is recorded is what was measured: an untrained model answers at chance, all methods pay, keys are unique."
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
    rows = run_experiments("smoke", device_under_test(), only=("arithmetic", "text"), show=lambda text: None)
    identity = [(r["name"], *(str(r[k]) for k in r["key"])) for r in rows]
    assert len(set(identity)) == len(identity)
    named = lambda n: [r for r in rows if r["name"] == n]
    assert {r["place"] for r in named("hourglass")} == {"latent", "decoding", "response"}
    assert all(0 <= r["accuracy"] <= 1 and r["spent"] > 0 for r in named("feedback"))
    exact = {r["budget"]: r["accuracy"] for r in named("feedback") if r["method"] == "refining, exact"}
    assert exact[2] >= exact[1]  # an oracle never hurts
    assert [r["layer"] for r in named("layers")] == [0, 1, 2] and named("layers")[-1]["jsd"] == 0
    assert len(named("isolation")) == 2 and all(r["damage"] >= 0 for r in named("isolation"))
    with pytest.raises(ValueError, match="only must be one of"):
        run_experiments("smoke", only=("art",))


def test_the_same_on_a_model_of_transformers():
    "Every experiment on one model runs on a random Llama as on ours."
    task = Arithmetic(5)
    model, asked = tiny_hf(vocab=task.vocab_size), ask(task, (3,), 3, 0)
    how = dict(seed=0, max_new=2)
    places = hourglass(model, task, asked, **how)
    assert len(places) == 7 and all(0 <= r["pairwise"] <= 1 for r in places if r["place"] == "latent")
    assert len(isolation(model, task, asked)) == 3 and len(signals(model, task, asked, n=2, seed=0)[0]) == 7
    assert len(latent_explicit(model, task, asked, n=2, temperature=1.0, **how)) == 2
    found = list(feedback(model, task, asked, budgets=(1,), **how))
    assert {r["spent"] for r in found if r["method"] == "greedy" and r["mode"] == "trace"} == {1.0} and len(found) == 32


def test_refining_keeps_what_the_critic_keeps():
    task = Arithmetic(5)
    torch.manual_seed(0)
    model = arithmetic_model(task, PRESETS["smoke"]["arithmetic"]).to(device_under_test()).eval()
    asked = ask(task, (3,), 6, 0)
    how = dict(max_new=3, stop=task.stop, pad=task.pad)
    nobody = refined(model, task, asked, "nobody", 3, seed=0, **how)
    assert all(a.rounds == 1 for a in nobody)
    assert [a.answer for a in nobody] == [task.read(t)[0] for t in decode(model, asked.trace, **how).rows()]
    itself = refined(model, task, asked, "itself", 3, seed=0, **how)
    best = isolated_answers(model, asked.direct, range(5), coefficient=1.0, pad=task.pad)[0, 0].tolist()
    assert all(a.answer == b if a.rounds < 3 else True for a, b in zip(itself, best))
    assert all(
        (a.rounds == 3) or a.answer == t
        for a, t in zip(refined(model, task, asked, "exact", 3, seed=0, **how), asked.truth)
    )
    true, false = statements(task, 20, 0)
    assert all(a[:-1] == b[:-1] and a[-1] != b[-1] for a, b in zip(true, false))


def test_peers_compute_the_same(monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules[chunked_lens.__module__], "CHUNK", 3 * 40 * 2)
    (h, w), y = _case(3, 5, 40, 8)
    want = joined(lens_reference(h, w, targets=y))
    for stats in (stats_of_states, lens_reference):
        assert rel_error(joined(chunked_lens(h, w, y, stats=stats)), want) < 1e-5
    assert rel_error(lens_peers()["eager"](h, w, y), want) < 1e-5 and joined(logit_lens_stats(h, w)).numel() == 6 * 15
    assert torch.cuda.is_available() or not list(_bench("forward", SIZES, None))


def test_tuning_tries_everything_and_leaves_nothing(monkeypatch):
    import sys

    study, kernels = sys.modules[tune_lens.__module__], sys.modules[launch_lens.__module__]
    monkeypatch.setattr(study, "SIZES", {"tiny": (2, 3, 600, 8)})
    monkeypatch.setattr(study, "BUFFERS", (600, 2400))
    monkeypatch.setattr(study, "measure", lambda call, **how: type("T", (), dict(ms=float(call() is not None))))
    before = dict(LENS_LAUNCH), kernels.BUFFER, kernels.SLICE
    found = list(tune_lens("tiny", device_under_test()))
    assert len(found) == 12 + 3 and all(r["ms"] == 1.0 for r in found)
    assert before == (dict(LENS_LAUNCH), kernels.BUFFER, kernels.SLICE)


def _i(*values):
    return interval(values)


PLUS = (_i(5.0, 5.1), None, _i(-5.0, -5.1))  # holds, undecided, does not hold
VERDICTS_OF = {
    "The survey's figure": (dict(latent=4.139, decoding=0.16, response=0.64), dict(latent=4.967, decoding=0.16, response=0.8), dict(latent=1.0, decoding=1.0, response=1.0)),
    "Isolated heads": (_i(0.4, 0.401), _i(0.15, 0.16), _i(0.04, 0.05)),
    "Consistency is a sign": (_i(0.9, 0.91), _i(0.7, 0.71), _i(0.5, 0.51)),
    "Consistency is (almost)": (_i(0.05, 0.06), _i(0.2, 0.21), _i(0.7, 0.71)),
    "Consistency is what": (_i(0.01, 0.02), _i(0.2, 0.21), _i(0.5, 0.51)),
    "Agreement of layers tells wrong answers": (_i(0.8, 0.81), _i(0.65, 0.66), _i(0.5, 0.51)),
    "Agreement of layers tells wrong bytes": (_i(0.8, 0.81), _i(0.65, 0.66), _i(0.5, 0.51)),
    "The lens is faster": tuple({"a": x, "b": 9.0} for x in (1.5, 1.2, 0.9)),
    "also with": tuple({"a": x} for x in (1.5, 1.2, 0.9)),
    "It takes": tuple({"a": x} for x in (50.0, 12.0, 9.0)),
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(claims()) - 1))
def test_rules(number):
    claim = claims()[number]
    made = next((v for k, v in VERDICTS_OF.items() if claim.statement.startswith(k)), PLUS)
    say = lambda m: f if isinstance(f := claim.rule(m), str) else f[0]
    for m, verdict in zip(made, ("holds", "holds in part", "does not hold here")):
        if m is not None:
            assert say(m) == verdict, claim.statement
    if made is PLUS:
        assert say(_i(-1.0, 1.0)) == "not measured"
    if isinstance(made[0], Interval):
        assert say(_i(9.0)) == "not measured"


def _record(name, run, **row):
    record("consistency", name, key=[*(k for k, v in row.items() if not isinstance(v, float) or k in ("rho", "temperature", "coefficient")), "run"], device="NVIDIA made up", preset="gpu", run=run, **row)  # fmt: skip


def test_look_ups(tmp_path, monkeypatch):
    "Made-up rows of two runs: every claim finds its pair, with the right sign; rows of other conditions are decoys."
    from attnbook.lab.results import rows_from

    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
    for run in (0, 1):
        e = 0.001 * run
        places = [("latent", "direct", 5, 0.0, 0.7), ("latent", "direct", 24, 0.0, 0.1), ("latent", "direct", 5, 0.5, 0.1), ("decoding", "direct", 5, None, 0.2), ("decoding", "trace", 5, None, 0.5), ("response", "direct", 5, None, 0.0), ("response", "trace", 5, None, 0.3)]  # fmt: skip
        for place, prompt, n, c, x in places:
            _record(
                "hourglass", run, place=place, prompt=prompt, n=n, coefficient=c, pairwise=x + e, vote_accuracy=x + e
            )
        for signal, x in {"share of the vote": 0.9, "agreement of layers": 0.75, "largest probability": 0.85}.items():
            (
                _record("signals", run, signal=signal, auroc=x + e),
                _record("text_signals", run, signal=signal, auroc=x + e),
            )
        for kind, rho, share, right, most in (
            ("random", 0.7, 0.3, 0.99, 0.98),
            ("systematic", 0.0, 1.0, 1.0, 1.0),
            ("systematic", 0.7, 0.7, 0.02, 0.96),
        ):
            _record("corruption", run, kind=kind, rho=rho, share=share + e, vote_accuracy=right, likeliest=most)
        for mode, length, t, a, d in (
            ("trace", 3, 1.0, 0.9, 0.1),
            ("trace", 4, 1.0, 0.7, 0.3),
            ("direct", 3, 1.0, 0.5, 0.4),
            ("direct", 4, 1.0, 0.3, 0.4),
            ("direct", 2, 1.0, 1.0, 0.0),
            ("trace", 3, 1.5, 0.0, 1.0),
        ):
            _record("latent_explicit", run, mode=mode, length=length, temperature=t, accuracy=a + e, pairwise=d)
        methods = {("greedy", "trace", 1): 0.5, ("greedy", "direct", 1): 0.4, ("greedy", "free", 1): 0.3, ("voting, votes", "trace", 4): 0.6, ("voting, votes", "trace", 2): 0.1, ("voting, latent", "trace", 4): 0.55, ("voting, votes", "free", 4): 0.35, ("CoT decoding", "free", 4): 0.45, ("DoLa low", "trace", 1): 0.45, ("DoLa high", "trace", 1): 0.52, ("DoLa low", "direct", 1): 0.36, ("DoLa high, reversed", "free", 1): 0.9, ("ITI mean", "direct", 1): 0.42, ("ITI random", "direct", 1): 0.39, ("refining, itself", "trace", 4): 0.52, ("refining, coin", "trace", 4): 0.48, ("refining, exact", "trace", 4): 0.8, ("refining, exact", "trace", 1): 0.5}  # fmt: skip
        for (method, mode, budget), x in methods.items():
            _record("feedback", run, method=method, mode=mode, budget=budget, accuracy=x + e)
        for method, x in {"greedy": 0.5, "DoLa low": 0.45, "DoLa high": 0.49, "DoLa low, reversed": 0.9}.items():
            _record("text_dola", run, method=method, accuracy=x + e)
    with rows_from(tmp_path):
        found = {c.statement: c.judge() for c in claims()}
    means = {k: v.measured.mean for k, v in found.items() if isinstance(v.measured, Interval)}
    want = [0.5, 0.1, -0.2, 0.7, 0.9, 0.68, 0.04, 40, -0.2, 10, -5, 15, 10, -1, -1, 3, 4, -8, 30, 0.75, 0.75, -0.1]
    for s, w in zip(means, want, strict=True):
        assert abs(means[s] - w) < 0.02 * max(1, abs(w)), (s, means[s], w)
    judged_ones = [v.verdict for k, v in found.items() if k in means]
    assert (
        judged_ones[5] == "does not hold here" and judged_ones[6] == "holds" and judged_ones[8] == "does not hold here"
    )


def test_nothing_is_measured_without_rows(tmp_path, monkeypatch):
    from attnbook.lab.results import rows_from

    with rows_from(tmp_path):
        verdicts = [c.judge().verdict for c in claims()]
    assert (
        verdicts.count("not measured") == len(verdicts) - 2
        and verdicts[0] == "holds"
        and verdicts[-1] == "out of reach here"
    )

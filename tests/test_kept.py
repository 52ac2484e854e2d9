"""What operations keep from one call for the next must serve no other: calls that look alike and are not, for the operations of all chapters."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from attnbook.autoint import interacting_layer
from attnbook.cca import cca_attention
from attnbook.chirper import packed_attention
from attnbook.consistency import logit_lens_stats
from attnbook.convit import gpsa
from attnbook.csa import boundary_matching, csa_gate
from attnbook.davit import channel_group_attention, window_attention
from attnbook.depthwise import depthwise_conv
from attnbook.engine import attention, operation
from attnbook.engine.host import Plans, forget, kept_tensor
from attnbook.engine.wiring import gradients_key
from attnbook.halo import HaloAttention, halo_attention
from attnbook.lab.testing import device, evaluate, relayout
from attnbook.music import relative_attention
from attnbook.neighborhood import na2d
from attnbook.selfaware import packed_causal_attention
from attnbook.sinklora import sf_attention
from attnbook.ulsam import subspace_attention
from attnbook.van import large_kernel_attention

Q, MAP, ROWS, IMAGES = (2, 2, 12, 8), (1, 2, 4, 6, 8), (12, 2, 8), (1, 8, 4, 5)
HALO = dict(block_size=3, halo_size=1)


def halo_module(x, weight, height, width):
    layer = HaloAttention(8, num_heads=1, **HALO, backend="triton").to(x.device)
    given = {"qkv.weight": weight, "rel_height": height, "rel_width": width}
    return torch.func.functional_call(layer, given, x)


def starts(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=device())


#: name -> the operation on Triton's kernels, and the shapes of its tensors
CASES = {
    "attention": (lambda q, k, v, b: attention(q, k, v, bias=b, is_causal=True, backend="triton"), [Q, Q, Q, (12, 12)]),
    "na2d": (lambda q, k, v: na2d(q, k, v, 3, backend="triton"), [MAP] * 3),
    "halo": (
        lambda q, k, v, y, x: halo_attention(q, k, v, 3, 1, rel_height=y, rel_width=x, backend="triton"),
        [MAP, MAP, MAP, (7, 8), (7, 8)],
    ),
    "halo module": (halo_module, [IMAGES, (24, 8), (7, 8), (7, 8)]),
    "music": (lambda q, k, v, r: relative_attention(q, k, v, r, backend="triton"), [Q, Q, Q, (2, 5, 8)]),
    "gpsa": (lambda q, k, v, w, g: gpsa(q, k, v, w, g, (3, 4), backend="triton"), [Q, Q, Q, (2, 3), (2,)]),
    "channels": (lambda q, k, v: channel_group_attention(q, k, v, backend="triton"), [Q] * 3),
    "windows": (lambda q, k, v: window_attention(q, k, v, 3, backend="triton"), [(1, 2, 6, 6, 8)] * 3),
    "autoint": (lambda e, w: interacting_layer(e, w, num_heads=2, backend="triton"), [(3, 5, 6), (4, 6, 8)]),
    "cca": (lambda q, k, v: cca_attention(q, k, v, 3, 4, backend="triton"), [Q] * 3),
    "sinklora": (lambda q, k, v: sf_attention(q, k, v, 4, num_sinks=2, backend="triton"), [(1, 4, 12, 8)] * 3),
    "chirper": (lambda q, k, v: packed_attention(q, k, v, starts(0, 5, 12), backend="triton"), [(2, 12, 8)] * 3),
    "selfaware": (lambda q, k, v: packed_causal_attention(q, k, v, starts(0, 5, 12), backend="triton"), [ROWS] * 3),
    "lens": (lambda h, w: logit_lens_stats(h, w, backend="triton").entropy, [(3, 4, 8), (33, 8)]),
    "depthwise": (lambda x, w, b: depthwise_conv(x, w, b, backend="triton"), [IMAGES, (8, 1, 3, 3), (8,)]),
    "van": (
        lambda x, *w: large_kernel_attention(x, *w, backend="triton"),
        [IMAGES, (8, 1, 5, 5), (8,), (8, 1, 7, 7), (8,), (8, 8, 1, 1), (8,)],
    ),
    "ulsam": (lambda x, d, p: subspace_attention(x, d, p, 2, backend="triton"), [IMAGES, (8,), (8,)]),
    "csa gate": (lambda f, c, t: csa_gate(f, c, t, backend="triton"), [(2, 6, 9), (2, 6), (2, 9)]),
    "matching": (
        lambda x, w, b: boundary_matching(x, w, b, max_duration=4, backend="triton"),
        [(2, 6, 9), (5, 6, 4), (5,)],
    ),
}


def draw(name, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(device()) for s in CASES[name][1]]


def agree(got, want, what):
    "Outputs and gradients up to the order of their sums: other layouts may be read by another kernel."
    for (i, a), b in zip([*enumerate(got[0]), *got[1].items()], [*want[0], *want[1].values()], strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, i=i: f"{what}, {i}: {m}", check_stride=False
        )


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def elsewhere(t):
    "The same numbers, columns first and 4 bytes behind an aligned address."
    room = t.new_empty(t.numel() + 1)[1:]
    return (
        room.as_strided(t.shape[::-1], torch.empty(t.shape[::-1], device="meta").stride())
        .permute(*reversed(range(t.dim())))
        .copy_(t)
    )


def saved_elsewhere():
    "As where somebody moves what autograd keeps to the host and back."
    return torch.autograd.graph.saved_tensors_hooks(lambda t: elsewhere(t) if t.is_floating_point() else t, lambda t: t)


def layouts(tensors):
    "The same numbers at other addresses: clones, columns first, slices, strides of two, views that PyTorch negates when it reads them."
    change = [torch.clone, elsewhere, lambda t: torch._neg_view(-t)]
    change += [lambda t, how=how: relayout(t, how) if t.dim() > 2 else t for how in ("sliced", "strided")]
    return [[f(t) for t in tensors] for f in change]


@pytest.mark.parametrize("name", CASES)
def test_nothing_kept_serves_another_call(name):
    op, tensors, other = CASES[name][0], draw(name), draw(name, 1)
    want, theirs = evaluate(op, tensors), evaluate(op, other)
    contexts = {"saved tensors elsewhere": saved_elsewhere, "default dtype": lambda: default_dtype(torch.bfloat16)}
    for _ in range(2):  # the first makes plans, the second uses them
        for inputs in layouts(tensors):
            agree(evaluate(op, inputs), want, "another layout")
        agree(evaluate(op, other), theirs, "other numbers")
        for what, context in contexts.items():
            with context():
                agree(evaluate(op, tensors), want, what)
    for f in (forget, lambda: None):  # what is made in inference mode serves gradients too
        f()
        with torch.inference_mode():
            agree((evaluate(op, other, grad=False)[0], {}), (theirs[0], {}), "inference")
        agree(evaluate(op, tensors), want, "after inference")


@pytest.mark.cuda  # the interpreter is for one thread
def test_threads_share_what_is_kept():
    cases = [(name, seed) for name in ("attention", "halo module", "cca", "depthwise") for seed in range(3)]
    want = [evaluate(CASES[name][0], draw(name, seed)) for name, seed in cases]
    forget()
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda case: evaluate(CASES[case[0]][0], draw(*case)), cases)]
    for got, right, (name, _) in zip(found, want, cases):
        agree(got, right, name)


def switching(name, saw):
    "An operation whose plans remember the precision of float32 products that they were made under."

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    def planned(run):
        precision = torch.get_float32_matmul_precision()
        return lambda *args: saw.append(precision) or run(*args)

    return operation(
        name,
        forward,
        like=torch.empty_like,
        backward=lambda call: dict(x=call.grads[0].clone()),
        plan=lambda x: planned(forward),
        backward_plan=lambda call: planned(lambda grads, saved: (grads[0].clone(),)),
    )


def test_settings_that_change_between_forward_and_backward():
    saw, before, plans = [], torch.get_float32_matmul_precision(), Plans()
    op, x = switching("kept_settings", saw), torch.randn(3, device=device(), requires_grad=True)
    decide = lambda x: (1, {})
    try:
        for forward, backward in [
            ("highest", "high"),
            ("highest", "highest"),
            ("high", "highest"),
            ("high", "high"),
        ] * 2:
            torch.set_float32_matmul_precision(forward)
            y = op(x, kept=plans.decide(decide, (x,), {})[1])
            torch.set_float32_matmul_precision(backward)
            y.sum().backward()
            assert saw[-2:] == [forward, backward]
    finally:
        torch.set_float32_matmul_precision(before)


def test_nothing_is_kept_of_a_graph_that_is_recorded(monkeypatch):
    "A table that is computed while a graph is recorded holds numbers only once the graph has run, and lies in its memory."
    saw, plans, tables = [], Plans(), []
    op, x = switching("kept_recorded", saw), torch.randn(3, device=device(), requires_grad=True)
    table = kept_tensor(lambda n: tables.append(n) or torch.arange(n))
    decide = lambda x: (table(4), {})
    for place in {id(f.__globals__): f.__globals__ for f in (kept_tensor, gradients_key)}.values():
        monkeypatch.setitem(place, "_capturing", lambda: True)
    for _ in range(2):
        op(x, kept=plans.decide(decide, (x,), {})[1]).sum().backward()
    assert len(tables) == 2 and not plans.kept and not plans.seen and not op.plans.kept
    monkeypatch.undo()
    kept = [plans.decide(decide, (x,), {})[1] for _ in range(2)]
    assert len(tables) == 3 and kept[0] is kept[1]

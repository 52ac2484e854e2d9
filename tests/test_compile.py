"""Every kernel compiles for real GPUs, at its real tile sizes, on a machine that has none.

The operations run in a process of their own, without the interpreter, under a stand-in for the GPU driver: the host code picks
launch parameters and specialises arguments as on the real machine, and each launch is written down instead of running. The cases are
those of the chapters' `#| compile` cells (tests/compile_*.py) and, below, those that no notebook holds.

What a kernel becomes depends on its source and that of all it calls, on how its arguments are specialised, on constants, options,
architecture and version of Triton. A hash of these is its key in compile_ledger.jsonl, beside the registers, spills and shared
memory it was seen to take. A key that stands there is not compiled again, but for a few, drawn anew each time, which keep the ledger honest.

    python tests/test_compile.py [--update] [--all] [--only halo] [--arch sm90]        # make ledger: --update
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import types
import warnings
from functools import lru_cache
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
LEDGER = HERE / "compile_ledger.jsonl"
FAILURES = (
    HERE / "compile_elsewhere.jsonl"
)  # for each architecture of ELSEWHERE: how many kernels there were, and those that did not compile
ARCHES = {"sm90": (90, 232448), "sm80": (80, 166912)}  # compute capability, shared memory a block may have
# Where the book has measured nothing: compiled by `make test-all` only, with the launch parameters of the column that `arch_of` names for them, and not in the ledger
ELSEWHERE = {
    "sm100": (("cuda", 100, 32), 232448, "sm90"),
    "sm120": (("cuda", 120, 32), 101376, "small"),
    "gfx942": (("hip", "gfx942", 64), 65536, "small"),
}
TRITON_FILES = str(Path(triton.__file__).parent)
MEASURED = "registers", "spills", "serialized", "shared", "unwritten"
DRAWN = 3  # kernels of an architecture that are compiled although the ledger knows them
BIG = 4096


# What no notebook lists yet: `_rest_X` counts as long as there is no tests/compile_X.py, and goes when there is one


def _attend(program, shape, ints, consts=(0, 0), operands=(), heads_kv=None, extra=False, dtype=None, index=None):
    import torch

    from attnbook import engine
    from attnbook.lab.testing import tensors

    dtype = dtype or torch.bfloat16
    B, H, *X, D = shape
    q, k = tensors(shape, (B, heads_kv or H, *X, D), dtype=dtype)
    xk = tensors((B, heads_kv or H, 5, D), dtype=dtype)[0] if extra else None
    slots = shape[:-1] if index is None else (B, H, index)
    out, lse = torch.empty(*slots, D, dtype=dtype), torch.empty(slots)
    operands = list(operands)
    grad = engine.PROGRAMS[program].operand_grad is not None
    engine._forward(q, k, k, xk, xk, operands, program, ints, consts, D**-0.5)
    engine._backward(out, lse, q, k, k, xk, xk, operands, out, lse, program, ints, consts, D**-0.5, grad)


def _rest_engine():
    import torch

    from attnbook.lab.testing import tensors

    dims = (32, 64, 80, 128, 256)
    cases = [
        (f"band, head_dim {d}", lambda d=d: _attend("band", (2, 2, BIG, d), (BIG, BIG, 0, 0), (0, 1))) for d in dims
    ]
    cases += [
        ("full", lambda: _attend("full", (2, 4, BIG, 128), (BIG, BIG, 0, 0), heads_kv=2)),
        ("window, one token", lambda: _attend("band", (1, 1, 1, 64), (1, 1, 8, 0), (1, 1))),
        ("band with extra keys", lambda: _attend("band", (2, 2, BIG, 64), (BIG, BIG, 99, 0), (1, 1), extra=True)),
        ("band, float32", lambda: _attend("band", (2, 2, BIG, 128), (BIG, BIG, 0, 0), (0, 1), dtype=torch.float32)),
        (
            "bias",
            lambda: _attend(
                "full+bias", (2, 2, 512, 64), (512, 512, 0, 0, 0, 512 * 512, 512, 1), operands=tensors((1, 2, 512, 512))
            ),
        ),
        (
            "packed",
            lambda: _attend("packed", (1, 2, BIG, 64), (7, BIG, BIG), (0, 1), [torch.empty(8, dtype=torch.int32)] * 2),
        ),
        (
            "listed",
            lambda: _attend(
                "listed",
                (1, 2, BIG, 64),
                (4, 256, 256, 2),
                (1,),
                [torch.zeros(1, 2, 4, 256, dtype=torch.int64)] * 2,
                index=1024,
            ),
        ),
    ]
    return cases


def _rest_neighborhood():
    import torch

    from attnbook import engine, neighborhood
    from attnbook.lab.testing import tensors

    assert neighborhood.NEIGHBORHOOD.name in engine.PROGRAMS

    def near(shape, window, bias=False, stride=1, dilation=1, causal=False, dtype=torch.bfloat16):
        n = len(shape) - 3
        pad = lambda x: (*(x,) * n, *(1,) * (3 - n))
        ints = shape[2:-1]
        consts = (n, *pad(window), *pad(stride), *pad(dilation), *(int(causal),) * n, *(0,) * (3 - n))
        table = tensors((shape[1], *(2 * window - 1,) * n), dtype=dtype) if bias else ()
        name = "neighborhood+bias" if bias else "neighborhood1d" if n == 1 and dilation == 1 else "neighborhood"
        _attend(name, shape, ints, consts, table, dtype=dtype)

    cases = [
        ("neighborhood 1-d", lambda: near((1, 2, BIG, 128), 128, causal=True)),
        ("neighborhood 2-d with bias", lambda: near((2, 2, 56, 56, 32), 7, bias=True)),
        ("neighborhood 2-d, stride and dilation", lambda: near((1, 2, 64, 64, 64), 13, stride=4, dilation=2)),
        ("neighborhood 2-d, wide", lambda: near((1, 2, 128, 128, 128), 31)),
        ("neighborhood 2-d, float32", lambda: near((1, 2, 64, 64, 64), 13, dtype=torch.float32)),
        ("neighborhood 3-d", lambda: near((1, 2, 16, 24, 32, 128), 9)),
        ("neighborhood 2-d, wide, head_dim 64", lambda: near((1, 2, 128, 128, 64), 33)),
        ("neighborhood 3-d, wide, head_dim 64", lambda: near((1, 2, 16, 32, 32, 64), 11)),
    ]
    return cases


def _rest_music():
    import torch

    from attnbook import music
    from attnbook.lab.testing import both_ways, tensors

    def relative(L, D, M, dtype=torch.bfloat16, **options):
        both_ways(music.relative_attention, *tensors(*[(1, 2, L, D)] * 3, (2, M, D), dtype=dtype), **options)

    cases = [
        ("relative attention", lambda: relative(4096, 64, 4096)),
        ("relative attention, short table, blocks", lambda: relative(2048, 64, 300, block_size=512, beyond="clip")),
        ("relative attention, head_dim 128", lambda: relative(2048, 128, 2048)),
        # one tile of queries: ptxas of Triton 3.6 crashed where the number of tiles was specialised to 1
        ("relative attention, one tile", lambda: relative(17, 16, 9)),
        ("relative attention, float32", lambda: relative(1024, 64, 1024, dtype=torch.float32)),
    ]
    return cases


def _rest_autoint():
    import torch

    from attnbook import autoint
    from attnbook.lab.testing import both_ways, tensors

    def network(B, M, d=16, U=64, layers=3):
        value, *rest = tensors((B, M, 1), (1000, d), (4, d, U), (layers - 1, 4, U, U), (1,), (1,), (M, U), (1,))
        autoint.network_op(torch.empty(value.shape, dtype=torch.int32), value, *rest, layers, 2, 1.0, False)

    cases = [
        (
            "interacting layer",
            lambda: both_ways(autoint.interacting_layer, *tensors((1024, 39, 64), (4, 64, 64)), num_heads=2),
        ),
        (
            "first interacting layer",
            lambda: both_ways(autoint.interacting_layer, *tensors((1024, 39, 16), (4, 16, 64)), num_heads=2),
        ),
        (
            "interacting layer, float32",
            lambda: both_ways(
                autoint.interacting_layer, *tensors((1024, 39, 64), (4, 64, 64), dtype=torch.float32), num_heads=2
            ),
        ),
        ("network of interacting layers", lambda: network(1024, 39)),
        (
            "interacting layer, official, float32",
            lambda: both_ways(
                autoint.interacting_layer,
                *tensors((1024, 23, 16), (4, 16, 64), (4, 64), dtype=torch.float32),
                num_heads=2,
            ),
        ),
    ]
    return cases


def _rest_davit():
    import torch

    from attnbook import davit
    from attnbook.depthwise import depthwise_conv_op
    from attnbook.lab.testing import both_ways, tensors

    def channels(B, N, C, groups, dtype=torch.bfloat16, together=False):
        qkv, out, dqkv = tensors((B, N, 3 * C), (B, N, C), (B, N, 3 * C), dtype=dtype)
        parts, (o,), grads = (davit._groups_of(t, groups, n) for t, n in ((qkv, 3), (out, 1), (dqkv, 3)))
        weights = davit._channel_forward(*parts, o, 0.1)
        davit.CHANNEL_LAUNCH["together"] = together
        for column_sums in (False, True):
            davit._channel_backward(o, None, *parts, weights, *grads, 0.1, column_sums)

    def windows(shape, window, dtype=torch.bfloat16):
        _attend(davit.WINDOW.name, shape, shape[2:-1], (window, window), dtype=dtype)

    def packed_windows(B, X, Y, C, heads, window, dtype=torch.bfloat16, **options):
        both_ways(
            davit.window_attention_packed,
            tensors((B, X, Y, 3 * C), dtype=dtype)[0],
            heads=heads,
            window_size=window,
            backend="triton",
            **options,
        )

    def positions(shape, dtype=torch.bfloat16):
        x, weight, bias = tensors(shape, (shape[3], 1, 3, 3), (shape[3],), dtype=dtype)
        both_ways(lambda *a: depthwise_conv_op(*a, 1, True), x, weight, bias)

    def layer(B, N, C, groups):
        both_ways(
            davit.channel_layer_op, *tensors((B, N, C), (3 * C, C), (3 * C,), (C, C), (C,)), groups=groups, scale=0.1
        )

    cases = [
        ("channel attention", lambda: channels(64, 784, 384, 12)),
        ("channel attention, both sweeps in one launch", lambda: channels(64, 784, 384, 12, together=True)),
        ("channel attention, shares", lambda: channels(1, 65536, 96, 3)),
        ("channel attention, wide groups", lambda: channels(2, 784, 256, 2)),
        ("channel attention, float32", lambda: channels(2, 784, 384, 12, dtype=torch.float32)),
        ("channel attention, layer", lambda: layer(8, 784, 384, 12)),
        ("position encoding", lambda: positions((8, 56, 56, 96))),
        ("position encoding, float32", lambda: positions((8, 56, 56, 96), torch.float32)),
        (
            "position encoding, small maps",
            lambda: [positions(shape) for shape in ((64, 14, 14, 384), (64, 7, 7, 768), (2, 9, 3, 24))],
        ),
        ("own window 7", lambda: packed_windows(8, 56, 56, 96, 3, 7)),
        ("own window 7, ragged", lambda: packed_windows(2, 64, 60, 192, 6, 7, pad_mode="mask")),
        ("own window 12, ragged", lambda: packed_windows(2, 100, 90, 192, 6, 12, pad_mode="mask")),
        ("own window 7, head_dim 64", lambda: packed_windows(2, 28, 28, 192, 3, 7)),
        ("window 7", lambda: windows((64, 3, 56, 56, 32), 7)),
        ("window 12, ragged", lambda: windows((2, 6, 100, 90, 32), 12)),
        ("window 16", lambda: windows((2, 8, 128, 128, 32), 16)),
        ("window 7, float32", lambda: windows((2, 3, 56, 56, 32), 7, dtype=torch.float32)),
    ]
    return cases


def _rest_routing():
    import torch

    from attnbook import routing
    from attnbook.lab.testing import both_ways, tensors

    def routed(B, H, n, k, d, window=0, dtype=torch.bfloat16, last_resort="include"):
        "Norm, scores, selection, attention in clusters and the mean; with window 0 the nearest centroid's segments."
        raw, v, mu = tensors((B, n, H, d), (B, H, n, d), (H, k, d), dtype=dtype)
        x = routing.spherical_norm_op(raw.requires_grad_().transpose(1, 2), 1e-6)
        if window:
            routing.route_scores_op(x, mu)
            scores = torch.zeros(B, H, k, n)
            m = routing.select_topw_op(scores, window)
        else:
            m = routing.Segments(*routing.route_nearest_op(x, mu, None))
            routing.cluster_sums_op(x, m.order, m.offsets)
            m = routing.sort_by_cluster(torch.arange(n).expand(B, H, n) % k, k)
        out = routing.routed_attention(x, x, v.requires_grad_(), m, causal=True, self_attention=last_resort)
        torch.autograd.grad(out.float().sum(), [raw, v])

    cases = [
        ("routing top-w", lambda: routed(1, 2, 4096, 8, 64, 512)),
        (
            "routing top-w, two lists",
            lambda: both_ways(
                routing.routed_attention,
                *tensors(*[(1, 2, 2048, 64)] * 3),
                causal=False,
                membership=[torch.zeros(1, 2, 8, w, dtype=torch.int32) for w in (256, 128)],
            ),
        ),
        (
            "routing top-w, fallback",
            lambda: both_ways(
                routing.routed_attention,
                *tensors(*[(1, 2, 2048, 64)] * 3),
                causal=True,
                membership=torch.zeros(1, 2, 8, 256, dtype=torch.int32),
                self_attention="fallback",
            ),
        ),
        ("routing top-w, float32", lambda: routed(1, 2, 2048, 16, 64, 128, dtype=torch.float32)),
        ("routing top-w, head_dim 128", lambda: routed(1, 2, 4096, 8, 128, 512)),
        (
            "routing top-w, one list, keys apart",
            lambda: both_ways(
                routing.routed_attention,
                *tensors(*[(1, 2, 2048, 64)] * 3),
                causal=False,
                membership=torch.zeros(1, 2, 8, 250, dtype=torch.int32),
                padded=True,
            ),
        ),
        ("routing top-w, head_dim 129", lambda: routed(1, 2, 2048, 8, 129, 256)),
        ("routing nearest", lambda: routed(1, 2, 4096, 64, 64)),
        ("routing nearest, fallback", lambda: routed(1, 2, 4096, 64, 64, last_resort="fallback")),
        ("routing nearest, head_dim 128", lambda: routed(1, 2, 4096, 64, 128)),
        ("routing nearest, float32", lambda: routed(1, 2, 2048, 16, 64, dtype=torch.float32)),
        (
            "band with last resort",
            lambda: both_ways(
                routing.plain_attention, *tensors(*[(1, 2, BIG, 64)] * 2), window=256, self_attention="fallback"
            ),
        ),
    ]
    return cases


def _rest_convit():
    import torch

    from attnbook import convit
    from attnbook.lab.testing import both_ways, tensors

    def gpsa(B, H, grid, D, dtype=torch.bfloat16, **options):
        N = grid[0] * grid[1]
        both_ways(convit.gpsa, *tensors(*[(B, H, N, D)] * 3, (H, 3), (H,), dtype=dtype), grid_size=grid, **options)

    cases = [
        ("gpsa, 14 x 14", lambda: gpsa(256, 6, (14, 14), 64)),
        ("gpsa, 14 x 14, head_dim 48", lambda: gpsa(64, 9, (14, 14), 48)),
        ("gpsa, 8 x 12, head_dim 16", lambda: gpsa(256, 9, (8, 12), 16)),
        ("gpsa, 16 x 16", lambda: gpsa(64, 4, (16, 16), 64)),
        ("gpsa, one row", lambda: gpsa(64, 4, (1, 250), 32)),
        ("gpsa, float32", lambda: gpsa(64, 4, (8, 8), 64, dtype=torch.float32)),
        ("gpsa, composed", lambda: gpsa(64, 6, (14, 14), 64, route="composed")),
        (
            "gpsa packed",
            lambda: both_ways(convit.gpsa_packed, *tensors((64, 196, 3 * 384), (6, 3), (6,)), grid_size=(14, 14)),
        ),
    ]
    return cases


def _rest_ring():
    import torch

    from attnbook import ring
    from attnbook.lab.testing import tensors

    def hops(layout, size, rows, shape, heads_kv=None, dtype=torch.bfloat16, length=None, causal=True):
        "Every hop of one rank, forward and backward."
        B, H, D = shape
        q, k = tensors((B, H, rows, D), (B, heads_kv or H, rows, D), dtype=dtype)
        job = ring.Job(causal, layout, length or rows * size, length or rows * size, D**-0.5, True, False)
        alone = ring.SimulatedGroup(size)
        found = alone.run([ring.ring_forward_schedule(r, size, q, k, k, job) for r in range(size)])
        alone.run(
            [ring.ring_backward_schedule(r, size, q, k, k, out, lse, out, job) for r, (out, lse) in enumerate(found)]
        )

    cases = [
        ("ring, zigzag", lambda: hops("zigzag", 2, 4096, (1, 2, 128))),
        ("ring, zigzag, head_dim 64, grouped heads", lambda: hops("zigzag", 3, 2048, (1, 4, 64), heads_kv=2)),
        ("ring, striped", lambda: hops("striped", 2, 1024, (1, 2, 128))),
        ("ring, contiguous, ragged, head_dim 256", lambda: hops("contiguous", 2, 1000, (1, 2, 256), length=1990)),
        ("ring, float32", lambda: hops("zigzag", 2, 1024, (1, 2, 128), dtype=torch.float32)),
    ]
    return cases


def _rest_halo():
    import torch

    from attnbook import halo
    from attnbook.lab.testing import both_ways, tensors

    def haloed(B, H, side, D, b, h, Dv=None, stride=1, tables=True, dtype=torch.bfloat16, **options):
        shapes = (B, H, -(-side // stride), -(-side // stride), D), (B, H, side, side, D), (B, H, side, side, Dv or D)
        both_ways(
            lambda q, k, v, y=None, x=None: halo.halo_attention(
                q, k, v, b, h, rel_height=y, rel_width=x, query_stride=stride, **options
            ),
            *tensors(*shapes, *[(2 * (b + h) - 1, D)] * (2 * tables), dtype=dtype),
        )

    cases = [
        ("halo", lambda: haloed(64, 8, 56, 32, 8, 3)),
        ("halo, zeros", lambda: haloed(64, 8, 56, 32, 8, 3, padding="zeros")),
        ("halo, stride 2", lambda: haloed(64, 8, 64, 16, 8, 3, stride=2)),
        ("halo, no tables", lambda: haloed(64, 8, 56, 32, 8, 3, tables=False)),
        ("halo, H4", lambda: haloed(16, 8, 96, 16, 12, 2)),
        ("halo, H5, wide values", lambda: haloed(4, 8, 28, 64, 14, 2, Dv=160)),
        ("halo, H7, ragged", lambda: haloed(4, 8, 38, 32, 10, 3, Dv=128)),
        ("halo, head_dim 64", lambda: haloed(16, 8, 64, 64, 8, 3)),
        ("halo, float32", lambda: haloed(2, 8, 56, 32, 8, 3, dtype=torch.float32)),
        ("halo, strided last stage", lambda: haloed(4, 8, 16, 64, 8, 3, stride=2, padding="zeros")),
    ]

    def halo_layer(B, H, side, D, dtype=torch.bfloat16, **options):
        "The packed operation, as networks use it."
        layer = halo.HaloAttention(H * D, num_heads=H, **options).to(dtype)
        x = tensors((B, H * D, side, side), dtype=dtype)[0].contiguous(memory_format=torch.channels_last)
        both_ways(lambda x, *_: layer(x), x, *layer.parameters())

    cases += [
        (
            f"halo packed, {side} x {side}, head_dim {D}, {padding}",
            lambda side=side, D=D, padding=padding: halo_layer(4, 8, side, D, padding=padding),
        )
        for side, D in ((64, 8), (32, 16), (16, 32), (8, 64))
        for padding in ("zeros", "mask")
    ]
    cases += [
        ("halo packed, float32", lambda: halo_layer(4, 8, 56, 32, dtype=torch.float32)),
        ("halo packed, H4", lambda: halo_layer(4, 8, 96, 16, block_size=12, halo_size=2)),
        ("halo packed, H6", lambda: halo_layer(4, 8, 64, 32, block_size=8, halo_size=4, value_ratio=3.0)),
    ]
    cases += [(f"halo, head_dim {D}, no tables", lambda D=D: haloed(4, 8, 24, D, 8, 3, tables=False)) for D in (8, 12)]
    return cases


# What determines a kernel


@lru_cache(maxsize=None)
def _read(function) -> tuple[str, tuple]:
    "The text of a function, without comments, layout and docstring, and what it names: (path, value)."
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # a lambda in the middle of a statement
        return function.__code__.co_code.hex() + str(function.__code__.co_consts), ()
    body = tree.body[0].body if isinstance(tree.body[0], ast.FunctionDef) else []
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body[:1] = [ast.Pass()] if len(body) == 1 else []
    scope, named = function.__globals__ | inspect.getclosurevars(function).nonlocals, []
    for node in ast.walk(tree):
        chain = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in scope:
            path, value = node.id, scope[node.id]
            while chain and isinstance(value, types.ModuleType):
                path, value = f"{path}.{chain[0]}", getattr(value, chain.pop(0), None)
            named.append((path, getattr(value, "value", value) if type(value).__name__ == "constexpr" else value))
    return ast.unparse(tree), tuple(named)


def _reachable(value, found: dict, seen: set) -> None:
    "Adds to `found` the text of a function and of all that it reaches, and the constants that these name."
    function = getattr(
        value, "fn", value
    )  # a JIT function and a constexpr function hold the function they were made of
    if isinstance(value, (tuple, list)):
        for v in value:
            _reachable(v, found, seen)
    if isinstance(function, type) and function.__module__.startswith("attnbook"):
        found[function.__qualname__] = str(getattr(function, "_fields", "")) + str(
            getattr(function, "_field_defaults", "")
        )
    if (
        not isinstance(function, types.FunctionType)
        or function.__module__.partition(".")[0] in ("triton", "torch")
        or function in seen
    ):
        return
    seen.add(function)
    name = function.__qualname__  # without its module: a kernel that moves stays what it is
    while name in found:  # another function of one factory
        name += "'"
    found[name], named = _read(function)
    for path, v in named:
        if isinstance(v, (bool, int, float, str, tuple)) or v is None:
            found[f"{name}: {path}"] = _described(v)
        _reachable(v, found, seen)


def _described(value) -> str:
    "A constant as text that does not depend on the process."
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}{getattr(type(value), '_fields', '')}({', '.join(map(_described, value))})"
    if isinstance(value, dict):
        return f"({', '.join(f'{_described(k)}: {_described(v)}' for k, v in sorted(value.items(), key=str))})"
    function = getattr(value, "fn", None)
    if isinstance(function, types.FunctionType):
        return function.__qualname__
    if type(value).__name__ == "constexpr":
        return _described(value.value)
    return re.sub(r" at 0x[0-9a-f]+", "", str(value)).replace(TRITON_FILES, "")


@lru_cache(maxsize=None)
def _sources(*functions) -> str:
    "The hash of all that the functions reach."
    found, seen = {}, set()
    for f in functions:
        _reachable(f, found, seen)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _functions_in(value) -> list:
    "The functions among the constants of a launch."
    if isinstance(value, (tuple, list)):
        return [f for v in value for f in _functions_in(v)]
    return [value] if isinstance(getattr(value, "fn", None), types.FunctionType) else []


def key_of(src, options: dict) -> str:
    "The hash of all that determines what a launch compiles to; the architecture is among the options."
    functions = [f for v in src.constants.values() for f in _functions_in(v)]
    parts = (
        _sources(src.fn.fn, *(f.fn for f in functions)),
        _described(src.signature),
        _described(src.constants),
        _described(src.attrs),
        _described(options),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


# What the compiler says of a kernel


def _resources(ptx: str) -> tuple[int, int, bool]:
    "Registers and spilled bytes per thread, from the assembler that Triton brings, and whether it serialized matrix instructions."
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx)
        f.flush()
        said = subprocess.run(
            [ptxas, "-v", "--gpu-name", target, f.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
    return (
        int(re.search(r"Used (\d+) registers", said)[1]),
        int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "instructions are serialized" in said,
    )


def _disassembled(cubin: bytes) -> str:
    dis = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        return subprocess.run([dis, "-c", f.name], capture_output=True, text=True, check=True).stdout


def _unwritten(text: str) -> list[str]:
    """The instructions of a disassembly that read a uniform register which nothing before them has written.

    ptxas 12.8 made such code for the addresses of some tensor-core operands: a GPU then reads memory that is not the program's.
    """
    known, found = set(), []
    for line in text.splitlines():
        m = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line)
        if not m:
            continue
        op, args = m[1], [a.strip() for a in m[2].split(",")]
        if "SETP" not in op:  # whose first register is read
            while len(args) > 1 and re.fullmatch(r"U?P(\d|T)", args[0]):
                args.pop(0)  # a predicate written beside the register, as in ULOP3.LUT UP0, UR7, …
        writes = re.fullmatch(r"UR(\d+)", args[0]) if not op.startswith(("UTMA", "SYNCS", "UBLK")) else None
        reads = set()
        for n, a in enumerate(args):
            of = {int(r) for r in re.findall(r"\bUR(\d+)\b", a)} if n or not writes else set()
            if a.startswith("gdesc"):  # a pair of 64-bit descriptors, or only the second where A is in registers
                of = {r + i for r in of for i in range(0 if n == 1 else 2, 4)}
            elif a.startswith("desc"):
                of |= {int(re.match(r"desc\[UR(\d+)", a)[1]) + 1}
            reads |= of
        if not reads <= known:
            found.append(m[0])
        if writes:
            wide = 4 if ".128" in op else 2 if ".64" in op or ".WIDE" in op else 1
            known |= {int(writes[1]) + i for i in range(wide)}
    return found


_WORK = []  # what the processes that compile find in their copy of this one


def _compiled(n: int) -> dict:
    "What a launch compiles to: its row, with `error` where the compiler fails."
    row, src, target, options = _WORK[n]
    try:
        kernel = triton.compiler.compiler.compile(src, target=target, options=options)
        if row["arch"] in ELSEWHERE:
            return row | {"shared": kernel.metadata.shared}
        found = _resources(kernel.asm["ptx"])
        return row | dict(
            zip(MEASURED, (*found, kernel.metadata.shared, _unwritten(_disassembled(kernel.asm["cubin"]))))
        )
    except Exception as e:
        return row | {"error": f"{type(e).__name__}: {e}"[-2000:]}


# The process that launches


def _case_lists(only: str = "") -> dict:
    "For every file of cases, and every chapter below that has none yet, a function that gives its (name, function) pairs."

    def load(name):
        return lambda: importlib.import_module(name).COMPILE

    sys.path.insert(0, str(HERE))
    lists = {n.removeprefix("_rest_"): f for n, f in globals().items() if n.startswith("_rest_")}
    lists |= {p.stem.removeprefix("compile_"): load(p.stem) for p in sorted(HERE.glob("compile_*.py"))}
    return {n: f for n, f in lists.items() if only in ("", n)}


def _trace(arch: str, only: str = "") -> list[tuple[dict, object, object, dict]]:
    "Every launch of every case for an architecture, each key once: its row so far, and what Triton's compiler is asked."
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_target = lambda self: GPUTarget(
            *(ELSEWHERE[arch][0] if arch in ELSEWHERE else ("cuda", ARCHES[arch][0], 32))
        )
        get_current_device = lambda self: 0
        get_current_stream = lambda self, device=None: 0
        get_device_interface = lambda self: torch.cuda
        get_active_torch_device = lambda self: torch.device("cpu")

    jobs, case, column = {}, "", ELSEWHERE[arch][2] if arch in ELSEWHERE else arch
    run = JITFunction.run

    def write_down(src, target=None, options=None, **_):
        row = {
            "arch": arch,
            "case": case,
            "kernel": src.fn.__name__,
            "key": key_of(src, options),
            "triton": triton.__version__,
        }
        jobs.setdefault(row["key"], (row, src, target, options))
        return types.SimpleNamespace()

    def nobody_looks(*shape):
        return lambda *args, **options: args[0].new_empty([args[i].shape[d] for i, d in shape])

    # products of large matrices that hold nothing in particular took most of the time
    aten = torch.library.Library("aten", "IMPL")
    for name, shape in {"mm": ((0, 0), (1, 1)), "addmm": ((1, 0), (2, 1)), "bmm": ((0, 0), (0, 1), (1, 2))}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            aten.impl(name, nobody_looks(*shape), "CPU", allow_override=True)

    def launch_nothing(self, *args, grid, warmup, **kwargs):
        if arch in ELSEWHERE and ELSEWHERE[arch][0][0] == "hip":
            kwargs.pop(
                "maxnreg", None
            )  # AMD's compiler has no such option: a launch that gives it is refused there, which is found here but not mended
        run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = launch_nothing
    triton.compiler.compile = write_down  # a JIT function takes it from here when it is launched for the first time
    triton.runtime.driver.set_active(Driver())
    lists = {name: f() for name, f in _case_lists(only).items()}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "attnbook":
            for attribute, instead in (
                ("arch_of", lambda device: column),
                ("resolve_backend", lambda backend, tensor: "triton"),
            ):
                if hasattr(module, attribute):
                    setattr(module, attribute, instead)
            for attribute in ("_describable", "describable"):
                if column != "sm90" and hasattr(module, attribute):
                    setattr(module, attribute, lambda tensor: False)
    if arch in ELSEWHERE and ELSEWHERE[arch][0][0] == "hip":
        torch.version.hip = "6"  # `dot_precision` asks
    for cases in lists.values():
        for case, launch in cases:
            try:
                launch()
            except Exception as e:
                e.add_note(f"in the case {case!r}")
                raise
    return list(jobs.values())


# The ledger


def ledger() -> dict[tuple[str, str, str], dict]:
    "Its rows by version of Triton, architecture and key."
    lines = LEDGER.read_text().splitlines() if LEDGER.exists() else []
    return {(r["triton"], r["arch"], r["key"]): r for r in map(json.loads, lines)}


def rows_of(arch: str, only: str = "", everything: bool = False, processes: int = 1) -> dict[str, list[dict]]:
    """Every kernel of an architecture: `known` rows from the ledger, `new` ones that it lacks, and `drawn` ones, compiled although it has
    them (`everything`: all). For a fresh process in which Triton does not interpret.
    """
    known, jobs = ledger(), _trace(arch, only)
    rows = [known.get((triton.__version__, arch, row["key"])) for row, *_ in jobs]
    old = [job for job, row in zip(jobs, rows) if row]
    drawn = old if everything else random.SystemRandom().sample(old, min(DRAWN, len(old)))
    _WORK[:] = [job for job, row in zip(jobs, rows) if not row] + drawn
    with multiprocessing.get_context("fork").Pool(max(1, min(processes, len(_WORK)))) as pool:
        compiled = pool.map(_compiled, range(len(_WORK)), chunksize=1)
    new = len(_WORK) - len(drawn)
    return {
        "known": [row | {"case": job[0]["case"]} for job, row in zip(jobs, rows) if row],
        "new": compiled[:new],
        "drawn": compiled[new:],
    }


def in_fresh_process(arch: str, *options: str) -> dict[str, list[dict]]:
    env = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__, "--rows", "--arch", arch, *options], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def complaints(arch: str, rows: dict[str, list[dict]]) -> list[str]:
    "What is wrong with the kernels of an architecture, a line for each."
    everything = [*rows["known"], *rows["new"], *rows["drawn"]]
    found = [f"{arch}, {r['case']}, {r['kernel']}: {r['error']}" for r in everything if "error" in r]
    known = {r["key"]: r for r in rows["known"]}

    def said(row):
        return ", ".join(f"{n} {row[n]}" for n in MEASURED)

    def need(ok, row, what):
        if not ok:
            found.append(f"{arch}, {row['case']}, {row['kernel']}: {what} ({said(row)})")

    for r in (r for r in rows["drawn"] if "error" not in r):
        need(
            said(r) == said(known[r["key"]]),
            r,
            f"the ledger says {said(known[r['key']])}; run make ledger, and say why it changed",
        )
    for r in (r for r in everything if "error" not in r):
        need(r["shared"] <= ARCHES[arch][1], r, "more shared memory than a block may have")
        need(not r["unwritten"], r, "reads registers that nothing wrote")
        # zeros written to accumulators between matrix instructions, which then wait for each other, slowed ring_backward_dkv
        need(
            not (
                arch == "sm90"
                and r["serialized"]
                and r["kernel"] in ("ring_forward", "ring_backward_dq", "ring_backward_dkv")
            ),
            r,
            "serialized",
        )
        need(
            not (
                arch == "sm90"
                and "wide, head_dim 64" in r["case"]
                and r["kernel"] == "tile_forward"
                and r["registers"] > 168
            ),
            r,
            "too many registers",
        )
        if arch == "sm90" and "float32" not in r["case"]:  # exact float32 products are multiply-adds, and spill
            need(r["spills"] <= (2048 if "256" in r["case"] else 640), r, "spills too much")
    return found


def test_a_key_follows_what_a_kernel_reaches(tmp_path, monkeypatch):
    written = "WIDTH = 4\n\ndef inner(x):\n    return x + WIDTH\n\ndef kernel(x):\n    'What it does.'\n    return inner(x) * 2\n"
    monkeypatch.syspath_prepend(tmp_path)

    def key(name, *change):
        (tmp_path / f"{name}.py").write_text(written.replace(*change) if change else written)
        return _sources(importlib.import_module(name).kernel)

    as_written = key("kernel_as_written")
    assert key("kernel_moved", "WIDTH = 4", "\n\nOTHER = 5\nWIDTH = 4") == as_written
    assert (
        key("kernel_explained", "* 2", "* 2  # doubled")
        == as_written
        == key("kernel_described", "What it does", "What else it does")
    )
    assert (
        len(
            {
                as_written,
                key("kernel_constant", "4", "5"),
                key("kernel_callee", "x + W", "x - W"),
                key("kernel_itself", "* 2", "* 3"),
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("lines", "guilty"),
    [
        (["UMOV UR4, 0x1 ;", "IMAD.U32 R1, RZ, RZ, UR4 ;"], []),
        (["IMAD.U32 R1, RZ, RZ, UR4 ;"], [0]),
        (["UMOV UR4, 0x1 ;", "ULOP3.LUT UP0, UR7, UR4, 0x2, URZ, 0xc0, !UPT ;", "USHF.L.U32 UR6, UR7, 0x1, URZ ;"], []),
        (["ULOP3.LUT UP0, UR7, UR4, 0x2, URZ, 0xc0, !UPT ;", "USHF.L.U32 UR6, UR7, 0x1, URZ ;"], [0]),
        (["UISETP.NE.AND UP0, UPT, UR4, URZ, UPT ;", "IMAD.U32 R1, RZ, RZ, UR4 ;"], [0, 1]),
        (["ULDC.64 UR4, c[0x0][0x118] ;", "@P0 LDG.E R1, desc[UR4][R2.64] ;"], []),
        (["ULDC UR4, c[0x0][0x118] ;", "LDG.E R1, desc[UR4][R2.64] ;"], [1]),
    ],
    ids=["written", "not written", "beside a predicate", "through a predicate", "compared", "pair", "half a pair"],
)
def test_reads_of_unwritten_registers_are_found(lines, guilty):
    text = [f"        /*{16 * n:04x}*/                   {line}" for n, line in enumerate(lines)]
    found = _unwritten("\n".join(text))
    assert len(found) == len(guilty) and all(lines[n] in f for n, f in zip(guilty, found))


def test_what_is_wrong_with_a_kernel_is_said():
    row = {
        "arch": "sm90",
        "case": "ring",
        "kernel": "ring_forward",
        "key": "a",
        "registers": 99,
        "spills": 0,
        "serialized": False,
        "shared": 1024,
        "unwritten": [],
    }
    assert complaints("sm90", {"known": [row], "new": [], "drawn": [row]}) == []
    for change, words in (
        ({"shared": 2**20}, "shared memory"),
        ({"unwritten": ["R2UR"]}, "nothing wrote"),
        ({"serialized": True}, "serialized"),
        ({"spills": 700}, "spills"),
        ({"registers": 98}, "the ledger says registers 99"),
        ({"error": "ptxas died"}, "ptxas died"),
    ):
        said = complaints("sm90", {"known": [row], "new": [], "drawn": [row | change]})
        assert any(words in s and "ring_forward" in s for s in said)


@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_compiles(arch, request):
    share = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    rows = in_fresh_process(arch, "--processes", str(share), *["--all"] * request.config.getoption("--slow"))
    if rows["new"]:
        names = sorted({f"{r['case']} ({r['kernel']})" for r in rows["new"]})
        warnings.warn(
            f"{arch}: {len(rows['new'])} kernels are not in {LEDGER.name} and were compiled; run make ledger. {'; '.join(names[:5])}",
            stacklevel=1,
        )
    assert {r["kernel"] for r in rows["known"] + rows["new"]} >= {
        "tile_forward",
        "tile_backward_dq",
        "tile_backward_dkv",
    }
    assert not (wrong := complaints(arch, rows)), "\n".join(wrong)


def elsewhere(arch: str, rows: dict[str, list[dict]]) -> list[str]:
    "The kernels that do not compile for an architecture, or want more shared memory than it has: a line for each, with the reason."
    found = [
        f"{r['case']}, {r['kernel']}: "
        + (
            next((line for line in r["error"].splitlines() if "rror" in line), r["error"].strip()[-160:]).strip()[:160]
            if "error" in r
            else f"{r['shared']} bytes of shared memory, and a block has {ELSEWHERE[arch][1]}"
        )
        for r in rows["new"]
        if "error" in r or r["shared"] > ELSEWHERE[arch][1]
    ]
    return sorted(set(found))


def test_failures_elsewhere_are_listed():
    row = {"case": "halo", "kernel": "tile_forward", "shared": 2**16}
    assert elsewhere("gfx942", {"new": [row]}) == [] and elsewhere("sm120", {"new": [row]}) == []
    assert elsewhere("gfx942", {"new": [row | {"shared": 2**17}]}) == [
        "halo, tile_forward: 131072 bytes of shared memory, and a block has 65536"
    ]
    assert elsewhere("sm100", {"new": [row, {"case": "a", "kernel": "k", "error": "x\nNotImplementedError: y"}]}) == [
        "a, k: NotImplementedError: y"
    ]


def listed(arch: str) -> dict:
    "What FAILURES says of an architecture."
    rows = [json.loads(line) for line in FAILURES.read_text().splitlines()] if FAILURES.exists() else []
    return next((r for r in rows if r["arch"] == arch), {"arch": arch, "triton": None, "kernels": 0, "failed": []})


def list_failures(arch: str, rows: dict[str, list[dict]]) -> str:
    "Writes what fails for an architecture into FAILURES, in place of what stood there. Returns a line about it."
    row = {"arch": arch, "triton": triton.__version__, "kernels": len(rows["new"]), "failed": elsewhere(arch, rows)}
    kept = [listed(a) if a != arch else row for a in ELSEWHERE]
    FAILURES.write_text("".join(f"{json.dumps(r)}\n" for r in kept if r["triton"]))
    return f"{arch}: {len(row['failed'])} of {row['kernels']} kernels fail, listed in {FAILURES.name}"


def test_what_fails_elsewhere_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "FAILURES", tmp_path / "elsewhere.jsonl")
    assert listed("sm120")["failed"] == []
    good, bad = ({"case": c, "kernel": "k", "shared": n} for c, n in (("a", 1), ("b", 2**20)))
    list_failures("sm120", {"new": [good, bad]}), list_failures("sm100", {"new": [good]})
    assert [r["arch"] for r in map(json.loads, FAILURES.read_text().splitlines())] == ["sm100", "sm120"]
    assert listed("sm120")["kernels"] == 2 and listed("sm120")["failed"][0].startswith("b, k: 1048576 bytes")
    list_failures("sm120", {"new": [good]})
    assert listed("sm120")["failed"] == listed("sm100")["failed"] == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ELSEWHERE)
def test_kernels_compile_elsewhere(arch):
    """Blackwell and AMD, without a machine of either: nothing fails that tests/compile_elsewhere.jsonl does not list. With another Triton than
    the one it was written with, what else fails is a warning."""
    rows, known = in_fresh_process(arch, "--processes", str(os.cpu_count() or 1)), listed(arch)
    failed = sorted(set(elsewhere(arch, rows)) - set(known["failed"]))
    text = f"{arch}: {len(failed)} of {len(rows['new'])} kernels fail anew\n  " + "\n  ".join(failed)
    if failed and known["triton"] != triton.__version__:
        warnings.warn(text, stacklevel=1)
    assert rows["new"] and (not failed or known["triton"] != triton.__version__), text


def update(only: str = "") -> str:
    "Writes the ledger anew: what is launched today, for this version of Triton. With `only`, adds to it. Returns what changed."
    version = lambda text: tuple(int(n) for n in re.findall(r"\d+", text)[:3])
    before, after, here = ledger(), {}, triton.__version__
    for arch in ARCHES:
        rows = in_fresh_process(arch, "--only", only, "--processes", str(os.cpu_count() or 1))
        again = {r["key"] for r in rows["drawn"]}
        after |= {
            (here, arch, r["key"]): r
            for r in [*(r for r in rows["known"] if r["key"] not in again), *rows["drawn"], *rows["new"]]
        }
    kept = {k: r for k, r in before.items() if only or version(k[0]) > version(here)}
    rows = {k: r for k, r in {**kept, **after}.items() if "error" not in r}
    lines = sorted(json.dumps(r) for r in rows.values())
    LEDGER.write_text("".join(f"{line}\n" for line in lines))
    changed = sum(before[k] != rows[k] for k in before.keys() & rows.keys())
    return f"{LEDGER.name}: {len(rows)} kernels, {len(rows.keys() - before.keys())} new, {len(before.keys() - rows.keys())} gone, {changed} changed"


def main():
    parser = argparse.ArgumentParser(description="compile every kernel, or what the ledger lacks of them")
    parser.add_argument(
        "--update",
        action="store_true",
        help="write the ledger; with --arch sm100, sm120 or gfx942 the list of what fails there",
    )
    parser.add_argument("--all", action="store_true", help="compile what the ledger knows too")
    parser.add_argument("--only", default="", metavar="CHAPTER", help="the cases of one chapter")
    parser.add_argument("--arch", choices=[*ARCHES, *ELSEWHERE], help="one architecture")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--rows", action="store_true", help="print the rows of --arch as JSON")
    o = parser.parse_args()
    if o.rows:
        print(json.dumps(rows_of(o.arch, o.only, o.all, o.processes)))
    elif o.update and o.arch in ELSEWHERE:
        print(list_failures(o.arch, in_fresh_process(o.arch, "--processes", str(o.processes))))
    elif o.update:
        print(update(o.only))
    else:
        for arch in [o.arch] if o.arch else ARCHES:
            rows = in_fresh_process(arch, "--only", o.only, "--processes", str(o.processes), *["--all"] * o.all)
            print(
                f"{arch}: {len(rows['known'])} kernels in the ledger, {len(rows['new'])} new, {len(rows['drawn'])} compiled again"
            )
            print(
                "\n".join(elsewhere(arch, rows) if arch in ELSEWHERE else complaints(arch, rows))
                or "nothing is wrong with them"
            )


if __name__ == "__main__":
    main()

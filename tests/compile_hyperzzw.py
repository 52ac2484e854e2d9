# Written from the compile cells of nbs/5_vision/hyperzzw.ipynb by `attnbook export`. Do not edit.
# fmt: off
from functools import partial

import torch

from attnbook.hyperzzw.op import hyperzzw_gate, hyperzzw_global, hyperzzw_local, standardize_gelu
from attnbook.lab.testing import both_ways, tensors


def product(B, C, S, M=3, standardize=True, keep=True, own=False, dtype=torch.bfloat16):
    "The global product, forward and backward, with a kernel in float32."
    x, *vs = tensors(*[(B, C, S, S)] * (1 + M), dtype=dtype)
    kernel = torch.empty(B if own else 1, C, S, S)
    run = lambda x, kernel, *v: sum(
        hyperzzw_global(x, kernel, v, standardize=standardize, return_factors=keep, backend="triton"), ()
    )
    plain = lambda x, kernel, *v: hyperzzw_global(x, kernel, v, standardize=standardize, backend="triton")
    both_ways(run if keep else plain, x, kernel, *vs)


def local(B, C, S, k, own=False, dtype=torch.bfloat16):
    "The local product, forward and backward."
    (x,) = tensors((B, C, S, S), dtype=dtype)
    both_ways(partial(hyperzzw_local, backend="triton"), x, torch.empty(*((B,) if own else ()), C, 1, k, k))


def gate(B, C, S, dtype=torch.bfloat16):
    "The gate, forward and backward."
    x, y = tensors((B, C, S, S), (B, C, S, S), dtype=dtype)
    both_ways(partial(hyperzzw_gate, backend="triton"), x, y, torch.empty(1, 1, S, S))


def norm(B, C, S, given=False):
    "Standardization with GELU, forward and backward."
    statistics = torch.empty(C), torch.empty(C)
    x, over = tensors((B, C, S, S))[0], torch.zeros(C, dtype=torch.bool)
    both_ways(
        lambda x, bias: standardize_gelu(x, over, bias, statistics if given else None, backend="triton")[0],
        x,
        torch.empty(()),
    )


COMPILE = [
    *((f"hyperzzw global, {S} x {S}", lambda S=S: product(64, 144, S)) for S in (14, 28, 32, 48, 64)),
    ("hyperzzw global, one plain factor", lambda: product(64, 144, 32, 1, False, False)),
    ("hyperzzw global, own kernels", lambda: product(64, 144, 32, own=True)),
    ("hyperzzw global, float32", lambda: product(64, 144, 32, dtype=torch.float32)),
    ("hyperzzw global, float32, 64 x 64", lambda: product(16, 144, 64, dtype=torch.float32)),
    *((f"hyperzzw local, k {k}", lambda k=k: local(64, 144, 32, k)) for k in (3, 5, 7, 9)),
    ("hyperzzw local, for each image, k 9", lambda: local(64, 144, 32, 9, own=True)),
    ("hyperzzw local, float32, k 9", lambda: local(64, 144, 32, 9, dtype=torch.float32)),
    *((f"hyperzzw local, {S} x {S}", lambda S=S: local(16, 48, S, 7)) for S in (14, 28, 64, 96)),
    *((f"hyperzzw gate, {S} x {S}", lambda S=S: gate(64, 144, S)) for S in (28, 32, 64, 96)),
    ("hyperzzw gate, float32", lambda: gate(64, 144, 32, dtype=torch.float32)),
    *((f"hyperzzw norm, {S} x {S}", lambda S=S: norm(64, 144, S)) for S in (14, 32, 96)),
    ("hyperzzw norm, given", lambda: norm(64, 144, 32, True)),
]

# Written from the compile cells of nbs/3_locality/neighborhood.ipynb by `attnbook export`. Do not edit.
# fmt: off
from functools import partial

import torch

from attnbook.lab.testing import both_ways, tensors
from attnbook.neighborhood.op import neighborhood_attention


def near(shape, window, table=(), dtype=torch.bfloat16, **options):
    "Forward and backward on empty tensors (batch, heads, *axes, head_dim), with a bias table if its shape is given."
    parts = tensors(*[shape] * 3, *[(shape[1], *table)] * bool(table), dtype=dtype)
    attend = partial(neighborhood_attention, window_size=window, backend="triton", **options)
    both_ways(lambda q, k, v, bias=None: attend(q, k, v, rel_pos_bias=bias), *parts)


COMPILE = [
    ("neighborhood 1-d", lambda: near((1, 2, 4096, 128), 128, is_causal=True)),
    ("neighborhood 2-d with bias", lambda: near((2, 2, 56, 56, 32), 7, table=(13, 13))),
    ("neighborhood 2-d, stride and dilation", lambda: near((1, 2, 64, 64, 64), 13, stride=4, dilation=2)),
    ("neighborhood 2-d, wide", lambda: near((1, 2, 128, 128, 128), 31)),
    ("neighborhood 2-d, float32", lambda: near((1, 2, 64, 64, 64), 13, dtype=torch.float32)),
    ("neighborhood 3-d", lambda: near((1, 2, 16, 24, 32, 128), 9)),
    ("neighborhood 2-d, wide, head_dim 64", lambda: near((1, 2, 128, 128, 64), 33)),
    ("neighborhood 3-d, wide, head_dim 64", lambda: near((1, 2, 16, 32, 32, 64), 11)),
]

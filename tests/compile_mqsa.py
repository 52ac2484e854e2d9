# Written from the compile cells of nbs/6_beyond_tokens/mqsa.ipynb by `attnbook export`. Do not edit.
# fmt: off
import numpy as np
import torch

from attnbook.lab.testing import both_ways, tensors
from attnbook.mqsa.catalogue_op import _catalogue
from attnbook.mqsa.op import causal_attention, windowed_mean
from attnbook.mqsa.reference import padded_segments
from attnbook.mqsa.teacher_reference import transition_graph, transition_teacher


def catalogue_case(N, V, d, dtype=torch.bfloat16, soft=False):
    "The cross-entropy, forward and backward."
    h, e = tensors((N, d), (V, d), dtype=dtype)
    index = torch.zeros(N, dtype=torch.int64)
    teacher = transition_teacher(transition_graph([np.array([0, 1, 2])], V)) if soft else None
    both_ways(lambda h, e: _catalogue(h, e, index, 1.0, teacher, "triton")[0], h, e)


def sublayer_case(B, T, d, heads, dtype=torch.bfloat16, window=3):
    "Window mean and attention, forward and backward."
    segments = padded_segments(torch.zeros(B, dtype=torch.int64), T)
    both_ways(lambda x: windowed_mean(x, window, segments), *tensors((B, T, d), dtype=dtype))
    both_ways(
        lambda q, k, v: causal_attention(q, k, v, segments), *tensors(*[(B, heads, T, d // heads)] * 3, dtype=dtype)
    )


COMPILE = [
    ("catalogue, 64 wide", lambda: catalogue_case(12800, 12101, 64)),
    ("catalogue, 128 wide", lambda: catalogue_case(12800, 12101, 128)),
    ("catalogue, 256 wide", lambda: catalogue_case(12800, 12101, 256)),
    ("catalogue, float32", lambda: catalogue_case(12800, 12101, 64, torch.float32)),
    ("catalogue, float16 and teacher", lambda: catalogue_case(12800, 12101, 64, torch.float16, soft=True)),
    ("L-query sublayer", lambda: sublayer_case(256, 50, 64, 1)),
    ("L-query sublayer, float32", lambda: sublayer_case(256, 50, 64, 1, torch.float32)),
]

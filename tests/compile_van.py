# Written from the compile cells of nbs/3_locality/van.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.lab.testing import both_ways, tensors
from attnbook.van.op import large_kernel_attention_op


def attention_at(B, side, C, kernels=(5, 7), dilation=3, dtype=torch.bfloat16, weights=None):
    "The operation, forward and backward."
    shapes = (C, 1, *[kernels[0]] * 2), (C,), (C, 1, *[kernels[1]] * 2), (C,), (C, C), (C,)
    both_ways(
        lambda *a: large_kernel_attention_op(*a, dilation)[0],
        *tensors((B, side, side, C), dtype=dtype),
        *tensors(*shapes, dtype=weights or dtype),
    )


COMPILE = [
    *(
        (f"large kernel attention, {side} x {side} x {C}", lambda side=side, C=C: attention_at(128, side, C))
        for side, C in ((56, 64), (28, 128), (14, 320), (7, 512), (56, 32), (14, 160))
    ),
    ("large kernel attention, weights in float32", lambda: attention_at(128, 28, 128, weights=torch.float32)),
    ("large kernel attention, float32", lambda: attention_at(8, 28, 128, dtype=torch.float32)),
    ("large kernel attention, ragged", lambda: attention_at(2, 57, 24)),
    ("large kernel attention, K = 28", lambda: attention_at(8, 28, 64, (7, 7), 4)),
    ("large kernel attention, K = 7", lambda: attention_at(8, 28, 64, (3, 4), 2)),
]

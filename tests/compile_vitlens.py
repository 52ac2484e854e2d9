# Written from the compile cells of nbs/7_looking_inside/vitlens.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math

import torch

from attnbook.lab.testing import both_ways, tensors
from attnbook.vitlens.op import attention_stats


def lens_case(grid, d, p=1, dtype=torch.bfloat16, values=True):
    "Statistics with all gradients."
    q, k, v = tensors(*[(2, 4, p + math.prod(grid), d)] * 3, dtype=dtype)
    op = lambda q, k, v: tuple(
        t
        for t in attention_stats(q, k, v if values else None, grid_size=grid, num_prefix_tokens=p)[1 - values :]
        if t.numel()
    )
    both_ways(op, q, k, v)


COMPILE = [
    ("lens, 14 x 14", lambda: lens_case((14, 14), 64)),
    ("lens, 64 x 64", lambda: lens_case((64, 64), 64)),
    ("lens, 20 x 100, head_dim 80, no values", lambda: lens_case((20, 100), 80, p=0, values=False)),
    ("lens, 32 x 32, float32", lambda: lens_case((32, 32), 64, dtype=torch.float32)),
    ("lens, 24 x 24, head_dim 256", lambda: lens_case((24, 24), 256)),
]

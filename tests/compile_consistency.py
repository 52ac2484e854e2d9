# Written from the compile cells of nbs/7_looking_inside/consistency.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.consistency.op import logit_lens_stats
from attnbook.lab.testing import both_ways, tensors


def lens_case(S, N, V, D, dtype=torch.bfloat16, targets=True, **how):
    "Forward and backward of one size."
    h, w = tensors((S, N, D), (V, D), dtype=dtype)
    y = torch.zeros(N, dtype=torch.int64) if targets else None
    return both_ways(lambda h, w: tuple(t for i, t in enumerate(logit_lens_stats(h, w, targets=y, **how)) if t is not None and i != 3), h, w)  # fmt: skip


COMPILE = [
    ("consistency, 13 layers, D 768", lambda: lens_case(13, 512, 50304, 768)),
    ("consistency, 33 layers, D 4096, no targets", lambda: lens_case(33, 256, 32000, 4096, targets=False)),
    ("consistency, D 100, divergence kl", lambda: lens_case(7, 64, 500, 100, divergence="kl")),
    ("consistency, one layer, one token, V 256", lambda: lens_case(1, 1, 256, 64)),
    ("consistency, float32, no divergence", lambda: lens_case(5, 64, 500, 128, torch.float32, divergence="none")),
]

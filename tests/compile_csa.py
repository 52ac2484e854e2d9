# Written from the compile cells of nbs/6_beyond_tokens/csa.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.csa.op import boundary_matching, csa_gate, semantic_summary
from attnbook.csa.reference import FUSIONS
from attnbook.lab.testing import both_ways, tensors


def gated(B, C, T, dtype=torch.bfloat16, masked=True, fuse="sum"):
    "The gate, forward and backward."
    mask = torch.ones(B, T, dtype=torch.bool) if masked else None
    both_ways(
        lambda f, c, t: csa_gate(f, c, t, mask=mask, fuse=fuse, backend="triton"),
        *tensors((B, C, T), (B, C), (B, T), dtype=dtype),
    )


def summed(B, C, T, H, k=3, dtype=torch.bfloat16, masked=True):
    "The semantics' summary, forward and backward."
    mask = torch.ones(B, T, dtype=torch.bool) if masked else None
    both_ways(
        lambda *i: sum(t.float().sum() for t in semantic_summary(*i, mask=mask, backend="triton")),
        *tensors((B, C, T), (H, C, k), (H,), (1, H), (1,), dtype=dtype),
    )


def matched(B, C, T, O, N, D, dtype=torch.bfloat16, **options):
    "Boundary matching, forward and backward."
    both_ways(
        lambda x, w, b: boundary_matching(x, w, b, max_duration=D, backend="triton", **options),
        *tensors((B, C, T), (O, C, N), (O,), dtype=dtype),
    )


COMPILE = [
    ("csa gate", lambda: gated(16, 256, 128)),
    ("csa gate, long", lambda: gated(16, 256, 8192, masked=False)),
    *((f"csa gate, {fuse}", lambda fuse=fuse: gated(16, 256, 128, fuse=fuse)) for fuse in FUSIONS[1:]),
    ("csa gate, float32", lambda: gated(16, 250, 100, dtype=torch.float32)),
    ("summary", lambda: summed(16, 400, 128, 64)),
    ("summary, 2048", lambda: summed(16, 2048, 128, 64, masked=False)),
    ("summary, float32, wide", lambda: summed(2, 100, 130, 200, 1, dtype=torch.float32)),
    ("matching, BMN", lambda: matched(16, 128, 128, 512, 32, 128)),
    ("matching, THUMOS", lambda: matched(16, 128, 128, 512, 32, 64, dtype=torch.float16)),
    ("matching, long", lambda: matched(2, 128, 512, 512, 32, 256)),
    ("matching, float32", lambda: matched(2, 128, 128, 512, 32, 128, dtype=torch.float32)),
    ("matching, legacy, odd", lambda: matched(2, 60, 100, 200, 20, 50, legacy_border=True, activation="none")),
]

# Written from the compile cells of nbs/6_beyond_tokens/csa.ipynb by `attnbook export`. Do not edit.
import torch

from attnbook.csa.op import boundary_matching, csa_gate
from attnbook.csa.reference import FUSIONS
from attnbook.lab.testing import both_ways, tensors


def gated(B, C, T, dtype=torch.bfloat16, masked=True, fuse="sum"):
    "The gate, forward and backward."
    mask = torch.ones(B, T, dtype=torch.bool) if masked else None
    both_ways(lambda f, c, t: csa_gate(f, c, t, mask=mask, fuse=fuse, backend="triton"), *tensors((B, C, T), (B, C), (B, T), dtype=dtype))

def matched(B, C, T, O, N, D, dtype=torch.bfloat16, **options):
    "Boundary matching, forward and backward."
    both_ways(lambda x, w, b: boundary_matching(x, w, b, max_duration=D, backend="triton", **options),
              *tensors((B, C, T), (O, C, N), (O,), dtype=dtype))

COMPILE = [
    ("csa gate", lambda: gated(16, 256, 128)), ("csa gate, long", lambda: gated(16, 256, 8192, masked=False)),
    *((f"csa gate, {fuse}", lambda fuse=fuse: gated(16, 256, 128, fuse=fuse)) for fuse in FUSIONS[1:]),
    ("csa gate, float32", lambda: gated(16, 250, 100, dtype=torch.float32)),
    ("matching, BMN", lambda: matched(16, 128, 128, 512, 32, 128)),
    ("matching, THUMOS", lambda: matched(16, 128, 128, 512, 32, 64, dtype=torch.float16)),
    ("matching, long", lambda: matched(2, 128, 512, 512, 32, 256)),
    ("matching, float32", lambda: matched(2, 128, 128, 512, 32, 128, dtype=torch.float32)),
    ("matching, legacy, odd", lambda: matched(2, 60, 100, 200, 20, 50, legacy_border=True, activation="none")),
]

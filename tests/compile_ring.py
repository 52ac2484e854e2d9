# Written from the compile cells of nbs/4_long_context/ring.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.lab.testing import tensors
from attnbook.ring.schedule import Job, ring_backward_schedule, ring_forward_schedule
from attnbook.ring.transport import SimulatedGroup


def hops(layout, size, rows, shape, heads_kv=None, dtype=torch.bfloat16, length=None, causal=True):
    "Every hop of every rank, forward and backward."
    B, H, D = shape
    q, k = tensors((B, H, rows, D), (B, heads_kv or H, rows, D), dtype=dtype)
    job = Job(causal, layout, length or rows * size, length or rows * size, D**-0.5, True, False)
    alone = SimulatedGroup(size)
    found = alone.run([ring_forward_schedule(r, size, q, k, k, job) for r in range(size)])
    alone.run([ring_backward_schedule(r, size, q, k, k, out, lse, out, job) for r, (out, lse) in enumerate(found)])


COMPILE = [
    ("ring, zigzag", lambda: hops("zigzag", 2, 4096, (1, 2, 128))),
    ("ring, zigzag, head_dim 64, grouped heads", lambda: hops("zigzag", 3, 2048, (1, 4, 64), heads_kv=2)),
    ("ring, striped", lambda: hops("striped", 2, 1024, (1, 2, 128))),
    ("ring, contiguous, ragged, head_dim 256", lambda: hops("contiguous", 2, 1000, (1, 2, 256), length=1990)),
    ("ring, float32", lambda: hops("zigzag", 2, 1024, (1, 2, 128), dtype=torch.float32)),
]

# Written from the compile cells of nbs/4_long_context/block.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.block.op import local_attention
from attnbook.lab.testing import both_ways, tensors


def _local(N, H, T, d, dtype=torch.bfloat16, hidden=False):
    "Forward and backward at a real size, heads last in memory."
    q, k, v = (t.transpose(1, 2) for t in tensors(*[(N, T, H, d)] * 3, dtype=dtype))
    mask = torch.ones(N, T, dtype=torch.bool) if hidden else None
    both_ways(lambda q, k, v: local_attention(q, k, v, mask=mask), q, k, v)


COMPILE = [
    ("local attention", lambda: _local(8192, 16, 5, 64)),
    ("local attention, hidden keys", lambda: _local(4096, 8, 5, 64, hidden=True)),
    ("local attention, head_dim 128", lambda: _local(4096, 16, 9, 128)),
    ("local attention, head_dim 256", lambda: _local(512, 4, 5, 256)),
    ("local attention, float32", lambda: _local(4096, 8, 5, 32, dtype=torch.float32)),
]

# Written from the compile cells of nbs/7_looking_inside/selfaware.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch
import torch.nn.functional as F

from attnbook.lab.testing import both_ways, tensors
from attnbook.selfaware.op import packed_causal_attention
from attnbook.selfaware.reference import DocumentLayout


def packed_case(dim, longest, heads=8, kv_heads=8, dtype=torch.bfloat16, v_dim=None):
    "Forward and all gradients, documents of at most `longest` rows."
    total = 1024
    q, k, v = tensors((total, heads, dim), (total, kv_heads, dim), (total, kv_heads, v_dim or dim), dtype=dtype)
    ends = torch.arange(longest, total + longest, longest, dtype=torch.int32).clamp_max(total)
    layout = DocumentLayout(F.pad(ends, (1, 0)), ends.repeat_interleave(longest)[:total], longest)
    both_ways(lambda q, k, v: packed_causal_attention(q, k, v, layout), q, k, v)


COMPILE = [
    ("closed, documents of 8, head_dim 64", lambda: packed_case(64, 8)),
    ("closed, documents of 64, head_dim 64", lambda: packed_case(64, 64)),
    ("closed, head_dim 16, float32", lambda: packed_case(16, 8, 4, 4, torch.float32)),
    ("closed, head_dim 128, shared keys", lambda: packed_case(128, 16, 8, 2)),
    ("closed, head_dim 80, v_dim 40", lambda: packed_case(80, 8, v_dim=40)),
    ("closed, head_dim 256", lambda: packed_case(256, 8)),
]

# Written from the compile cells of nbs/7_looking_inside/chirper.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.chirper.op import packed_attention, segment_mean
from attnbook.chirper.reference import plan_posts
from attnbook.lab.testing import both_ways, tensors


def posts_case(length, d, heads=4, causal=False, dtype=torch.bfloat16, **kw):
    "Attention within 64 posts, forward and backward."
    plan = plan_posts(torch.arange(65) * length)
    q, k, v = tensors(*[(heads, 64 * length, d)] * 3, dtype=dtype)
    both_ways(lambda q, k, v: packed_attention(q, k, v, plan, causal=causal, shared=True, **kw), q, k, v)


def mean_case(dim, dtype=torch.bfloat16):
    "Means of 64 posts, forward and backward."
    cu = torch.arange(65) * 24
    both_ways(lambda x: segment_mean(x, cu), *tensors((64 * 24, dim), dtype=dtype))


COMPILE = [
    ("posts, head_dim 32", lambda: posts_case(24, 32)),
    ("posts, head_dim 64, causal", lambda: posts_case(24, 64, causal=True)),
    ("posts, head_dim 128, float32", lambda: posts_case(40, 128, dtype=torch.float32)),
    ("posts, head_dim 40", lambda: posts_case(24, 40)),
    ("mean, 768", lambda: mean_case(768)),
    ("mean, 65, float32", lambda: mean_case(65, torch.float32)),
]

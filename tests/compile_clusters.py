# Written from the compile cells of nbs/1_foundations/12_clusters.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.clusters.op import list_attention, segment_attention, select_largest
from attnbook.lab.testing import both_ways, tensors


def in_lists(n, k, w, d, *, two=0, same=True, dtype=torch.bfloat16, **options):
    "Attention in k lists of w, with `two` in other lists of so many keys."
    x, y, v = tensors(*[(1, 2, n, d)] * 3, dtype=dtype)
    a, b = (torch.zeros(1, 2, k, width, dtype=torch.int32) for width in (w, two or 1))
    kw = dict(causal=True, scale=0.1) | options
    both_ways(lambda x, y, v: list_attention(x, x if same and not two else y, v, a, b if two else None, **kw), x, y, v)


def in_segments(n, k, d, dtype=torch.bfloat16, **options):
    "Attention in k segments of one size."
    order, offsets = torch.arange(n).expand(1, 2, n).int(), torch.arange(k + 1).expand(1, 2, -1).int() * (n // k)
    x, v = tensors(*[(1, 2, n, d)] * 2, dtype=dtype)
    both_ways(lambda x, v: segment_attention(x, x, v, (order, offsets), causal=True, scale=0.1, **options), x, v)


COMPILE = [
    ("selection", lambda: select_largest(torch.zeros(2, 8, 4096), 512)),
    ("lists", lambda: in_lists(4096, 8, 512, 64)),
    ("lists, two", lambda: in_lists(2048, 8, 256, 64, two=128, causal=False)),
    ("lists, fallback", lambda: in_lists(2048, 8, 256, 64, same=False, self_attention="fallback")),
    ("lists, float32", lambda: in_lists(2048, 16, 128, 64, dtype=torch.float32)),
    ("lists, head_dim 128", lambda: in_lists(4096, 8, 512, 128)),
    ("lists, one, keys apart", lambda: in_lists(2048, 8, 250, 64, same=False, causal=False, padded=True)),
    ("lists, head_dim 129", lambda: in_lists(2048, 8, 256, 129)),
    ("segments", lambda: in_segments(4096, 64, 64)),
    ("segments, fallback", lambda: in_segments(4096, 64, 64, self_attention="fallback")),
    ("segments, head_dim 128", lambda: in_segments(4096, 64, 128)),
    ("segments, float32", lambda: in_segments(2048, 16, 64, dtype=torch.float32)),
]

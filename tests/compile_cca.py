# Written from the compile cells of nbs/4_long_context/cca.ipynb by `attnbook export`. Do not edit.
# fmt: off
from functools import partial

import torch

from attnbook.cca.cache import CCACache
from attnbook.cca.op import cca_attention
from attnbook.lab.testing import both_ways, tensors


def attended(B, H, HK, L, D, g, s, Dv=None, dtype=torch.bfloat16, **options):
    "The operation, forward and backward."
    shapes = (B, H, L, D), (B, HK, L, D), (B, HK, L, Dv or D)
    both_ways(
        partial(cca_attention, group_size=g, window_size=s, backend="triton", **options), *tensors(*shapes, dtype=dtype)
    )


def decoded(B, H, HK, D, g, s, dtype=torch.bfloat16, **options):
    "A prompt and a step with the cache."
    q, k, v, *one = tensors(*[(B, h, n, D) for n in (3 * g + s, 1) for h in (H, HK, HK)], dtype=dtype)
    cache = CCACache(B, HK, D, g, s, 4 * g + s, dtype, heads=H, backend="triton", **options)
    cache.prefill(q, k, v)
    cache.step(*one)


COMPILE = [
    ("cca", lambda: attended(1, 32, 32, 32768, 128, 16, 1024)),
    ("cca, shared heads, head_dim 64", lambda: attended(1, 32, 8, 8192, 64, 16, 512)),
    ("cca, ragged, bias", lambda: attended(2, 4, 2, 1001, 40, 7, 100, Dv=72, core_bias=1.0)),
    ("cca, head_dim 256", lambda: attended(1, 8, 8, 4096, 256, 64, 512)),
    ("cca, float32", lambda: attended(1, 4, 4, 2048, 64, 16, 256, dtype=torch.float32)),
    ("cca, cores by query", lambda: attended(1, 8, 2, 2048, 64, 16, 256, pool_heads="q")),
    ("cca, decoding", lambda: decoded(8, 32, 8, 128, 16, 1024)),
    ("cca, decoding, cores by query", lambda: decoded(2, 8, 2, 40, 5, 64, pool_heads="q")),
]  # fmt: skip

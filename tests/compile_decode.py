# Written from the compile cells of nbs/1_foundations/19_decode.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.decode.op import append_tokens, decode_attention
from attnbook.lab.testing import tensors


def _decode(B, H, Hkv, N, D, dtype=torch.bfloat16, page=0, Nq=1, **kw):
    "One call at a real size."
    shape = (B * N // page, Hkv, page, D) if page else (B, Hkv, N, D)
    q, k, v = tensors((B, H, Nq, D), shape, shape, dtype=dtype)
    table = torch.zeros(B, N // page, dtype=torch.int32) if page else None
    decode_attention(q, k, v, torch.zeros(B, dtype=torch.int32), block_table=table, **kw)


def _append(B, Hkv, N, D, page=0):
    shape = (B * N // page, Hkv, page, D) if page else (B, Hkv, N, D)
    k, v, new = tensors(shape, shape, (B, Hkv, 1, D))
    table = torch.zeros(B, N // page, dtype=torch.int32) if page else None
    append_tokens(k, v, new, new, torch.zeros(B, dtype=torch.int32), block_table=table)


COMPILE = [
    ("decode", lambda: _decode(32, 32, 8, 8192, 128)),
    ("decode, one split", lambda: _decode(512, 16, 16, 2048, 64)),
    ("decode, pages of 256", lambda: _decode(4, 32, 8, 8192, 128, page=256)),
    ("decode, pages of 16", lambda: _decode(4, 32, 8, 8192, 128, page=16)),
    ("decode, four queries", lambda: _decode(4, 32, 8, 4096, 64, Nq=4, starts=torch.zeros(4, dtype=torch.int32))),
    ("decode, head_dim 256", lambda: _decode(4, 16, 4, 4096, 256)),
    ("decode, float32, head_dim 100", lambda: _decode(4, 16, 4, 4096, 100, dtype=torch.float32)),
    ("append", lambda: _append(32, 8, 8192, 128)),
    ("append, paged", lambda: _append(4, 8, 8192, 128, page=16)),
]

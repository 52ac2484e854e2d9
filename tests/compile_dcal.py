# Written from the compile cells of nbs/5_vision/dcal.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.dcal.op import attention_rollout, pair_attention, pair_attention_kv
from attnbook.lab.testing import both_ways, tensors


def pair_case(n, d, B=4, h=3, dtype=torch.bfloat16, images=None):
    "Pair attention with contamination, and all gradients."
    q, k, v = tensors((B, h, n, d), *[(images or B, h, n, d)] * 2, dtype=dtype)
    pair = torch.arange(B - 1, -1, -1)
    both_ways(lambda q, k, v: pair_attention(q, k, v, pair, return_contamination=True), q, k, v)


def source_case(n, n2, d):
    "Two sources, of lengths of their own."
    q, k, v = tensors(*[(2, 3, n, d)] * 3)
    k2, v2 = tensors(*[(2, 3, n2, d)] * 2)
    both_ways(lambda *x: pair_attention_kv(*x, return_contamination=True), q, k, v, k2, v2)


def rollout_case(n, d, dtype=torch.bfloat16):
    "Two layers of rollout."
    q, k = tensors(*[(4, 3, n, d)] * 2, dtype=dtype)
    attention_rollout([q, q], [k, k])


COMPILE = [
    ("pairs, 785 tokens", lambda: pair_case(785, 64)),
    ("pairs, 785 tokens, 16 images, by boxes", lambda: pair_case(785, 64, B=16)),
    ("pairs, 512 tokens, whole tiles", lambda: pair_case(512, 64)),
    ("pairs, 257 tokens, head_dim 80, other images", lambda: pair_case(257, 80, images=8)),
    ("pairs, 197 tokens, float32", lambda: pair_case(197, 64, dtype=torch.float32)),
    ("pairs, one token, head_dim 256", lambda: pair_case(1, 256)),
    ("two sources", lambda: source_case(197, 50, 64)),
    ("rollout, 785 tokens", lambda: rollout_case(785, 64)),
    ("rollout, 197 tokens, head_dim 128, float32", lambda: rollout_case(197, 128, torch.float32)),
]

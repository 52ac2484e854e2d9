# Written from the compile cells of nbs/4_long_context/routing.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.lab.testing import both_ways, tensors
from attnbook.routing.membership_op import (
    cluster_sums,
    nearest_membership,
    route_scores,
    spherical_norm,
    topw_membership,
)
from attnbook.routing.op import plain_attention, routed_attention
from attnbook.routing.reference import sort_by_cluster


def routed(B, H, n, k, d, window=0, dtype=torch.bfloat16):
    "Norm, scores, selection and attention in lists; with window 0 the nearest centroid's segments and their sums."
    raw, v, mu = tensors((B, n, H, d), (B, H, n, d), (H, k, d), dtype=dtype)
    x = spherical_norm(raw.requires_grad_().transpose(1, 2))
    if window:
        route_scores(x, mu)
        m = topw_membership(torch.zeros(B, H, k, n), window)
    else:
        nearest_membership(x, mu)
        m = sort_by_cluster(torch.arange(n).expand(B, H, n) % k, k)
        cluster_sums(x.detach(), m)
    out = routed_attention(x, x, v.requires_grad_(), m, causal=True)
    torch.autograd.grad(out.float().sum(), [raw, v])


COMPILE = [
    ("routing top-w", lambda: routed(1, 2, 4096, 8, 64, 512)),
    ("routing top-w, head_dim 129", lambda: routed(1, 2, 2048, 8, 129, 256)),
    ("routing top-w, float32", lambda: routed(1, 2, 2048, 16, 64, 128, dtype=torch.float32)),
    ("routing nearest", lambda: routed(1, 2, 4096, 64, 64)),
    ("routing nearest, head_dim 128", lambda: routed(1, 2, 4096, 64, 128)),
    ("routing nearest, float32", lambda: routed(1, 2, 2048, 16, 64, dtype=torch.float32)),
    (
        "band with last resort",
        lambda: both_ways(plain_attention, *tensors(*[(1, 2, 4096, 64)] * 2), window=256, self_attention="fallback"),
    ),
]

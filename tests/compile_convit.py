# Written from the compile cells of nbs/2_position/convit.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.convit.op import gpsa, gpsa_packed
from attnbook.lab.testing import both_ways, tensors


def gpsa_of(B, H, grid, D, dtype=torch.bfloat16, **options):
    "The operation, forward and backward."
    both_ways(
        gpsa,
        *tensors(*[(B, H, grid[0] * grid[1], D)] * 3, (H, 3), (H,), dtype=dtype),
        grid_size=grid,
        backend="triton",
        **options,
    )


COMPILE = [
    ("gpsa, 14 x 14", lambda: gpsa_of(256, 6, (14, 14), 64)),
    ("gpsa, 14 x 14, head_dim 48", lambda: gpsa_of(64, 9, (14, 14), 48)),
    ("gpsa, 8 x 12, head_dim 16", lambda: gpsa_of(256, 9, (8, 12), 16)),
    ("gpsa, 16 x 16", lambda: gpsa_of(64, 4, (16, 16), 64)),
    ("gpsa, one row", lambda: gpsa_of(64, 4, (1, 250), 32)),
    ("gpsa, float32", lambda: gpsa_of(64, 4, (8, 8), 64, dtype=torch.float32)),
    ("gpsa, composed", lambda: gpsa_of(64, 6, (14, 14), 64, route="composed")),
    (
        "gpsa packed",
        lambda: both_ways(
            gpsa_packed, *tensors((64, 196, 3 * 384), (6, 3), (6,)), grid_size=(14, 14), backend="triton"
        ),
    ),
]

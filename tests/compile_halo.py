# Written from the compile cells of nbs/3_locality/halo.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.halo.layer_nets import HaloAttention
from attnbook.halo.op import halo_attention
from attnbook.lab.testing import both_ways, tensors


def haloed(B, H, side, D, b, h, Dv=None, stride=1, tables=True, dtype=torch.bfloat16, **options):
    "The operation, forward and backward."
    few, table = -(-side // stride), (2 * (b + h) - 1, D)
    shapes = (B, H, few, few, D), (B, H, side, side, D), (B, H, side, side, Dv or D), *[table] * (2 * tables)
    run = lambda q, k, v, y=None, x=None: halo_attention(
        q, k, v, b, h, rel_height=y, rel_width=x, query_stride=stride, backend="triton", **options
    )
    both_ways(run, *tensors(*shapes, dtype=dtype))


def packed_layer(B, H, side, D, dtype=torch.bfloat16, **options):
    "The packed operation, as networks use it."
    layer = HaloAttention(H * D, num_heads=H, backend="triton", **options).to(dtype)
    x = tensors((B, H * D, side, side), dtype=dtype)[0].contiguous(memory_format=torch.channels_last)
    both_ways(lambda x, *_: layer(x), x, *layer.parameters())


COMPILE = [
    ("halo", lambda: haloed(64, 8, 56, 32, 8, 3)),
    ("halo, zeros", lambda: haloed(64, 8, 56, 32, 8, 3, padding="zeros")),
    ("halo, stride 2", lambda: haloed(64, 8, 64, 16, 8, 3, stride=2)),
    ("halo, no tables", lambda: haloed(64, 8, 56, 32, 8, 3, tables=False)),
    ("halo, H4", lambda: haloed(16, 8, 96, 16, 12, 2)),
    ("halo, H5, wide values", lambda: haloed(4, 8, 28, 64, 14, 2, Dv=160)),
    ("halo, H7, ragged", lambda: haloed(4, 8, 38, 32, 10, 3, Dv=128)),
    ("halo, head_dim 64", lambda: haloed(16, 8, 64, 64, 8, 3)),
    ("halo, float32", lambda: haloed(2, 8, 56, 32, 8, 3, dtype=torch.float32)),
    ("halo, strided last stage", lambda: haloed(4, 8, 16, 64, 8, 3, stride=2, padding="zeros")),
    ("halo, head_dim 8, no tables", lambda: haloed(4, 8, 24, 8, 8, 3, tables=False)),
    ("halo, head_dim 12, no tables", lambda: haloed(4, 8, 24, 12, 8, 3, tables=False)),
    *(
        (
            f"halo packed, {side} x {side}, head_dim {D}, {padding}",
            lambda side=side, D=D, padding=padding: packed_layer(4, 8, side, D, padding=padding),
        )
        for side, D in ((64, 8), (32, 16), (16, 32), (8, 64))
        for padding in ("zeros", "mask")
    ),
    ("halo packed, float32", lambda: packed_layer(4, 8, 56, 32, dtype=torch.float32)),
    ("halo packed, H4", lambda: packed_layer(4, 8, 96, 16, block_size=12, halo_size=2)),
    ("halo packed, H6", lambda: packed_layer(4, 8, 64, 32, block_size=8, halo_size=4, value_ratio=3.0)),
]

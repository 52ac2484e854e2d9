# Written from the compile cells of nbs/5_vision/medusa.ipynb by `attnbook export`. Do not edit.
# fmt: off
from functools import partial

import torch

from attnbook.lab.testing import both_ways, tensors
from attnbook.medusa.kernels import gate_tile, plan_forward
from attnbook.medusa.op import medusa_gate


def gates(*size, map_size=(256, 256), hidden=8, last=False, dtype=torch.bfloat16, feature=True, **options):
    "The operation, forward and backward."
    B, C, H, W = size
    x, w, v, b, o, beta = tensors(size, (hidden, C), (hidden,), (hidden,), (hidden,), (1,), dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    if map_size is None:
        both_ways(lambda *a: medusa_gate(a[0], None, a[1], None, *a[2:], backend="triton"), x, w, b, o, beta)
    elif not feature:
        (g,) = tensors((B, 1, *map_size), dtype=dtype)
        both_ways(
            lambda x, g, v, beta: medusa_gate(x, g, None, v, None, None, beta, backend="triton"), x, g, v[:1], beta
        )
    else:
        (g,) = tensors((B, 1, *map_size), dtype=torch.float32)
        both_ways(partial(medusa_gate, backend="triton", **options), x, g, w, v, b, o, beta)


def with_wide_offsets(run):
    "Calls run with kernels for tensors of more than 2^31 numbers."
    names, make = plan_forward.__globals__, gate_tile

    def wide(*args):
        tile, *rest = make(*args)
        return tile._replace(wide=True), *rest

    names["gate_tile"] = wide
    try:
        run()
    finally:
        names["gate_tile"] = make


COMPILE = [
    ("medusa 256, wide offsets", lambda: with_wide_offsets(lambda: gates(8, 256, 61, 61))),
    ("medusa 2048, wide offsets", lambda: with_wide_offsets(lambda: gates(8, 2048, 17, 17, last=True))),
    ("medusa 64", lambda: gates(8, 64, 64, 64)),
    ("medusa 64, float32", lambda: gates(8, 64, 64, 64, dtype=torch.float32)),
    ("medusa 128, last", lambda: gates(8, 128, 64, 64, last=True)),
    ("medusa 256", lambda: gates(8, 256, 120, 120)),
    ("medusa 256, last", lambda: gates(8, 256, 120, 120, last=True)),
    ("medusa 256, float16", lambda: gates(8, 256, 56, 56, dtype=torch.float16)),
    ("medusa 512", lambda: gates(8, 512, 60, 60)),
    ("medusa 1024", lambda: gates(8, 1024, 30, 30)),
    ("medusa 1024, last", lambda: gates(8, 1024, 30, 30, last=True)),
    ("medusa 2048", lambda: gates(8, 2048, 15, 15)),
    ("medusa 2048, float32", lambda: gates(8, 2048, 15, 15, dtype=torch.float32)),
    ("medusa 72, map grows", lambda: gates(8, 72, 56, 56, map_size=(24, 24))),
    ("medusa 256, isolated", lambda: gates(8, 256, 56, 56, map_size=None)),
    ("medusa 256, map alone", lambda: gates(8, 256, 56, 56, feature=False)),
]

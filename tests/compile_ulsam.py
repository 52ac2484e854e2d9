# Written from the compile cells of nbs/5_vision/ulsam.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.lab.testing import both_ways, tensors
from attnbook.ulsam.op import subspace_attention


def subspaces(*size, g=4, last=False, dtype=torch.bfloat16, biases=False, **options):
    "The operation, forward and backward."
    B, C, H, W = size
    x, w, v, b, s = tensors(size, (C,), (C,), (C,), (g,), dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    run = lambda x, w, v, b=None, s=None: subspace_attention(
        x, w, v, g, dw_bias=b, pw_bias=s, backend="triton", relu=biases, **options
    )
    both_ways(run, x, w, v, *((b, s) if biases else ()))


COMPILE = [
    ("ulsam 14x14", lambda: subspaces(256, 512, 14, 14)),
    ("ulsam 14x14, last", lambda: subspaces(256, 512, 14, 14, last=True)),
    ("ulsam 14x14, float32", lambda: subspaces(32, 512, 14, 14, dtype=torch.float32)),
    ("ulsam 14x14, one image", lambda: subspaces(1, 512, 14, 14)),
    ("ulsam 14x14, code", lambda: subspaces(32, 512, 14, 14, biases=True)),
    ("ulsam 7x7", lambda: subspaces(256, 1024, 7, 7)),
    ("ulsam 7x7, last", lambda: subspaces(256, 160, 7, 7, g=8, last=True)),
    ("ulsam 28x28", lambda: subspaces(64, 256, 28, 28)),
    ("ulsam 28x28, last", lambda: subspaces(64, 256, 28, 28, last=True)),
    ("ulsam 56x56", lambda: subspaces(32, 128, 56, 56)),
    ("ulsam 56x56, last", lambda: subspaces(32, 128, 56, 56, last=True)),
    ("ulsam 5x5 window", lambda: subspaces(32, 512, 14, 14, pool_size=5)),
    ("ulsam 7x7 window, last", lambda: subspaces(32, 512, 14, 14, pool_size=7, last=True)),
    ("ulsam 5x5 window, 56x56", lambda: subspaces(8, 128, 56, 56, pool_size=5)),
]

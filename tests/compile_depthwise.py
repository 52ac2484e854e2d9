# Written from the compile cells of nbs/1_foundations/20_depthwise.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.depthwise.op import depthwise_conv_op
from attnbook.lab.testing import both_ways, tensors


def convolution_at(B, side, C, taps, dilation=1, residual=False, dtype=torch.bfloat16, weights=None):
    "A depthwise convolution, forward and backward."
    both_ways(
        lambda *a: depthwise_conv_op(*a, dilation, residual),
        *tensors((B, side, side, C), dtype=dtype),
        *tensors((C, 1, taps, taps), (C,), dtype=weights or dtype),
    )


COMPILE = [
    *(
        (f"depthwise 3 x 3, {side} x {side} x {C}", lambda side=side, C=C: convolution_at(128, side, C, 3))
        for side, C in ((56, 512), (14, 1280), (7, 2048))
    ),
    ("depthwise 3 x 3 and residual, 56 x 56 x 96", lambda: convolution_at(64, 56, 96, 3, 1, True)),
    ("depthwise 3 x 3 and residual, 14 x 14 x 384", lambda: convolution_at(64, 14, 384, 3, 1, True)),
    ("depthwise 3 x 3, float32", lambda: convolution_at(8, 28, 128, 3, dtype=torch.float32)),
    ("depthwise 5 x 5, weights in float32", lambda: convolution_at(8, 28, 128, 5, weights=torch.float32)),
    ("depthwise 1 x 1", lambda: convolution_at(8, 28, 64, 1)),
    ("depthwise 3 x 3, one pixel", lambda: convolution_at(8, 1, 64, 3)),
    ("depthwise 7 x 7 with dilation 3, one pixel", lambda: convolution_at(8, 1, 64, 7, 3)),
    ("depthwise 2 x 2 with dilation 2, two pixels", lambda: convolution_at(8, 2, 64, 2, 2)),
    ("depthwise 9 x 9", lambda: convolution_at(8, 28, 64, 9)),
    ("depthwise 11 x 11", lambda: convolution_at(8, 28, 64, 11)),
]

# Written from the compile cells of nbs/3_locality/davit.ipynb by `attnbook export`. Do not edit.
# fmt: off
import contextlib

import torch

from attnbook.davit.channel_kernels import CHANNEL_LAUNCH
from attnbook.davit.channel_op import _launch_channel_backward, _launch_channel_forward, channel_layer_op, packed_groups
from attnbook.davit.window_kernels import WINDOW
from attnbook.davit.window_op import window_attention_packed
from attnbook.depthwise import depthwise_conv_op
from attnbook.engine.run import run_forward
from attnbook.engine.run_backward import run_backward
from attnbook.lab.testing import both_ways, tensors


def channels(B, N, C, groups, dtype=torch.bfloat16, together=False):
    "Forward and backward on a packed projection, also with the column sums that the layer takes."
    qkv, out, dqkv = tensors((B, N, 3 * C), (B, N, C), (B, N, 3 * C), dtype=dtype)
    parts, (o,), grads = (packed_groups(t, groups, n) for t, n in ((qkv, 3), (out, 1), (dqkv, 3)))
    weights = _launch_channel_forward(*parts, o, 0.1)
    with contextlib.ExitStack() as stack:
        for key, launch in list(CHANNEL_LAUNCH.items()):
            stack.enter_context(CHANNEL_LAUNCH.trying(*key, launch._replace(together=together)))
        for column_sums in (False, True):
            _launch_channel_backward(o, None, *parts, weights, *grads, 0.1, column_sums)


def windows(shape, window, dtype=torch.bfloat16):
    "The tile program, by the engine's kernels."
    q, out = tensors(shape, shape, dtype=dtype)
    lse, rest = torch.empty(shape[:-1]), (WINDOW.name, shape[2:-1], (window, window), 0.1)
    run_forward(q, q, q, None, None, [], *rest)
    run_backward(out, lse, q, q, q, None, None, [], out, lse, *rest, False)


def packed_windows(B, X, Y, C, heads, window, **options):
    "The kernels for windows that fit."
    both_ways(
        window_attention_packed,
        *tensors((B, X, Y, 3 * C)),
        heads=heads,
        window_size=window,
        backend="triton",
        **options,
    )


def positions(shape, dtype=torch.bfloat16):
    "The position encoding."
    both_ways(lambda *a: depthwise_conv_op(*a, 1, True), *tensors(shape, (shape[3], 1, 3, 3), (shape[3],), dtype=dtype))


def channel_layer(B, N, C, groups):
    "The layer as one operation."
    run = lambda *args: channel_layer_op(*args, groups, 0.1)
    both_ways(run, *tensors((B, N, C), (3 * C, C), (3 * C,), (C, C), (C,)))


COMPILE = [
    ("channel attention", lambda: channels(64, 784, 384, 12)),
    ("channel attention, both sweeps in one launch", lambda: channels(64, 784, 384, 12, together=True)),
    ("channel attention, shares", lambda: channels(1, 65536, 96, 3)),
    ("channel attention, wide groups", lambda: channels(2, 784, 256, 2)),
    ("channel attention, float32", lambda: channels(2, 784, 384, 12, dtype=torch.float32)),
    ("channel attention, layer", lambda: channel_layer(8, 784, 384, 12)),
    ("position encoding", lambda: positions((8, 56, 56, 96))),
    ("position encoding, float32", lambda: positions((8, 56, 56, 96), torch.float32)),
    (
        "position encoding, small maps",
        lambda: [positions(s) for s in ((64, 14, 14, 384), (64, 7, 7, 768), (2, 9, 3, 24))],
    ),
    ("own window 7", lambda: packed_windows(8, 56, 56, 96, 3, 7)),
    ("own window 7, ragged", lambda: packed_windows(2, 64, 60, 192, 6, 7, pad_mode="mask")),
    ("own window 12, ragged", lambda: packed_windows(2, 100, 90, 192, 6, 12, pad_mode="mask")),
    ("own window 7, head_dim 64", lambda: packed_windows(2, 28, 28, 192, 3, 7)),
    ("window 7", lambda: windows((64, 3, 56, 56, 32), 7)),
    ("window 12, ragged", lambda: windows((2, 6, 100, 90, 32), 12)),
    ("window 16", lambda: windows((2, 8, 128, 128, 32), 16)),
    ("window 7, float32", lambda: windows((2, 3, 56, 56, 32), 7, dtype=torch.float32)),
]

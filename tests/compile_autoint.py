# Written from the compile cells of nbs/6_beyond_tokens/autoint.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.autoint.nets import network_op
from attnbook.autoint.op import interacting_layer
from attnbook.lab.testing import both_ways, tensors


def network(B, M, d=16, U=64, layers=3):
    "The inference kernel, launched on empty tensors."
    value, *rest = tensors((B, M, 1), (1000, d), (4, d, U), (layers - 1, 4, U, U), (1,), (1,), (M, U), (1,))
    network_op(torch.empty(value.shape, dtype=torch.int32), value, *rest, layers, 2, 1.0, False)


def layer_case(M, d_in, bias=(), dtype=torch.bfloat16):
    "A layer of 2 heads of 32, forward and backward."
    both_ways(interacting_layer, *tensors((1024, M, d_in), (4, d_in, 64), *bias, dtype=dtype), num_heads=2)


COMPILE = [
    ("interacting layer", lambda: layer_case(39, 64)),
    ("first interacting layer", lambda: layer_case(39, 16)),
    ("interacting layer, float32", lambda: layer_case(39, 64, dtype=torch.float32)),
    ("network of interacting layers", lambda: network(1024, 39)),
    ("interacting layer, official, float32", lambda: layer_case(23, 16, [(4, 64)], torch.float32)),
]

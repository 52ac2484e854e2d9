# Written from the compile cells of nbs/4_long_context/sinklora.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.lab.testing import both_ways, tensors
from attnbook.sinklora.h2o_op import H2OCache
from attnbook.sinklora.kernels import run_column_sums
from attnbook.sinklora.op import sf_attention
from attnbook.sinklora.step_kernels import run_step, step_room


def _step_case(B, H, Hk, slots, d, dtype=torch.bfloat16):
    cache = H2OCache(B, Hk, d, slots // 2, slots // 2, dtype=dtype)
    q, k, v = tensors((B, H, 1, d), (B, Hk, 1, d), (B, Hk, 1, d), dtype=dtype)
    room = step_room(B, H, Hk, cache.capacity + 1, cache.keys, d)
    state = (cache.keys, cache.values, cache.scores, cache.positions, cache.place, cache.fresh)
    return run_step(q, k, v, *state, room, cache.recent, 4, 0.1, True)


COMPILE = [
    (
        "sinklora, 32,768 tokens",
        lambda: both_ways(
            lambda *t: sf_attention(*t, 8192, backend="triton"),
            *tensors((1, 8, 32768, 128), (1, 2, 32768, 128), (1, 2, 32768, 128)),
        ),
    ),
    (
        "sinklora, width 64",
        lambda: both_ways(lambda *t: sf_attention(*t, 1024, backend="triton"), *tensors(*[(2, 4, 4096, 64)] * 3)),
    ),
    (
        "sinklora, float32, odd sizes",
        lambda: both_ways(
            lambda *t: sf_attention(*t, 100, shift_fraction=0.5, backend="triton"),
            *tensors(*[(1, 2, 500, 80)] * 3, dtype=torch.float32),
        ),
    ),
    (
        "sinklora, column sums",
        lambda: run_column_sums(*tensors((1, 8, 8192, 128), (1, 2, 8192, 128)), torch.empty(1, 8, 8192), True, 0.1),
    ),
    ("sinklora, step of the cache", lambda: _step_case(4, 32, 8, 2048, 128)),
    ("sinklora, step, float32", lambda: _step_case(1, 2, 2, 100, 80, torch.float32)),
]

# Written from the compile cells of nbs/2_position/music.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.lab.testing import both_ways, tensors
from attnbook.music.op import relative_attention


def relative(L, D, M, dtype=torch.bfloat16, **options):
    "Relative attention of 2 heads, forward and backward, on empty tensors."
    both_ways(relative_attention, *tensors(*[(1, 2, L, D)] * 3, (2, M, D), dtype=dtype), **options)


COMPILE = [
    ("relative attention", lambda: relative(4096, 64, 4096)),
    ("relative attention, short table, blocks", lambda: relative(2048, 64, 300, block_size=512, beyond="clip")),
    ("relative attention, head_dim 128", lambda: relative(2048, 128, 2048)),
    # one tile of queries: ptxas of Triton 3.6 crashed where the number of tiles was specialised to 1
    ("relative attention, one tile", lambda: relative(17, 16, 9)),
    ("relative attention, float32", lambda: relative(1024, 64, 1024, dtype=torch.float32)),
]

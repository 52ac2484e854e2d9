# Written from the compile cells of nbs/1_foundations/01_engine.ipynb by `attnbook export`. Do not edit.
# fmt: off
import torch

from attnbook.engine.program import PROGRAMS
from attnbook.engine.run import run_forward
from attnbook.engine.run_backward import run_backward
from attnbook.lab.testing import tensors

BIG = 4096


def attend(
    program, shape, ints, consts=(0, 0), operands=(), heads_kv=None, extra=False, dtype=torch.bfloat16, index=None
):
    "Launches a program's kernels, forward and backward, on empty tensors."
    B, H, *X, D = shape
    q, k = tensors(shape, (B, heads_kv or H, *X, D), dtype=dtype)
    xk = tensors((B, heads_kv or H, 5, D), dtype=dtype)[0] if extra else None
    slots = shape[:-1] if index is None else (B, H, index)
    out, lse = torch.empty(*slots, D, dtype=dtype), torch.empty(slots)
    run_forward(q, k, k, xk, xk, list(operands), program, ints, consts, D**-0.5)
    run_backward(
        out,
        lse,
        q,
        k,
        k,
        xk,
        xk,
        list(operands),
        out,
        lse,
        program,
        ints,
        consts,
        D**-0.5,
        PROGRAMS[program].operand_grad is not None,
    )


COMPILE = [
    (f"band, head_dim {d}", lambda d=d: attend("band", (2, 2, BIG, d), (BIG, BIG, 0, 0), (0, 1)))
    for d in (32, 64, 80, 128, 256)
] + [
    ("full", lambda: attend("full", (2, 4, BIG, 128), (BIG, BIG, 0, 0), heads_kv=2)),
    ("window, one token", lambda: attend("band", (1, 1, 1, 64), (1, 1, 8, 0), (1, 1))),
    ("band with extra keys", lambda: attend("band", (2, 2, BIG, 64), (BIG, BIG, 99, 0), (1, 1), extra=True)),
    ("band, float32", lambda: attend("band", (2, 2, BIG, 128), (BIG, BIG, 0, 0), (0, 1), dtype=torch.float32)),
    (
        "bias",
        lambda: attend(
            "full+bias", (2, 2, 512, 64), (512, 512, 0, 0, 0, 512 * 512, 512, 1), operands=tensors((1, 2, 512, 512))
        ),
    ),
    (
        "packed",
        lambda: attend("packed", (1, 2, BIG, 64), (8, BIG, BIG), (0, 1), [torch.empty(8, dtype=torch.int32)] * 2),
    ),
    (
        "listed",
        lambda: attend(
            "listed",
            (1, 2, BIG, 64),
            (4, 256, 256, 2),
            (1,),
            [torch.zeros(1, 2, 4, 256, dtype=torch.int64)] * 2,
            index=1024,
        ),
    ),
]

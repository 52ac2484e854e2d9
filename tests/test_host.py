"""What a call costs the host, without a GPU: calls of Python functions, which are the same on every machine, are counted.

The operations run in a process of their own, without Triton's interpreter, under a stand-in for the GPU driver that lets every launch
pass. What is counted are calls from the third one on: everything is decided by then. Milliseconds are for `attnbook bench`, on a GPU.

    python tests/test_host.py [na2d]        # prints the counts, and microseconds, which count for nothing on a busy machine
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
# operation -> most calls of Python functions: forward without gradients, forward with gradients, backward
MOST = {
    "attention": (24, 20, 47),
    "na2d": (25, 21, 48),
    "music": (29, 25, 56),
    "halo": (29, 25, 54),
    "halo module": (51, 49, 61),
    "gpsa": (35, 33, 54),
    "gpsa module": (59, 57, 62),
    "windows": (27, 23, 44),
    "channels": (25, 21, 47),
    "routed": (28, 26, 51),
    "autoint": (24, 20, 40),
}


def _stand_in(watch: bool = False):
    """Tensors of the CPU count as those of a GPU, and every launch passes. Returns the names of launches that Triton itself would make; to
    `watch`, also addresses of which descriptors are made and the arguments of kept launches."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

    described, sent = [], []  # addresses of which descriptors were made, arguments of the last launch
    nothing = "".format  # takes what it is given, and is no function of Python

    class Driver:
        get_current_target = lambda self: GPUTarget("cuda", 90, 32)
        get_current_device = lambda self: 0
        get_current_stream = lambda self, device=None: 0
        get_device_interface = lambda self: torch.cuda
        get_active_torch_device = lambda self: torch.device("cpu")
        utils = SimpleNamespace(fill_tma_descriptor=lambda *a: described.append(a[0]) or ("descriptor", *a))

    def compiled_for(arguments):
        "A compiled kernel as Triton 3.6 returns it: its launcher makes descriptors in Python, the one within does not."
        tensordesc_indices = {i for i, a in enumerate(arguments) if isinstance(a, TensorDescriptor)}
        box = lambda a: dict(fp4_padded=False, swizzle=0, elem_size=2, elem_type=10, block_size=a.block_shape)
        tensordesc_meta = [box(arguments[i]) for i in sorted(tensordesc_indices)]
        launcher = (lambda *a: sent.append(a)) if watch else nothing
        with_descriptors = lambda *a: launcher(a, tensordesc_indices, tensordesc_meta)
        run = SimpleNamespace(launch=with_descriptors if tensordesc_indices else launcher)
        run.global_scratch_size = run.profile_scratch_size = run.launch_cooperative_grid = run.launch_pdl = 0
        return SimpleNamespace(run=run, packed_metadata=(), function=1)

    launches = []

    def launch(self, *args, grid, warmup, **constants):
        launches.append(self.__name__)
        return compiled_for(args)

    triton.__version__ = "3.6.0"
    JITFunction.run = launch
    JITFunction.__getitem__ = lambda self, grid: lambda *a, **kw: launch(self, *a, grid=grid, warmup=False, **kw)
    triton.runtime.driver.set_active(Driver())
    return (launches, described, sent) if watch else launches


def _cases():
    "Operation -> (a call, the tensors that get gradients)."
    import torch

    from attnbook import autoint, convit, davit, engine, halo, music, neighborhood, routing

    make = lambda *size: torch.randn(size, dtype=torch.bfloat16, requires_grad=True)
    q, maps, rows, small = (
        [make(*size) for _ in range(3)] for size in ((1, 2, 64, 32), (1, 2, 14, 14, 32), (1, 2, 49, 16), (1, 2, 64, 16))
    )
    table, relative = make(2, 64, 32), [make(21, 32), make(21, 32)]
    of_halo, of_gpsa = (m.to(torch.bfloat16) for m in (halo.HaloAttention(16, num_heads=2), convit.GPSA(16, 4)))
    x, tokens, places, gate = make(1, 16, 8, 8), make(1, 49, 16), make(2, 3), make(2)
    lists = torch.arange(64, dtype=torch.int32).view(1, 1, 4, 16).expand(1, 2, -1, -1).contiguous()
    fields, weights = make(4, 10, 16), make(4, 16, 32)
    wants = lambda m: [p for p in m.parameters() if p.requires_grad]
    return {
        "attention": (lambda: engine.attention(*q, is_causal=True), q),
        "na2d": (lambda: neighborhood.na2d(*maps, 5), maps),
        "music": (lambda: music.relative_attention(*q, table), [*q, table]),
        "halo": (
            lambda: halo.halo_attention(*maps, 8, 3, rel_height=relative[0], rel_width=relative[1]),
            [*maps, *relative],
        ),
        "halo module": (lambda: of_halo(x), [x, *wants(of_halo)]),
        "gpsa": (lambda: convit.gpsa(*rows, places, gate, (7, 7)), [*rows, places, gate]),
        "gpsa module": (lambda: of_gpsa(tokens), [tokens, *wants(of_gpsa)]),
        "windows": (lambda: davit.window_attention(*maps, 7), maps),
        "channels": (lambda: davit.channel_group_attention(*rows), rows),
        "routed": (lambda: routing.routed_attention(*small, lists, causal=True), small),
        "autoint": (lambda: autoint.interacting_layer(fields, weights, num_heads=2), [fields, weights]),
    }


def _ways(call, tensors):
    "Forward without gradients, forward with gradients, backward: as calls."
    import torch

    out = call()
    grad = torch.ones_like(out)

    def without():
        with torch.no_grad():
            call()

    return without, call, lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True)


def _counted(call):
    "Calls of Python functions."
    found = [0]

    def see(frame, event, argument):
        found[0] += event == "call"

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found[0]


def count(only: str = "") -> dict:
    "Operation -> counts, launches by Triton itself from the third call on, and microseconds of the three ways. For a fresh process."
    launches = _stand_in()
    from attnbook.engine.host import pretend

    found = {}
    with pretend("sm90"):
        for name, (call, tensors) in _cases().items():
            if only not in name:
                continue
            ways = _ways(call, tensors)
            for way in (*ways, *ways):
                way()
            launches.clear()
            counts, microseconds = [_counted(way) for way in ways], []
            for way in ways if "--counts" not in sys.argv else ():
                laps = []
                for _ in range(20):
                    start = time.process_time()
                    for _ in range(50):
                        way()
                    laps.append((time.process_time() - start) / 50 * 1e6)
                microseconds.append(round(min(laps), 1))
            found[name] = dict(counts=counts, launches=sorted(set(launches)), microseconds=microseconds)
    return found


def in_fresh_process(*options: str) -> dict:
    env = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def counts():
    return in_fresh_process("--counts")


@pytest.mark.parametrize("name", MOST)
def test_calls_cost_the_host_little(name, counts):
    found = counts[name]
    assert not found["launches"], "launches that Triton prepares anew, at each call"
    for way, n, most in zip(("forward", "forward with gradients", "backward"), found["counts"], MOST[name]):
        assert n <= most, f"{name}, {way}: {n} calls of Python functions, more than {most}"


def launched() -> dict:
    """What kept launches pass on, for a fresh process: "described", where tensors were described by tensor descriptors; "right", whether those and
    the other tensors are those of the call; "again", descriptors made for memory that was described before."""
    launches, described, sent = _stand_in(watch=True)
    import torch

    from attnbook.engine import attention
    from attnbook.engine.host import pretend

    with pretend("sm90"), torch.no_grad():
        q, k, v, others = ([torch.randn(1, 2, 64, 32, dtype=torch.bfloat16) for _ in range(3)] for _ in range(4))
        attention(*q)
        launches.clear(), sent.clear(), described.clear()
        right = []
        for tensors in (q, k, v, others, q):
            attention(*tensors)
            arguments = sent[-1]
            boxes = [a[1] for a in arguments if isinstance(a, tuple) and a and a[0] == "descriptor"]
            right.append(boxes == [t.data_ptr() for t in tensors[1:]] and tensors[0].data_ptr() in arguments)
    return dict(right=right, described=len(described), again=len(described) - len(set(described)), launches=launches)


def test_kept_launches_get_the_tensors_of_their_call():
    found = in_fresh_process("--launched")
    assert all(found["right"]) and len(found["right"]) == 5 and not found["launches"]
    assert found["described"] == 8 and found["again"] == 0


def main():
    if "--launched" in sys.argv:
        print(json.dumps(launched()))
        return
    if "--counts" in sys.argv:
        print(json.dumps(count()))
        return
    for name, found in count(sys.argv[1] if len(sys.argv) > 1 else "").items():
        print(
            f"{name:12s} calls {found['counts']}  µs {found['microseconds']}  {' '.join(found['launches'])}", flush=True
        )


if __name__ == "__main__":
    main()

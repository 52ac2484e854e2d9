# Written from the test cells of nbs/3_locality/halo.ipynb by `attnbook export`. Do not edit.
import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnbook.attention import attention_reference
from attnbook.halo import (
    HALO_REL,
    PUBLISHED_MILLIONS,
    VARIANTS,
    HaloAttention,
    HaloNet,
    from_timm,
    halo_attention,
    halo_attention_reference,
    halo_boxes,
    halo_mask,
    halo_pairs,
    halonet,
    key_tile,
    real_key_fraction,
    tile_waste,
    unfolded_attention,
)
from attnbook.lab.testing import (
    TOLERANCE,
    check_against_reference,
    check_autocast,
    check_compiles,
    check_deterministic,
    check_gradients,
    check_opcheck,
    check_operation,
    check_raises,
    evaluate,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.lab.train import count_parameters, training_step
from attnbook.neighborhood import neighborhood_attention

BACKENDS = ("torch", "triton")
CASES = {  # name -> (map, block, halo, stride)
    "4x8": ((4, 8), 4, 1, 1), "ragged": ((5, 7), 4, 2, 1), "stride": ((9, 6), 4, 3, 2), "one pixel": ((1, 1), 3, 2, 1),
    "smaller than the block": ((3, 5), 8, 3, 4), "per pixel": ((3, 4), 1, 2, 1), "no halo": ((6, 5), 3, 0, 1),
}

def draw(shape, b, h, s=1, B=1, H=2, Hk=None, D=16, Dv=None, rel=True, dtype=torch.float32, seed=0):
    "Seeded inputs on the device under test, as keyword arguments."
    g = torch.Generator().manual_seed(seed)
    make = lambda *size: torch.randn(size, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    few = [-(-n // s) for n in shape]
    inputs = dict(q=make(B, H, *few, D), k=make(B, Hk or H, *shape, D), v=make(B, Hk or H, *shape, Dv or D))
    return inputs | (dict(rel_height=make(2 * (b + h) - 1, D), rel_width=make(2 * (b + h) - 1, D)) if rel else {})

def dense(q, k, v, b, h, s, scale=None):
    "Masked dense attention, without tables: the reference's own oracle."
    mask = halo_mask(k.shape[2:4], b, h, s).to(q.device)
    out, lse = attention_reference(*(t.flatten(2, 3) for t in (q, k, v)), mask=mask, scale=scale, return_lse=True)
    return out.unflatten(2, q.shape[2:4]), lse.unflatten(2, q.shape[2:4])


def test_boxes_by_hand():
    "Figure 1: a 4 x 4 map, blocks of 2, halo 1."
    mask = halo_mask((4, 4), 2, 1).view(4, 4, 4, 4)
    for (y, x), (rows, cols) in {(0, 0): ((0, 3), (0, 3)), (2, 2): ((1, 4), (1, 4)), (1, 3): ((0, 3), (1, 4))}.items():
        want = torch.zeros(4, 4, dtype=torch.bool)
        want[slice(*rows), slice(*cols)] = True
        assert torch.equal(mask[y, x], want), (y, x)
    assert halo_mask((7, 5), 8, 0).all() and torch.equal(halo_mask((6, 6), 2, 0), window_mask(6, 2))

def window_mask(n, w):
    same = torch.arange(n)[:, None] // w == torch.arange(n) // w
    return torch.kron(same.byte(), same.byte()).bool()

def test_counting():
    for shape, b, h, s in CASES.values():
        mask = halo_mask(shape, b, h, s)
        assert int(mask.sum()) == halo_pairs(shape, b, h, s)
        boxes = math.prod(-(-n // b) for n in shape) * (b + 2 * h) ** 2
        inside = halo_boxes(torch.ones(1, 1, *shape, 1), b, h).sum()
        assert abs(real_key_fraction(shape, b, h) - float(inside) / boxes) < 1e-6


def test_reference_is_masked_attention():
    for shape, b, h, s in CASES.values():
        i = draw(shape, b, h, s, Hk=1, Dv=24, rel=False, dtype=torch.float64)
        got = halo_attention_reference(**i, block_size=b, halo_size=h, query_stride=s, return_lse=True)
        for x, y in zip(got, dense(*i.values(), b, h, s)):
            assert rel_error(x, y) < 1e-12, (shape, b, h, s)

def test_tables_by_hand():
    "A logit is q.(k / 4 + r_y + r_x) with r of the true offset, whatever the stride."
    (Y, X), b, h, s = (6, 9), 4, 1, 2
    i = draw((Y, X), b, h, s, H=1, dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(Y), torch.arange(X), indexing="ij")
    y, x = y.flatten(), x.flatten()
    pick = (y % s == 0) & (x % s == 0)
    row = lambda n: (n - n[pick, None] + b + h - 1).clamp(0, 2 * (b + h) - 2)
    q, bias = i["q"].flatten(2, 3)[0, 0], 0
    for table, n in (("rel_height", y), ("rel_width", x)):
        bias = bias + torch.einsum("id,ijd->ij", q, i[table][row(n).to(q.device)])
    mask = halo_mask((Y, X), b, h, s).to(q.device)
    want = attention_reference(*(i[n].flatten(2, 3) for n in "qkv"), mask=mask, bias=bias)
    got = halo_attention_reference(**i, block_size=b, halo_size=h, query_stride=s)
    assert rel_error(got.flatten(2, 3), want) < 1e-12

def test_reference_gradients():
    i = draw((5, 4), 3, 1, dtype=torch.float64)
    for padding in ("mask", "zeros"):
        check_gradients(partial(halo_attention_reference, block_size=3, halo_size=1, padding=padding), i)


def test_agrees_with_reference():
    for name, (shape, b, h, s) in CASES.items():
        every = name in ("ragged", "stride")
        for padding, rel in product(("mask", "zeros"), (True, False)) if every else (("mask", True), ("zeros", True)):
            op = partial(halo_attention, block_size=b, halo_size=h, query_stride=s, padding=padding, return_lse=True)
            check_against_reference(partial(op, backend="triton"), partial(op, backend="torch"),
                                    draw(shape, b, h, s, Hk=1, Dv=24, rel=rel), grad_tol=3e-5)

def test_paper_sizes_that_do_not_divide():
    "H7's last map, 19 pixels wide, in blocks of 10; and H5's blocks of 14, with more than one tile of queries."
    for shape, b, h in (((19, 11), 10, 3), ((15, 3), 14, 2)):
        op = partial(halo_attention, block_size=b, halo_size=h, return_lse=True)
        check_against_reference(partial(op, backend="triton"), partial(op, backend="torch"), draw(shape, b, h, H=1),
                                grad_tol=3e-5)

def test_types():
    for dtype, scale_rel in product((torch.float16, torch.bfloat16), (False, True)):
        op = partial(halo_attention, block_size=4, halo_size=2, scale_rel=scale_rel, return_lse=True)
        for backend in BACKENDS:
            i = draw((6, 9), 4, 2, B=2, dtype=dtype) | dict(rel_width=None)
            check_against_reference(partial(op, backend=backend), partial(op, backend="torch"), i, dtype=dtype,
                                    grad_tol=3 * TOLERANCE[dtype])

def test_loud_tables():
    "Relative logits of ten thousand, which a float16 must not hold, choose the right key."
    i = draw((6, 6), 4, 2, H=1, dtype=torch.float16)
    i |= {n: 1000 * i[n] for n in ("rel_height", "rel_width")}
    for backend in BACKENDS:
        op = partial(halo_attention, block_size=4, halo_size=2, return_lse=True, backend=backend)
        check_against_reference(op, partial(op, backend="torch"), i, grad=False)


def test_good_citizen():
    i = draw((4, 7), 4, 1, 2, Hk=1, Dv=24)
    for backend in BACKENDS:
        op = partial(halo_attention, block_size=4, halo_size=1, query_stride=2, padding="zeros",
                     return_lse=True, backend=backend)
        check_operation(op, partial(op, backend="torch"), i, grad_tol=3e-5)

def test_registered_operation():
    i = draw((4, 4), 2, 1)
    tables = torch.cat([i["rel_height"], i["rel_width"]]).requires_grad_()
    tensors = [i[n].requires_grad_() for n in "qkv"]
    half = int(np.float32(4.0).view(np.int32))
    check_opcheck(torch.ops.attnbook.tile_attention, (*tensors, None, None, [tables], HALO_REL.name, [4, 4, 4, 4, half],
                                                      [2, 1, 1, 0, 1], 0.25))

def test_table_gradients_are_deterministic():
    i = draw((4, 6), 4, 2)
    check_deterministic(partial(halo_attention, block_size=4, halo_size=2, backend="triton"), i)


def test_limits():
    "A block as large as the map is full attention; no halo is attention within blocks; blocks of 1 are pixel windows."
    for backend in BACKENDS:
        run = partial(halo_attention, backend=backend)
        i = draw((6, 6), 6, 2, rel=False)
        full = attention_reference(*(t.flatten(2, 3) for t in i.values())).unflatten(2, (6, 6))
        for h in (0, 2):
            assert rel_error(run(**i, block_size=6, halo_size=h), full) < 1e-5
        cut = lambda t: t.unflatten(3, (2, 3)).unflatten(2, (2, 3)).permute(0, 2, 4, 1, 3, 5, 6).reshape(4, 2, 9, 16)
        blocks = attention_reference(*(cut(t) for t in i.values()))
        assert rel_error(cut(run(**i, block_size=3, halo_size=0)), blocks) < 1e-5
        near = (torch.arange(6)[:, None] - torch.arange(6)).abs() <= 2
        near = torch.kron(near.byte(), near.byte()).bool().to(full.device)
        want = attention_reference(*(t.flatten(2, 3) for t in i.values()), mask=near).unflatten(2, (6, 6))
        assert rel_error(run(**i, block_size=1, halo_size=2), want) < 1e-5

def test_means():
    "q = 0: a mean over the real keys of the box (mask), or their sum over all of its w x w lanes (zeros)."
    shape, b, h = (7, 9), 4, 2
    i = draw(shape, b, h)
    i["q"] = torch.zeros_like(i["q"])
    seen = halo_mask(shape, b, h).to(i["v"])
    total = torch.einsum("ij,bhjd->bhid", seen, i["v"].flatten(2, 3))
    for padding, count in (("mask", seen.sum(1, keepdim=True)), ("zeros", (b + 2 * h) ** 2)):
        for backend in BACKENDS:
            out = halo_attention(**i, block_size=b, halo_size=h, padding=padding, backend=backend)
            assert rel_error(out.flatten(2, 3), total / count) < 1e-5, (padding, backend)

def test_interior_is_strided_neighborhood_attention():
    b, h, n = 4, 1, 16
    i = draw((n, n), b, h, rel=False, H=1)
    ours = halo_attention(**i, block_size=b, halo_size=h)
    theirs = neighborhood_attention(*i.values(), b + 2 * h, stride=b)
    inner = slice(b, n - b)
    assert rel_error(ours[:, :, inner, inner], theirs[:, :, inner, inner]) < 1e-5
    assert rel_error(ours[:, :, :b], theirs[:, :, :b]) > 1e-2, "at the border they must differ"


def test_strided_queries_see_pixel_offsets():
    "Stride 2 is every second pixel of stride 1. Offsets counted in queries, as timm counts them, would differ."
    i = draw((10, 7), 4, 1)
    for backend in BACKENDS:
        every = halo_attention(**i, block_size=4, halo_size=1, backend=backend)
        few = halo_attention(**(i | dict(q=i["q"][:, :, ::2, ::2])), block_size=4, halo_size=1, query_stride=2,
                             backend=backend)
        assert rel_error(few, every[:, :, ::2, ::2]) < 1e-5

def test_a_table_row_is_an_offset():
    "A loud row for offset (1, -2): every query that can looks there and nowhere else."
    b, h, n = 4, 2, 12
    i = draw((n, n), b, h, H=1)
    i["q"] = torch.ones_like(i["q"])
    for name, offset in (("rel_height", 1), ("rel_width", -2)):
        i[name] = torch.zeros_like(i[name])
        i[name][offset + b + h - 1] = 10.0
    for backend in BACKENDS:
        out = halo_attention(**i, block_size=b, halo_size=h, scale=0.0, backend=backend)
        assert rel_error(out[:, :, :n - 1, 2:], i["v"][:, :, 1:, :n - 2]) < 1e-5

def test_every_table_row_is_used():
    "On two blocks or more each row gets a gradient (a table of 2w - 1 rows has 2h that never do)."
    i = draw((8, 8), 4, 3)
    for backend in BACKENDS:
        _, grads = evaluate(partial(halo_attention, block_size=4, halo_size=3, backend=backend), i)
        for name in ("rel_height", "rel_width"):
            assert (grads[name].abs().sum(1) > 0).all(), (name, backend)


def test_shifts():
    "A shift by a block moves the interior along; a shift by one pixel changes it."
    b, h, n = 4, 2, 20
    i = draw((n, n), b, h, H=1, dtype=torch.float64)
    run = lambda by: halo_attention(**{k: t.roll((by, by), (2, 3)) if t.dim() == 5 else t for k, t in i.items()},
                                    block_size=b, halo_size=h).roll((-by, -by), (2, 3))
    inner = (slice(None), slice(None), slice(b, n - 2 * b), slice(b, n - 2 * b))
    assert rel_error(run(b)[inner], run(0)[inner]) < 1e-12 and rel_error(run(1)[inner], run(0)[inner]) > 1e-2

def test_pixels_outside_the_box_do_not_matter():
    i = draw((12, 12), 4, 1)
    changed = i | {n: i[n].clone() for n in "kv"}
    for n in "kv":
        changed[n][:, :, 5, 5] = 1e3
    far = ~halo_mask((12, 12), 4, 1)[:, 5 * 12 + 5].view(12, 12)
    for backend in BACKENDS:
        a, b = (halo_attention(**x, block_size=4, halo_size=1, backend=backend) for x in (i, changed))
        assert torch.equal(a[:, :, far], b[:, :, far]) and not torch.equal(a, b)

def test_key_tiles():
    "Shifted by half a block, a tile of keys meets four blocks; aligned it would meet nine."
    assert key_tile(8, 3, 64)[0] == 8
    for b, h, rows in product((1, 3, 8, 10, 14), (0, 2, 4), (16, 64)):
        side, shift = key_tile(b, h, rows)
        assert side**2 <= rows and 0 <= shift < side
        aligned = min(b, math.isqrt(rows))
        assert tile_waste(b, h, side, shift) * aligned**2 <= tile_waste(b, h, aligned, 0) * side**2 + 1e-9
    for tile, met in ((key_tile(8, 3, 64), 4), ((8, 4), 4), ((8, 0), 9)):
        assert math.isclose(tile_waste(8, 3, *tile), met * 64 / 196)


def test_bad_input():
    i = draw((6, 8), 4, 1)
    q, k, v, r = i["q"], i["k"], i["v"], i["rel_height"]
    bad = [(dict(block_size=0), ValueError, "block_size"), (dict(block_size=2.0), TypeError, "block_size"),
           (dict(halo_size=-1), ValueError, "halo_size"), (dict(halo_size=True), TypeError, "halo_size"),
           (dict(query_stride=3), ValueError, ("query_stride", "4")),
           (dict(padding="reflect"), ValueError, ("mask", "zeros")),
           (dict(rel_height=r[1:]), ValueError, ("rel_height", "9")),
           (dict(rel_width=r[:, :8]), ValueError, "rel_width"),
           (dict(rel_width=r.long()), TypeError, "rel_width"), (dict(q=q[:, :, :5]), ValueError, "q must"),
           (dict(q=q[0]), ValueError, "q must"), (dict(q=q.int()), TypeError, "q must"),
           (dict(q=1), TypeError, "q must"),
           (dict(k=k.half()), TypeError, "k must"), (dict(k=k[..., :8]), ValueError, "k must"),
           (dict(v=v[:, :, :5]), ValueError, "v must"), (dict(v=v[:, :1]), ValueError, "v must"),
           (dict(k=torch.cat([k, k[:, :1]], 1), v=torch.cat([v, v[:, :1]], 1)), ValueError, "heads"),
           (dict(scale="1"), TypeError, "scale"), (dict(scale=math.inf), ValueError, "scale"),
           (dict(scale_rel=1), TypeError, "scale_rel"), (dict(backend="cuda"), ValueError, "backend")]
    check_raises(halo_attention, bad, **i, block_size=4, halo_size=1)


def test_parameter_counts():
    "All eight networks, to the parameter; and to the paper's decimal."
    for name, (*_, want) in VARIANTS.items():
        with torch.device("meta"): found = count_parameters(halonet(name))
        assert found == want and round(found / 1e6, 1) == PUBLISHED_MILLIONS[name], (name, found)

def test_where_the_values_are_wide():
    layer = HaloAttention(64, value_ratio=2.5, num_heads=4, block_size=4, halo_size=1)
    assert layer.qkv.weight.shape == (64 + 64 + 160, 64) and layer.rel_height.shape == (9, 16)


def test_module():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 6, 9, device=device_under_test())
    for stride, backend, layout in ((1, "torch", torch.channels_last), (1, "triton", torch.contiguous_format),
                                    (2, "torch", torch.contiguous_format), (2, "triton", torch.channels_last)):
        layer = HaloAttention(32, num_heads=2, value_ratio=2.0, block_size=4, halo_size=2, stride=stride, qkv_bias=True,
                              backend=backend).to(device_under_test())
        images = x.clone(memory_format=layout).requires_grad_()
        y = layer(images)
        y.square().mean().backward()
        assert y.shape == (2, 64, -(-6 // stride), -(-9 // stride))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in layer.parameters())
        assert images.grad.isfinite().all() and "block_size=4" in repr(layer)

def test_packed_is_the_operation():
    "The packed path against the public one, for both layouts of the input; compiled; under autocast; opcheck."
    torch.manual_seed(0)
    layer = HaloAttention(32, num_heads=2, value_ratio=2.0, block_size=4, halo_size=2, scale_rel=True,
                          backend="triton").to(device_under_test())
    names = [n for n, _ in layer.named_parameters()]

    def packed(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), x)

    def plain(x, *values):
        given = dict(zip(names, values))
        qkv = F.linear(x.movedim(1, -1), given.pop("qkv.weight")).split(layer.widths, -1)
        q, k, v = (t.unflatten(-1, (2, -1)).movedim(-2, 1) for t in qkv)
        out = halo_attention(q, k, v, 4, 2, **given, scale_rel=True, backend="torch")
        return out.movedim(1, -2).flatten(-2).movedim(-1, 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 32, 6, 5, device=device_under_test()).contiguous(memory_format=layout)
        inputs = [x, *(p.detach() for p in layer.parameters())]
        check_against_reference(packed, plain, inputs, grad_tol=3e-5)
    check_compiles(packed, inputs)
    check_autocast(packed, inputs)
    qkv, tables = torch.randn(1, 4, 4, 96, device=x.device), torch.randn(2 * 11, 16, device=x.device)
    unit = int(np.float32(4.0).view(np.int32))
    check_opcheck(torch.ops.attnbook.halo_packed, (qkv.requires_grad_(), tables.requires_grad_(), 2, [32, 32, 32],
                                                   [4, 4, 4, 4, unit], [4, 2, 1, 0, 1], 0.25))

def test_packed_backward_in_pieces():
    "A few images at a time give the same bits for q, k and v, and the tables' gradients up to the order of a sum."
    torch.manual_seed(0)
    layer = HaloAttention(32, num_heads=2, block_size=4, halo_size=1, backend="triton").to(device_under_test())
    x, found, where = torch.randn(5, 32, 4, 6, device=device_under_test()), [], HaloAttention.forward.__globals__
    old = where["PARTS_BYTES"]
    try:
        for where["PARTS_BYTES"] in (old, 2 * (4 * 18 * 16) * 2 * 2, 1):                  # all images, two, one at a time
            leaf = x.clone().requires_grad_()
            found.append(torch.autograd.grad(layer(leaf).square().sum(), [leaf, *layer.parameters()]))
    finally:
        where["PARTS_BYTES"] = old
    names = ["x", *(n for n, _ in layer.named_parameters())]
    for other in found[1:]:
        for name, a, b in zip(names, found[0], other):
            assert rel_error(a, b) < 1e-6 if name.startswith("rel") else torch.equal(a, b), name


def test_layers_of_a_network():
    """The layers of H1 with 8 heads: narrow heads in the first stages, a single block in the last.

    A kernel that reads where it must not fails on a GPU; the interpreter takes smaller maps.
    """
    torch.manual_seed(0)
    gpu = torch.device(device_under_test()).type == "cuda"
    for (side, D), padding in product(((64, 8), (32, 16), (16, 32), (8, 64)) if gpu else ((9, 8), (8, 16)), ("zeros", "mask")):
        heads, dtype = (8, torch.bfloat16) if gpu else (1, torch.float32)
        make = lambda backend: HaloAttention(heads * D, num_heads=heads, padding=padding, backend=backend)
        ours, plain = (make(backend).to(device_under_test(), t) for backend, t in (("triton", dtype), ("torch", torch.float32)))
        plain.load_state_dict(ours.state_dict())
        x = torch.randn(4 if gpu else 1, heads * D, side, side, device=device_under_test()).to(dtype)
        inputs = [x.contiguous(memory_format=torch.channels_last).to(t).requires_grad_() for t in (dtype, torch.float32)]
        outs = [layer(i) for layer, i in zip((ours, plain), inputs)]
        weight = torch.randn_like(outs[1])
        grads = [torch.autograd.grad((o.float() * weight).sum(), [i, *layer.parameters()])
                 for o, i, layer in zip(outs, inputs, (ours, plain))]
        most = 3e-2 if gpu else 1e-4
        for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1])):
            assert rel_error(a.float(), b) < most, (side, D, padding)

def test_strided_module_compiles():
    torch.manual_seed(0)
    layer = HaloAttention(32, num_heads=2, block_size=4, halo_size=1, stride=2, backend="triton")
    layer.to(device_under_test())
    names = [n for n, _ in layer.named_parameters()]
    check_compiles(lambda x, *ps: torch.func.functional_call(layer, dict(zip(names, ps)), x),
                   [torch.randn(1, 32, 4, 6, device=device_under_test()), *(p.detach() for p in layer.parameters())])

def test_strided_module_is_the_module_at_every_second_pixel():
    torch.manual_seed(0)
    every, few = (HaloAttention(32, num_heads=2, block_size=4, halo_size=2, stride=s, qkv_bias=True) for s in (1, 2))
    few.load_state_dict(every.state_dict())
    x = torch.randn(2, 32, 8, 11)
    assert rel_error(few(x), every(x)[:, :, ::2, ::2]) < 1e-5


def test_networks():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32, device=device_under_test())
    for changes in (dict(), dict(kinds=("conv", "halo")), dict(downsample="pool"), dict(downsample="conv"),
                    dict(final_dim=24, value_ratio=2.0, expansion=1.5, padding="zeros")):
        net = HaloNet(4, 1, widths=(16, 32), depths=(1, 2), num_heads=(2, 2), stem_stride=2, num_classes=5,
                      **changes).to(device_under_test())
        out = net(x)
        out.square().mean().backward()
        assert out.shape == (2, 5) and all(p.grad is not None for p in net.parameters()), changes
    bad = [(dict(depths=(1, 2, 3)), ValueError, "depths"), (dict(kinds=("halo",)), ValueError, "kinds"),
           (dict(stem_stride=3), ValueError, "stem_stride"), (dict(downsample="max"), ValueError, "downsample"),
           (dict(kinds=("halo", "mlp")), ValueError, "kind")]
    check_raises(HaloNet, bad, widths=(16, 32), depths=(1, 1), num_heads=(2, 2))


def test_modules_refuse():
    layers = [(dict(num_heads=3), ValueError, "num_heads"), (dict(dim_out=30), ValueError, "num_heads"),
              (dict(dim_out=64, value_ratio=2.0), ValueError, "value_ratio"),
              (dict(stride=3), ValueError, "query_stride"),
              (dict(padding=None), ValueError, "padding")]
    check_raises(HaloAttention, layers, dim=32, num_heads=4)
    with pytest.raises(ValueError, match="variant"): halonet("h8")
    with pytest.raises(ValueError, match="x must have shape"): HaloAttention(32)(torch.zeros(1, 16, 8, 8))


def test_timm():
    "timm's weights give timm's outputs; what cannot be carried over is refused."
    layers = pytest.importorskip("timm.layers.halo_attn", reason="timm is not installed", exc_type=ImportError)
    torch.manual_seed(0)
    x = torch.randn(2, 64, 12, 8, dtype=torch.float64)
    for options in (dict(), dict(qkv_bias=True), dict(scale_pos_embed=True), dict(dim_out=96, dim_head=8)):
        theirs = layers.HaloAttn(64, num_heads=4, block_size=4, halo_size=2, **options).double()
        assert rel_error(from_timm(theirs)(x), theirs(x)) < 1e-12, options
    plain = layers.HaloAttn(64, num_heads=4, block_size=4, halo_size=2)
    assert rel_error(from_timm(plain.state_dict(), 4, 2)(x.float()), plain(x.float())) < 1e-5
    with pytest.raises(ValueError, match="rows"): from_timm(plain.state_dict())
    with pytest.raises(ValueError, match="stride 1"): from_timm(layers.HaloAttn(64, stride=2))
    _, grads = evaluate(lambda x, r: torch.func.functional_call(plain, {"pos_embed.height_rel": r}, x),
                        [x.float(), plain.pos_embed.height_rel])
    assert (grads["argument 1"].abs().sum(1) == 0).tolist() == [i < 4 for i in range(15)], "2h rows are never read"


def test_peer_is_the_same_function():
    "The peer that unfolds is halo attention with zeros, so that times are compared between equals."
    i = draw((12, 8), 4, 2, B=2, dtype=torch.float64)
    want = halo_attention(**i, block_size=4, halo_size=2, padding="zeros")
    assert rel_error(unfolded_attention(**i, block_size=4, halo_size=2), want) < 1e-12

def test_training_step_learns():
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 16, 16, device=device_under_test()), torch.arange(8, device=device_under_test()) % 3
    net = HaloNet(4, 1, widths=(16, 32), depths=(1, 1), num_heads=(1, 2), stem_stride=2, num_classes=3).to(x.device)
    step, before = training_step(net, x, y), F.cross_entropy(net(x), y)
    for _ in range(5): step()
    assert F.cross_entropy(net(x), y) < before

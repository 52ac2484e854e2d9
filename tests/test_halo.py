# Written from the test cells of nbs/3_locality/halo.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from attnbook.attention import attention_reference
from attnbook.halo.experiments_study import counted_flops, outside_mass
from attnbook.halo.kernels import HALO_REL, key_tile, tile_waste
from attnbook.halo.nets import (
    PUBLISHED_MILLIONS,
    VARIANTS,
    HaloAttention,
    HaloBottleneck,
    HaloNet,
    from_timm,
    halonet,
    halonet_h0,
    halonet_h1,
    halonet_h2,
    halonet_h3,
    halonet_h4,
    halonet_h5,
    halonet_h6,
    halonet_h7,
)
from attnbook.halo.op import PARTS_BYTES, _float_bits, _images_at_once, halo_attention
from attnbook.halo.reference import halo_attention_reference, halo_boxes, halo_mask, halo_pairs, real_key_fraction
from attnbook.halo.study import (
    _against_timm,
    _blocking_gain,
    _border_law,
    _nets,
    _rows,
    _stage_times,
    _training_gain,
    claims,
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
from attnbook.lab.train import training_step
from attnbook.layers import count_parameters
from attnbook.neighborhood import neighborhood_attention

BACKENDS = ("torch", "triton")
CASES = {  # name -> (map, block, halo, stride)
    "4x8": ((4, 8), 4, 1, 1),
    "ragged": ((5, 7), 4, 2, 1),
    "stride": ((5, 6), 4, 3, 2),
    "one pixel": ((1, 1), 3, 2, 1),
    "smaller than the block": ((3, 5), 8, 3, 4),
    "per pixel": ((2, 3), 1, 2, 1),
    "no halo": ((6, 5), 3, 0, 1),
}


def draw(shape, b, h, s=1, B=1, H=2, Hk=None, D=16, Dv=None, rel=True, dtype=torch.float32, seed=0):
    "Seeded inputs on the device under test, as keyword arguments."
    g = torch.Generator().manual_seed(seed)
    make = lambda *size: torch.randn(size, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    few = [-(-n // s) for n in shape]
    inputs = dict(q=make(B, H, *few, D), k=make(B, Hk or H, *shape, D), v=make(B, Hk or H, *shape, Dv or D))
    return inputs | (dict(rel_height=make(2 * (b + h) - 1, D), rel_width=make(2 * (b + h) - 1, D)) if rel else {})


def test_boxes_by_hand():
    mask = halo_mask((4, 4), 2, 1).view(4, 4, 4, 4)
    for (y, x), (rows, cols) in {(0, 0): ((0, 3), (0, 3)), (2, 2): ((1, 4), (1, 4)), (1, 3): ((0, 3), (1, 4))}.items():
        want = torch.zeros(4, 4, dtype=torch.bool)
        want[slice(*rows), slice(*cols)] = True
        assert torch.equal(mask[y, x], want), (y, x)


def test_without_a_halo_blocks_are_apart():
    same = torch.arange(6)[:, None] // 2 == torch.arange(6) // 2
    assert torch.equal(halo_mask((6, 6), 2, 0), torch.kron(same.byte(), same.byte()).bool())
    assert halo_mask((7, 5), 8, 0).all(), "one block sees all"


@pytest.mark.parametrize("case", CASES)
def test_counting(case):
    shape, b, h, s = CASES[case]
    assert int(halo_mask(shape, b, h, s).sum()) == halo_pairs(shape, b, h, s)
    boxes = math.prod(-(-n // b) for n in shape) * (b + 2 * h) ** 2
    inside = halo_boxes(torch.ones(1, 1, *shape, 1), b, h).sum()
    assert abs(real_key_fraction(shape, b, h) - float(inside) / boxes) < 1e-6


def dense(q, k, v, b, h, s, bias=None):
    "Masked dense attention, without tables: the reference's own oracle."
    mask = halo_mask(k.shape[2:4], b, h, s).to(q.device)
    out, lse = attention_reference(*(t.flatten(2, 3) for t in (q, k, v)), mask=mask, bias=bias, return_lse=True)
    return out.unflatten(2, q.shape[2:4]), lse.unflatten(2, q.shape[2:4])


@pytest.mark.parametrize("case", CASES)
def test_reference_is_masked_attention(case):
    shape, b, h, s = CASES[case]
    i = draw(shape, b, h, s, Hk=1, Dv=24, rel=False, dtype=torch.float64)
    got = halo_attention_reference(**i, block_size=b, halo_size=h, query_stride=s, return_lse=True)
    for x, y in zip(got, dense(*i.values(), b, h, s)):
        assert rel_error(x, y) < 1e-12


@pytest.mark.parametrize("scale_rel", [False, True], ids=["r as it is", "r scaled"])
@pytest.mark.parametrize("stride", [1, 2])
def test_tables_by_hand(stride, scale_rel):
    "A logit is q.(k / 4 + r_y + r_x) with r of the true offset, whatever the stride."
    (Y, X), b, h, s = (6, 9), 4, 1, stride
    i = draw((Y, X), b, h, s, H=1, dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(Y), torch.arange(X), indexing="ij")
    y, x = y.flatten(), x.flatten()
    pick = (y % s == 0) & (x % s == 0)
    row = lambda n: (n - n[pick, None] + b + h - 1).clamp(0, 2 * (b + h) - 2)
    q, bias = i["q"].flatten(2, 3)[0, 0], 0
    for table, n in (("rel_height", y), ("rel_width", x)):
        bias = bias + torch.einsum("id,ijd->ij", q, i[table][row(n).to(q.device)]) * (0.25 if scale_rel else 1)
    want, _ = dense(i["q"], i["k"], i["v"], b, h, s, bias)
    got = halo_attention_reference(**i, block_size=b, halo_size=h, query_stride=s, scale_rel=scale_rel)
    assert rel_error(got, want) < 1e-12


@pytest.mark.parametrize("padding", ["mask", "zeros"])
def test_reference_gradients(padding):
    i = draw((5, 4), 3, 1, dtype=torch.float64)
    check_gradients(partial(halo_attention_reference, block_size=3, halo_size=1, padding=padding), i)


def test_key_tiles():
    "Shifted by half a block, a tile of 8 x 8 keys meets four blocks; aligned it would meet nine."
    assert key_tile(8, 3, 64)[0] == 8
    for tile, met in ((key_tile(8, 3, 64), 4), ((8, 4), 4), ((8, 0), 9)):
        assert math.isclose(tile_waste(8, 3, *tile), met * 64 / 196)


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("halo", [0, 2, 4])
@pytest.mark.parametrize("block", [1, 3, 8, 10, 14])
def test_key_tiles_are_no_worse_than_aligned_ones(block, halo, rows):
    side, shift = key_tile(block, halo, rows)
    assert side**2 <= rows and 0 <= shift < side
    aligned = min(block, math.isqrt(rows))
    waste = tile_waste(block, halo, side, shift), tile_waste(block, halo, aligned, 0)
    assert waste[0] * aligned**2 <= waste[1] * side**2 + 1e-9


@pytest.mark.parametrize("x", [1.0, 4.0, 1 / 3, 0.1, 64.0, 2.0 - 2**-30, 2.0**-126, 2.0**-127, 1e-40, 1e-60, 3e38])
def test_float_bits(x):
    assert _float_bits(x) == int(np.float32(x).view(np.int32))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_huge_equal_logits(backend):
    "The mean of ones is 1, whatever the logits."
    q = torch.full((1, 1, 4, 4, 16), 1e4, device=device_under_test())
    out = halo_attention(q, q, torch.ones_like(q), 2, 1, scale=1.0, backend=backend)
    assert (out - 1).abs().max() < 1e-3


def test_meta():
    q = torch.empty(1, 2, 4, 6, 8, device="meta")
    assert halo_attention(q, q, q, 2, 1).shape == q.shape


def compare_backends(i, block, halo, grad_tol=3e-5, dtype=torch.float32, grad=True, **options):
    "The kernel against the reference on inputs i, the LSE and all gradients included."
    op = partial(halo_attention, block_size=block, halo_size=halo, return_lse=True, **options)
    check_against_reference(
        partial(op, backend="triton"), partial(op, backend="torch"), i, grad_tol=grad_tol, dtype=dtype, grad=grad
    )


@pytest.mark.parametrize("padding", ["mask", "zeros"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_reference(case, padding):
    shape, b, h, s = CASES[case]
    compare_backends(draw(shape, b, h, s, H=1), b, h, query_stride=s, padding=padding)


@pytest.mark.parametrize("padding", ["mask", "zeros"])
@pytest.mark.parametrize("case", ["ragged", "stride"])
def test_agrees_without_tables(case, padding):
    shape, b, h, s = CASES[case]
    compare_backends(draw(shape, b, h, s, H=1, rel=False), b, h, query_stride=s, padding=padding)


def test_agrees_with_shared_heads_and_wide_values():
    compare_backends(draw((2, 3), 4, 1, H=4, Hk=2, Dv=24), 4, 1)


@pytest.mark.parametrize("shape, block, halo", [((19, 3), 10, 3), ((13, 1), 14, 2)], ids=["H7", "H5"])
def test_paper_sizes_that_do_not_divide(shape, block, halo):
    "A strip of H7's last map, 19 pixels wide, in blocks of 10; H5's blocks of 14, with more than one tile of queries."
    compare_backends(draw(shape, block, halo, H=1), block, halo)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale_rel", [False, True], ids=["r as it is", "r scaled"])
def test_types(dtype, scale_rel, backend):
    op = partial(halo_attention, block_size=4, halo_size=1, scale_rel=scale_rel, return_lse=True)
    i = draw((4, 6), 4, 1, H=1, dtype=dtype) | dict(rel_width=None)
    check_against_reference(
        partial(op, backend=backend), partial(op, backend="torch"), i, dtype=dtype, grad_tol=3 * TOLERANCE[dtype]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_loud_tables(backend):
    "Relative logits of ten thousand, which a float16 must not hold, choose the right key."
    i = draw((6, 6), 4, 2, H=1, dtype=torch.float16)
    i |= {n: 1000 * i[n] for n in ("rel_height", "rel_width")}
    op = partial(halo_attention, block_size=4, halo_size=2, return_lse=True, backend=backend)
    check_against_reference(op, partial(op, backend="torch"), i, grad=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_good_citizen(backend):
    i = draw((3, 4), 4, 1, 2, Hk=1, Dv=24)
    op = partial(
        halo_attention, block_size=4, halo_size=1, query_stride=2, padding="zeros", return_lse=True, backend=backend
    )
    check_operation(op, partial(op, backend="torch"), i, grad_tol=3e-5)


def test_registered_operation():
    i = draw((2, 2), 2, 1, H=1)
    tables = torch.cat([i["rel_height"], i["rel_width"]]).requires_grad_()
    tensors = [i[n].requires_grad_() for n in "qkv"]
    check_opcheck(
        torch.ops.attnbook.tile_attention,
        (*tensors, None, None, [tables], HALO_REL.name, [2, 2, 2, 2, _float_bits(4.0)], [2, 1, 1, 0, 1], 0.25),
    )


def test_table_gradients_are_deterministic():
    i = draw((3, 5), 4, 2, H=1)
    check_deterministic(partial(halo_attention, block_size=4, halo_size=2, backend="triton"), i)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("halo", [0, 2])
def test_one_block_is_full_attention(halo, backend):
    i = draw((6, 6), 6, 2, rel=False)
    full = attention_reference(*(t.flatten(2, 3) for t in i.values())).unflatten(2, (6, 6))
    assert rel_error(halo_attention(**i, block_size=6, halo_size=halo, backend=backend), full) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_halo_is_attention_within_blocks(backend):
    i = draw((6, 6), 6, 2, rel=False)
    cut = lambda t: t.unflatten(3, (2, 3)).unflatten(2, (2, 3)).permute(0, 2, 4, 1, 3, 5, 6).reshape(4, 2, 9, 16)
    blocks = attention_reference(*(cut(t) for t in i.values()))
    assert rel_error(cut(halo_attention(**i, block_size=3, halo_size=0, backend=backend)), blocks) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_one_are_pixel_windows(backend):
    i = draw((4, 5), 1, 2, H=1, rel=False)
    near = [(torch.arange(n)[:, None] - torch.arange(n)).abs() <= 2 for n in (4, 5)]
    near = torch.kron(near[0].byte(), near[1].byte()).bool().to(i["q"].device)
    want = attention_reference(*(t.flatten(2, 3) for t in i.values()), mask=near).unflatten(2, (4, 5))
    assert rel_error(halo_attention(**i, block_size=1, halo_size=2, backend=backend), want) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["mask", "zeros"])
def test_means(padding, backend):
    shape, b, h = (7, 9), 4, 2
    i = draw(shape, b, h, H=1)
    i["q"] = torch.zeros_like(i["q"])
    seen = halo_mask(shape, b, h).to(i["v"])
    count = seen.sum(1, keepdim=True) if padding == "mask" else (b + 2 * h) ** 2
    total = torch.einsum("ij,bhjd->bhid", seen, i["v"].flatten(2, 3))
    out = halo_attention(**i, block_size=b, halo_size=h, padding=padding, backend=backend)
    assert rel_error(out.flatten(2, 3), total / count) < 1e-5


def test_interior_is_strided_neighborhood_attention():
    b, h, n = 4, 1, 16
    i = draw((n, n), b, h, rel=False, H=1)
    ours = halo_attention(**i, block_size=b, halo_size=h)
    theirs = neighborhood_attention(*i.values(), b + 2 * h, stride=b)
    inner = slice(b, n - b)
    assert rel_error(ours[:, :, inner, inner], theirs[:, :, inner, inner]) < 1e-5
    assert rel_error(ours[:, :, :b], theirs[:, :, :b]) > 1e-2, "at the border they must differ"


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_queries_see_pixel_offsets(backend):
    "Stride 2 is every second pixel of stride 1. Offsets counted in queries, as timm counts them, would differ."
    i = draw((6, 5), 4, 1, H=1)
    run = partial(halo_attention, block_size=4, halo_size=1, backend=backend)
    every, few = run(**i), run(**(i | dict(q=i["q"][:, :, ::2, ::2])), query_stride=2)
    assert rel_error(few, every[:, :, ::2, ::2]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_row_is_an_offset(backend):
    "A loud row for offset (1, -2): every query that can looks there and nowhere else."
    b, h, n = 4, 2, 12
    i = draw((n, n), b, h, H=1)
    i["q"] = torch.ones_like(i["q"])
    for name, offset in (("rel_height", 1), ("rel_width", -2)):
        i[name] = torch.zeros_like(i[name])
        i[name][offset + b + h - 1] = 10.0
    out = halo_attention(**i, block_size=b, halo_size=h, scale=0.0, backend=backend)
    assert rel_error(out[:, :, : n - 1, 2:], i["v"][:, :, 1:, : n - 2]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_table_row_is_used(backend):
    "On two blocks or more each row gets a gradient (a table of 2w - 1 rows has 2h that never do)."
    i = draw((8, 8), 4, 3, H=1)
    _, grads = evaluate(partial(halo_attention, block_size=4, halo_size=3, backend=backend), i)
    for name in ("rel_height", "rel_width"):
        assert (grads[name].abs().sum(1) > 0).all(), name


def test_shifts():
    "A shift by a block moves the interior along; a shift by one pixel changes it."
    b, h, n = 4, 2, 20
    i = draw((n, n), b, h, H=1, dtype=torch.float64)
    run = lambda by: halo_attention(
        **{k: t.roll((by, by), (2, 3)) if t.dim() == 5 else t for k, t in i.items()}, block_size=b, halo_size=h
    ).roll((-by, -by), (2, 3))
    inner = (slice(None), slice(None), slice(b, n - 2 * b), slice(b, n - 2 * b))
    assert rel_error(run(b)[inner], run(0)[inner]) < 1e-12 and rel_error(run(1)[inner], run(0)[inner]) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_outside_the_box_do_not_matter(backend):
    i = draw((12, 8), 4, 1, H=1)
    changed = i | {n: i[n].clone() for n in "kv"}
    for n in "kv":
        changed[n][:, :, 5, 5] = 1e3
    far = ~halo_mask((12, 8), 4, 1)[:, 5 * 8 + 5].view(12, 8)
    a, b = (halo_attention(**x, block_size=4, halo_size=1, backend=backend) for x in (i, changed))
    assert far.any() and torch.equal(a[:, :, far], b[:, :, far]) and not torch.equal(a, b)


def test_bad_input():
    i = draw((6, 8), 4, 1)
    q, k, v, r = i["q"], i["k"], i["v"], i["rel_height"]
    bad = [
        (dict(block_size=0), ValueError, "block_size"),
        (dict(block_size=2.0), TypeError, "block_size"),
        (dict(halo_size=-1), ValueError, "halo_size"),
        (dict(halo_size=True), TypeError, "halo_size"),
        (dict(query_stride=3), ValueError, ("query_stride", "4")),
        (dict(query_stride=0), ValueError, "query_stride"),
        (dict(padding="reflect"), ValueError, ("mask", "zeros")),
        (dict(padding=None), TypeError, "padding"),
        (dict(rel_height=r[1:]), ValueError, ("rel_height", "9")),
        (dict(rel_width=r[:, :8]), ValueError, "rel_width"),
        (dict(rel_width=r.long()), TypeError, "rel_width"),
        (dict(q=q[:, :, :5]), ValueError, "q must"),
        (dict(q=q[0]), ValueError, "q must"),
        (dict(q=q.int()), TypeError, "q must"),
        (dict(q=1), TypeError, "q must"),
        (dict(k=k.half()), TypeError, "k must"),
        (dict(k=k[..., :8]), ValueError, "k must"),
        (dict(v=v[:, :, :5]), ValueError, "v must"),
        (dict(v=v[:, :1]), ValueError, "v must"),
        (dict(k=torch.cat([k, k[:, :1]], 1), v=torch.cat([v, v[:, :1]], 1)), ValueError, "heads"),
        (dict(scale="1"), TypeError, "scale"),
        (dict(scale=math.inf), ValueError, "scale"),
        (dict(scale_rel=1), TypeError, "scale_rel"),
        (dict(backend="cuda"), ValueError, "backend"),
    ]
    check_raises(halo_attention, bad, **i, block_size=4, halo_size=1)


def test_numpy_integers_are_integers():
    i = draw((4, 4), 2, 1)
    assert torch.equal(
        halo_attention(**i, block_size=np.int64(2), halo_size=np.int32(1)),
        halo_attention(**i, block_size=2, halo_size=1),
    )


@pytest.fixture
def timm_layers():
    return pytest.importorskip("timm.layers.halo_attn", reason="timm is not installed", exc_type=ImportError)


@pytest.mark.parametrize(
    "options",
    [{}, dict(qkv_bias=True), dict(scale_pos_embed=True), dict(dim_out=96, dim_head=8)],
    ids=["plain", "bias", "scaled", "wide"],
)
def test_timm_weights_give_timm_outputs(options, timm_layers):
    torch.manual_seed(0)
    x = torch.randn(2, 64, 12, 8, dtype=torch.float64)
    theirs = timm_layers.HaloAttn(64, num_heads=4, block_size=4, halo_size=2, **options).double()
    assert rel_error(from_timm(theirs)(x), theirs(x)) < 1e-12


def test_what_timm_cannot_give(timm_layers):
    x, plain = torch.randn(2, 64, 12, 8), timm_layers.HaloAttn(64, num_heads=4, block_size=4, halo_size=2)
    assert rel_error(from_timm(plain.state_dict(), 4, 2)(x), plain(x)) < 1e-5
    with pytest.raises(ValueError, match="rows"):
        from_timm(plain.state_dict())
    with pytest.raises(ValueError, match="stride 1"):
        from_timm(timm_layers.HaloAttn(64, stride=2))
    _, grads = evaluate(
        lambda x, r: torch.func.functional_call(plain, {"pos_embed.height_rel": r}, x), [x, plain.pos_embed.height_rel]
    )
    assert (grads["argument 1"].abs().sum(1) == 0).tolist() == [i < 4 for i in range(15)], "2h rows are never read"


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_layout_of_timm(bias):
    "Keys and values interleaved head by head; 2h rows before the first that counts; zeros as padding."
    torch.manual_seed(0)
    H, D, Dv, b, h, C = 2, 4, 6, 4, 1, 8
    make = lambda *size: torch.randn(*size, dtype=torch.float64)
    state = {
        "q.weight": make(H * D, C, 1, 1),
        "kv.weight": make(H * (D + Dv), C, 1, 1),
        "pos_embed.height_rel": make(2 * (b + 2 * h) - 1, D),
        "pos_embed.width_rel": make(2 * (b + 2 * h) - 1, D),
    }
    state |= {"q.bias": make(H * D), "kv.bias": make(H * (D + Dv))} if bias else {}
    x = make(1, C, 8, 5)
    q, kv = (
        F.conv2d(x, state[f"{n}.weight"], state.get(f"{n}.bias")).unflatten(1, (H, -1)).movedim(2, -1)
        for n in ("q", "kv")
    )
    want = halo_attention_reference(
        q,
        kv[..., :D],
        kv[..., D:],
        b,
        h,
        padding="zeros",
        **{f"rel_{n}": state[f"pos_embed.{n}_rel"][2 * h :] for n in ("height", "width")},
    )
    got = from_timm(state, b, h)(x)
    assert rel_error(got, want.movedim(-1, 2).flatten(1, 2)) < 1e-12
    with pytest.raises(ValueError, match="rows"):
        from_timm(state, b, h + 1)


@pytest.mark.parametrize(
    "make",
    [halonet_h0, halonet_h1, halonet_h2, halonet_h3, halonet_h4, halonet_h5, halonet_h6, halonet_h7],
    ids=lambda make: make.__name__,
)
def test_parameter_counts(make):
    "To the parameter; and to the paper's decimal."
    found, name = count_parameters(make), make.__name__.removeprefix("halonet_")
    assert found == VARIANTS[name][-1] and round(found / 1e6, 1) == PUBLISHED_MILLIONS[name]


def test_where_the_values_are_wide():
    layer = HaloAttention(64, value_ratio=2.5, num_heads=4, block_size=4, halo_size=1)
    assert layer.qkv.weight.shape == (64 + 64 + 160, 64) and layer.rel_height.shape == (9, 16)


@pytest.mark.parametrize(
    "stride, backend, layout",
    [
        (1, "torch", torch.channels_last),
        (1, "triton", torch.contiguous_format),
        (2, "torch", torch.contiguous_format),
        (2, "triton", torch.channels_last),
    ],
    ids=str,
)
def test_module(stride, backend, layout):
    torch.manual_seed(0)
    layer = HaloAttention(
        16, num_heads=1, value_ratio=2.0, block_size=4, halo_size=1, stride=stride, qkv_bias=True, backend=backend
    ).to(device_under_test())
    images = torch.randn(2, 16, 4, 5, device=device_under_test()).clone(memory_format=layout).requires_grad_()
    y = layer(images)
    y.square().mean().backward()
    assert y.shape == (2, 32, -(-4 // stride), -(-5 // stride)) and y.is_contiguous(memory_format=torch.channels_last)
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in layer.parameters())
    assert images.grad.isfinite().all() and "block_size=4" in repr(layer)


def packed_and_plain():
    "A layer as a function of x and its parameters, and the same by the public operation."
    torch.manual_seed(0)
    layer = HaloAttention(
        32, num_heads=2, value_ratio=2.0, block_size=4, halo_size=1, scale_rel=True, backend="triton"
    ).to(device_under_test())
    names = [n for n, _ in layer.named_parameters()]

    def packed(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), x)

    def plain(x, *values):
        given = dict(zip(names, values))
        qkv = F.linear(x.movedim(1, -1), given.pop("qkv.weight")).split(layer.widths, -1)
        q, k, v = (t.unflatten(-1, (2, -1)).movedim(-2, 1) for t in qkv)
        out = halo_attention(q, k, v, 4, 1, **given, scale_rel=True, backend="torch")
        return out.movedim(1, -2).flatten(-2).movedim(-1, 1)

    return packed, plain, [p.detach() for p in layer.parameters()]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_packed_is_the_operation(layout):
    packed, plain, parameters = packed_and_plain()
    x = torch.randn(2, 32, 3, 4, device=device_under_test()).contiguous(memory_format=layout)
    check_against_reference(packed, plain, [x, *parameters], grad_tol=3e-5)


def test_packed_compiles():
    packed, _, parameters = packed_and_plain()
    check_compiles(packed, [torch.randn(1, 32, 3, 4, device=device_under_test()), *parameters])


def test_packed_under_autocast():
    packed, _, parameters = packed_and_plain()
    check_autocast(packed, [torch.randn(1, 32, 4, 4, device=device_under_test()), *parameters])


def test_packed_operation():
    qkv, rel_height, rel_width = (
        torch.randn(*size, device=device_under_test()).requires_grad_() for size in ((1, 4, 48), (5, 16), (5, 16))
    )
    check_opcheck(
        torch.ops.attnbook.halo_packed,
        (qkv, rel_height, rel_width, 1, [16, 16, 16], [2, 2, 2, 2, _float_bits(4.0)], [2, 1, 1, 0, 1], 0.25, 1.0),
    )


@pytest.mark.parametrize("bytes_", [2 * (4 * 18 * 16), 1], ids=["two images at a time", "one"])
def test_packed_backward_in_pieces(bytes_, monkeypatch):
    "A few images at a time give the same bits for q, k and v, and the tables' gradients up to the order of a sum."
    torch.manual_seed(0)
    layer = HaloAttention(16, num_heads=1, block_size=4, halo_size=1, backend="triton").to(device_under_test())
    x, found = torch.randn(3, 16, 4, 4, device=device_under_test()), []
    sizes = []
    for most in (PARTS_BYTES, bytes_):
        monkeypatch.setitem(_images_at_once.__globals__, "PARTS_BYTES", most)
        leaf = x.clone().requires_grad_()
        q = leaf.movedim(1, -1)[:, None]
        sizes.append(_images_at_once(q, q, torch.empty(18, 16), (4, 4, 4, 4), (4, 1, 1, 0, 1)))
        found.append(torch.autograd.grad(layer(leaf).square().sum(), [leaf, *layer.parameters()]))
    assert sizes[0] == 3 > sizes[1]
    for name, a, b in zip(["x", *(n for n, _ in layer.named_parameters())], *found):
        assert rel_error(a, b) < 1e-6 if name.startswith("rel") else torch.equal(a, b), name


ON_GPU = torch.device(device_under_test()).type == "cuda"
LAYERS = [(64, 64, 8), (32, 32, 16), (16, 16, 32), (8, 8, 64)] if ON_GPU else [(9, 3, 8), (8, 8, 16)]


@pytest.mark.parametrize("padding", ["zeros", "mask"])
@pytest.mark.parametrize("Y, X, D", LAYERS)
def test_layers_of_a_network(Y, X, D, padding):
    torch.manual_seed(0)
    heads, dtype = (8, torch.bfloat16) if ON_GPU else (1, torch.float32)
    make = lambda backend: HaloAttention(heads * D, num_heads=heads, padding=padding, backend=backend)
    ours, plain = (
        make(backend).to(device_under_test(), t) for backend, t in (("triton", dtype), ("torch", torch.float32))
    )
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(4 if ON_GPU else 1, heads * D, Y, X, device=device_under_test()).to(dtype)
    inputs = [x.contiguous(memory_format=torch.channels_last).to(t).requires_grad_() for t in (dtype, torch.float32)]
    outs = [layer(i) for layer, i in zip((ours, plain), inputs)]
    weight = torch.randn_like(outs[1])
    grads = [
        torch.autograd.grad((o.float() * weight).sum(), [i, *layer.parameters()])
        for o, i, layer in zip(outs, inputs, (ours, plain))
    ]
    for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1])):
        assert rel_error(a.float(), b) < (3e-2 if ON_GPU else 1e-4)


def test_strided_module_compiles():
    torch.manual_seed(0)
    layer = HaloAttention(16, num_heads=1, block_size=4, halo_size=1, stride=2, backend="triton")
    layer.to(device_under_test())
    names = [n for n, _ in layer.named_parameters()]
    check_compiles(
        lambda x, *ps: torch.func.functional_call(layer, dict(zip(names, ps)), x),
        [torch.randn(1, 16, 4, 3, device=device_under_test()), *(p.detach() for p in layer.parameters())],
    )


def test_strided_module_is_the_module_at_every_second_pixel():
    torch.manual_seed(0)
    every, few = (HaloAttention(32, num_heads=2, block_size=4, halo_size=2, stride=s, qkv_bias=True) for s in (1, 2))
    few.load_state_dict(every.state_dict())
    x = torch.randn(2, 32, 8, 11)
    assert rel_error(few(x), every(x)[:, :, ::2, ::2]) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(kinds=("conv", "halo")),
        dict(downsample="pool"),
        dict(downsample="conv"),
        dict(final_dim=24, value_ratio=2.0, expansion=1.5, padding="zeros"),
        dict(stem_stride=4),
    ],
    ids=str,
)
def test_networks(changes):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32, device=device_under_test())
    settings = dict(widths=(16, 32), depths=(1, 2), num_heads=(2, 2), stem_stride=2, num_classes=5) | changes
    net = HaloNet(4, 1, **settings)
    out = net.to(x.device)(x)
    out.square().mean().backward()
    assert out.shape == (2, 5) and all(p.grad is not None for p in net.parameters())


def test_pooling_and_strided_convolutions_are_what_they_say():
    mix = [HaloBottleneck(16, 16, 16, 2, downsample=d, num_heads=2).mix[:2] for d in ("query", "pool", "conv")]
    assert [type(m).__name__ for m, _ in mix] == ["HaloAttention", "HaloAttention", "Conv2d"]
    assert [m.stride for m, _ in mix] == [2, 1, (2, 2)]
    assert [type(pool).__name__ for _, pool in mix] == ["Identity", "AvgPool2d", "Identity"]


def test_modules_refuse():
    layers = [
        (dict(num_heads=3), ValueError, "num_heads"),
        (dict(dim_out=30), ValueError, "num_heads"),
        (dict(dim_out=64, value_ratio=2.0), ValueError, "value_ratio"),
        (dict(stride=3), ValueError, "query_stride"),
        (dict(num_heads=0), ValueError, "num_heads"),
        (dict(padding=None), TypeError, "padding"),
        (dict(padding="same"), ValueError, "padding"),
    ]
    check_raises(HaloAttention, layers, dim=32, num_heads=4)
    nets = [
        (dict(depths=(1, 2, 3)), ValueError, "depths"),
        (dict(kinds=("halo",)), ValueError, "kinds"),
        (dict(stem_stride=3), ValueError, "stem_stride"),
        (dict(downsample="max"), ValueError, "downsample"),
        (dict(kinds=("halo", "mlp")), ValueError, "kind"),
    ]
    check_raises(HaloNet, nets, widths=(16, 32), depths=(1, 1), num_heads=(2, 2))
    with pytest.raises(ValueError, match="variant"):
        halonet("h8")
    with pytest.raises(ValueError, match="x must have shape"):
        HaloAttention(32)(torch.zeros(1, 16, 8, 8))


def test_outside_mass_of_a_layer_that_does_not_care():
    "With equal logits zeros draw exactly their share of the lanes; the network is left as it was."
    net = nn.Sequential(HaloAttention(8, num_heads=2, block_size=4, halo_size=1, rel_pos=False)).train()
    nn.init.zeros_(net[0].qkv.weight)
    (layer,) = outside_mass(net, torch.randn(1, 8, 6, 6))
    lanes = 1 - real_key_fraction((6, 6), 4, 1)
    assert layer["map"] == 6 and layer["lanes"] == pytest.approx(lanes) and net.training
    # a mean over queries, of which a partial block has fewer
    share = 1 - halo_mask((6, 6), 4, 1).sum(1) / 36
    assert layer["mass"] == pytest.approx(float(share.mean()), abs=1e-6) and not net[0]._forward_pre_hooks


def test_counted_flops():
    layer = HaloAttention(8, num_heads=2, block_size=4, halo_size=1, rel_pos=False, backend="auto")
    N, w, C = 16, 6, 8
    assert counted_flops(nn.Sequential(layer), torch.randn(1, C, 4, 4)) == 2 * N * C * 3 * C + 2 * N * w * w * (C + C)
    assert layer.backend == "auto"


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
    for _ in range(5):
        step()
    assert F.cross_entropy(net(x), y) < before


def _pair(a, b, x, y):
    return {a: x, b: y, f"{a} spread": 1.0, f"{b} spread": 0.5}


VERDICTS_OF = {  # claim -> made-up measurements that hold, hold in part, do not hold
    "H0 …": (PUBLISHED_MILLIONS, PUBLISHED_MILLIONS | dict(h6=43.5), dict.fromkeys(VARIANTS, 1.0)),
    "Blocks give up": ({"by 4": 0.0, "by 1": 0.1}, {"by 4": 0.0, "by 1": 0.0}, {"by 4": 0.1, "by 1": 0.1}),
    "Blocks are faster": (dict(gain=2.0), dict(gain=1.5), dict(gain=0.9)),
    "A halo improves": [_pair("halo 2", "halo 0", 90.0, x) for x in (88.0, 89.5, 91.0)],
    "Larger windows": [_pair("halo 3", "halo 1", 90.0, x) for x in (88.0, 89.5, 91.0)],
    "Attention in all": [{"halo 2": 90.0, "conv 1": a, "conv 1-2": b} for a, b in ((89, 89), (91, 89), (89, 91))],
    "Attention in early": [
        {f"{n} of 4": ms for n, ms in zip((4, 3, 2, 1), times)} for times in ((4, 3, 2, 1), (4, 5, 2, 1), (1, 2, 3, 4))
    ],
    "Attention downsampling": [_pair("halo 2", "pool", 90.0, x) for x in (91.0, 91.5, 92.5)],
    "The same against strided": [_pair("halo 2", "strided conv", 90.0, x) for x in (91.0, 91.5, 92.5)],
    "Zeros around": (0.05, 0.1, 0.2),
    "Masking": [_pair("halo 2", "zeros", 90.0, x) for x in (91.0, 91.5, 92.5)],
    "Our module": [dict(a=x, b=9.0) for x in (6.0, 5.9, 1.9)],
    "The same, forward": [dict(a=x, b=9.0) for x in (4.0, 3.9, 1.9)],
    "It needs less": [dict(a=x, b=9.0) for x in (4.0, 3.9, 1.9)],
    "A training step": [dict(a=x, b=9.0) for x in (1.5, 1.4, 0.9)],
    "and needs less": [dict(a=x, b=9.0) for x in (1.5, 1.4, 0.9)],
}


@pytest.mark.parametrize("claim", VERDICTS_OF)
def test_rules(claim):
    (rule,) = (c.rule for c in claims() if c.statement.startswith(claim))
    found = [rule(m) for m in VERDICTS_OF[claim]]
    assert [f if isinstance(f, str) else f[0] for f in found] == ["holds", "holds in part", "does not hold here"]


def _recorded(monkeypatch, **tables):
    "Makes the study read these rows (benchmark -> rows) as if they were recorded."

    def read(chapter, name=None, **where):
        rows = [dict(device="G", date="2026-01-01", versions={}) | r for r in tables.get(name, [])]
        return [r for r in rows if all(r.get(k) == v for k, v in where.items())]

    monkeypatch.setitem(_rows.__globals__, "load_results", read)


def test_networks_are_looked_up(monkeypatch):
    def row(net, run, accuracy, steps=500, preset="gpu"):
        return dict(net=net, run=run, accuracy=accuracy, steps=steps, preset=preset)

    nets = [row("halo 2", i, x) for i, x in enumerate((0.9, 0.92, 0.94))] + [row("halo 0", i, 0.5) for i in range(3)]
    nets += [row("halo 2", 0, 0.1, steps=40), row("pool", 0, 0.9), row("halo 2", 7, 0.2, preset="cpu")]
    _recorded(monkeypatch, nets=nets)
    want = {"halo 2": 92, "halo 2 spread": 4, "halo 0": 50, "halo 0 spread": 0}
    assert _nets("halo 2", "halo 0") == pytest.approx(want)
    assert _nets("halo 2", "pool") is None and _nets("zeros") is None


def test_speed_is_looked_up(monkeypatch):
    row = lambda method, layout, fwd, bwd: dict(method=method, layout=layout, ms_fwd=fwd, ms_bwd=bwd, preset="gpu")
    _recorded(
        monkeypatch,
        module=[
            row("ours", "first", 2.0, 2.0),
            row("ours compiled", "first", 1.0, 4.0),
            row("ours, mask", "first", 0.1, 0.1),
            row("timm", "first", 1.0, 1.0),
            row("timm compiled", "first", 6.0, 6.0),
            row("ours", "last", 1.0, None),
        ],
    )
    for fields, ratio in (("ms_fwd", 6.0), (("ms_fwd", "ms_bwd"), 3.0)):
        assert [s.ratio for s in _against_timm(fields)] == [ratio]
    assert _training_gain("peak_mb") is None


def test_other_rows_are_looked_up(monkeypatch):
    cost = [
        dict(method="ours", side=s, block=b, ms=ms, preset="gpu")
        for s, b, ms in ((56, 1, 1.0), (112, 1, 9.0), (112, 5, 3.0), (112, 15, 4.0))
    ]
    layers = [dict(mass=0.3, lanes=0.32), dict(mass=0.5, lanes=0.4)]
    training = [
        dict(method=m, size=256, images_per_s=x, peak_mb=y, preset="gpu")
        for m, x, y in (("ours", 90.0, 4.0), ("timm compiled", 60.0, 8.0))
    ]
    stages = [dict(method=f"attention in {n} of 4", ms=n, preset="gpu") for n in (1, 2, 3, 4)]
    nets = [dict(net="halo 2", before=layers), dict(net="halo 1", before=[dict(mass=9, lanes=0)])]
    _recorded(monkeypatch, cost=cost, nets=nets, training=training, stages=stages)
    assert _blocking_gain() == dict(gain=3.0, block=5) and _border_law() == pytest.approx(0.1)
    assert [_training_gain(f)[0].ratio for f in ("images_per_s", "peak_mb")] == [1.5, 2.0]
    assert _stage_times() == {"4 of 4": 4, "3 of 4": 3, "2 of 4": 2, "1 of 4": 1}


def test_nothing_recorded_is_not_measured(monkeypatch):
    _recorded(monkeypatch)
    verdicts = [c.judge().verdict for c in claims()]
    assert verdicts == ["holds", "holds"] + ["not measured"] * 14 + ["out of reach here"] * 3

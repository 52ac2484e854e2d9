# Written from the test cells of nbs/3_locality/halo.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from attnbook.attention import attention_reference
from attnbook.engine.host import forget
from attnbook.engine.run_backward import run_backward
from attnbook.halo.claims_study import (
    OURS,
    STAGE_RATIOS,
    TIMM,
    _blocking_gain,
    _border_law,
    _broken_equivariance,
    _faster,
    _gaps,
    _run_of,
    _stage_ratios,
    _steps_of_the_halo,
    near_the_stages,
)
from attnbook.halo.experiments_study import (
    NETS,
    PRESETS,
    cost_experiment,
    counted_flops,
    halo_data,
    net_experiments,
    outside_mass,
    run_experiments,
)
from attnbook.halo.kernels import HALO_REL, key_tile, tile_waste
from attnbook.halo.layer_nets import HaloAttention
from attnbook.halo.nets import (
    PUBLISHED_MILLIONS,
    VARIANTS,
    HaloBottleneck,
    HaloNet,
    from_timm,
    halonet,
    halonet26t,
    halonet50ts,
    halonet_h0,
    halonet_h1,
    halonet_h2,
    halonet_h3,
    halonet_h4,
    halonet_h5,
    halonet_h6,
    halonet_h7,
)
from attnbook.halo.op import PARTS_BYTES, _float_bits, _images_at_once, _plan_packed_backward, halo_attention
from attnbook.halo.reference import (
    halo_attention_reference,
    halo_boxes,
    halo_mask,
    halo_pairs,
    offset_rows,
    query_rows_of_timm,
    real_key_fraction,
)
from attnbook.halo.study import claims, unfolded_attention
from attnbook.lab.stats import Interval, interval
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


TIMM_LAYERS = {  # name -> what timm's layer is made with beside 4 heads, block 4 and halo 2, and what ours is
    "plain": ({}, {}),
    "bias": (dict(qkv_bias=True), dict(qkv_bias=True)),
    "scaled": (dict(scale_pos_embed=True), dict(scale_rel=True)),
    "wide": (dict(dim_out=96, dim_head=8), dict(dim_out=96, head_dim=8)),
    "stride 2": (dict(stride=2), dict(stride=2, offsets="queries")),
}


def timm_layer_state(H, D, Dv, C, b, h, bias, dtype=torch.float64):
    "A state dict in the layout of timm's `HaloAttn`."
    make = lambda *size: torch.randn(*size, dtype=dtype)
    state = {"q.weight": make(H * D, C, 1, 1), "kv.weight": make(H * (D + Dv), C, 1, 1)}
    state |= {f"pos_embed.{n}_rel": make(2 * (b + 2 * h) - 1, D) for n in ("height", "width")}
    return state | ({"q.bias": make(H * D), "kv.bias": make(H * (D + Dv))} if bias else {})


@pytest.fixture
def timm_networks():
    try:
        from timm.layers.halo_attn import HaloAttn
        from timm.models import byoanet
    except (ImportError, RuntimeError) as e:  # torchvision of another version
        pytest.skip(f"timm is not installed: {e}")
    return HaloAttn, byoanet


@pytest.mark.parametrize("options, ours", TIMM_LAYERS.values(), ids=TIMM_LAYERS)
def test_timm_weights_give_timm_outputs(options, ours, timm_networks):
    torch.manual_seed(0)
    x = torch.randn(2, 64, 12, 8, dtype=torch.float64)
    theirs = timm_networks[0](64, num_heads=4, block_size=4, halo_size=2, **options).double()
    layer = HaloAttention(64, num_heads=4, block_size=4, halo_size=2, padding="zeros", **ours).double()
    assert rel_error(from_timm(layer, theirs)(x), theirs(x)) < 1e-12


@pytest.mark.parametrize(
    "name, make",
    [
        ("halonet26t", halonet26t),
        ("halonet50ts", halonet50ts),
        ("halonet_h1", partial(halonet, "h1", num_heads=(8,) * 4, padding="zeros", offsets="queries")),
    ],
    ids=["26t", "50ts", "h1"],
)
def test_timm_networks_give_timm_outputs(name, make, timm_networks):
    torch.manual_seed(0)
    theirs = getattr(timm_networks[1], name)(num_classes=5).eval()
    for m in theirs.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1), m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.5, 1.5)  # timm's last norm of a block begins with 0, which would hide the block
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert rel_error(from_timm(make(num_classes=5).eval(), theirs)(x), theirs(x)) < 1e-4
    features = from_timm(make(num_classes=0).eval(), {"state_dict": theirs.state_dict()})
    with torch.no_grad():
        assert rel_error(features.forward_features(x), theirs.forward_features(x)) < 1e-4


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_layout_of_timm(bias, stride):
    "Keys and values interleaved head by head; dead rows before the first that counts; zeros as padding; a loop's offsets."
    torch.manual_seed(0)
    H, D, Dv, b, h, C = 2, 4, 6, 4, 1, 8
    state, w, n = timm_layer_state(H, D, Dv, C, b, h, bias), b + 2 * h, b // stride
    x = torch.randn(1, C, 8, 5, dtype=torch.float64)
    layer = HaloAttention(
        C, H * Dv, H, D, block_size=b, halo_size=h, stride=stride, qkv_bias=bias, padding="zeros", offsets="queries"
    )
    got = from_timm(layer.double(), state)(x)
    q, kv = (F.conv2d(x, state[f"{n}.weight"], state.get(f"{n}.bias"))[0].unflatten(0, (H, -1)) for n in ("q", "kv"))
    for Yq, Xq in ((0, 0), (got.shape[2] - 1, got.shape[3] - 1), (1, got.shape[3] - 2)):
        top, left = (Yq * stride // b * b - h, Xq * stride // b * b - h)
        for head in range(H):
            a, logits, values = q[head, :, Yq * stride, Xq * stride], [], []
            for u, v in product(range(w), repeat=2):
                y, x_ = top + u, left + v
                inside = 0 <= y < 8 and 0 <= x_ < 5
                pair = kv[head, :, y, x_] if inside else torch.zeros(D + Dv, dtype=torch.float64)
                rows = (u - Yq % n + w - 1, v - Xq % n + w - 1)
                r = sum(state[f"pos_embed.{axis}_rel"][row] for axis, row in zip(("height", "width"), rows))
                logits.append(D**-0.5 * a @ pair[:D] + a @ r), values.append(pair[D:])
            want = torch.stack(logits).softmax(0) @ torch.stack(values)
            assert rel_error(got[0, head * Dv : (head + 1) * Dv, Yq, Xq], want) < 1e-12


def renamed_for_timm(net):
    "The state dict of a small HaloNet with the names and the layout of timm's networks."
    parts = {ours: theirs for theirs, ours in dict(shortcut="shortcut", conv1_1x1="reduce", conv3_1x1="expand").items()}
    state, halo = {}, {n for n, m in net.named_modules() if isinstance(m, HaloAttention)}
    for name, t in net.state_dict().items():
        if name.startswith("stem."):
            i, rest = name.split(".")[1:]
            name = f"stem.conv{int(i) // 3 + 1}.{'bn' if int(i) % 3 else 'conv'}.{rest}"
        elif name.startswith("stages."):
            stage, block, part, i, rest = name.split(".", 5)[1:6]
            at = f"stages.{stage}.{block}"
            if part in parts:
                name = f"{at}.{parts[part]}.{'bn' if i == '1' else 'conv'}.{rest}"
            elif f"{at}.mix.0" in halo:
                name = f"{at}.post_attn.{rest}" if i == "2" else None
            else:
                name = f"{at}.conv2_kxk.{'bn' if i == '2' else 'conv'}.{rest}"
        elif name.startswith("final."):
            name = f"final_conv.{'bn' if name.split('.')[1] == '1' else 'conv'}.{name.split('.', 2)[2]}"
        else:
            name = name.replace("head.", "head.fc.")
        if name:
            state[name] = t
    for name in halo:
        layer, at = net.get_submodule(name), name.replace("mix.0", "self_attn")
        q, k, v = layer.qkv.weight.split(layer.widths)
        heads = lambda t: t.unflatten(0, (layer.num_heads, -1))
        kv = torch.cat([heads(k), heads(v)], 1).flatten(0, 1)
        state |= {f"{at}.q.weight": q[..., None, None], f"{at}.kv.weight": kv[..., None, None]}
        dead = torch.full(
            (2 * (layer.block_size + 2 * layer.halo_size) - 1 - len(layer.rel_height), layer.head_dim), 9.0
        )
        state |= {f"{at}.pos_embed.{n}_rel": torch.cat([dead, getattr(layer, f"rel_{n}")]) for n in ("height", "width")}
    return state


def small_timm_network(**changes):
    "Like timm's networks: convolutions and attention in one stage, a stem of three convolutions, offsets in queries."
    settings = dict(widths=(16, 32), depths=(1, 2), num_heads=(2, 2), kinds=("conv", ("halo", "conv")), num_classes=3)
    settings |= dict(padding="zeros", offsets="queries", tiered_stem=True, final_dim=24, expansion=2) | changes
    return HaloNet(4, 1, **settings)


def test_names_of_timm():
    torch.manual_seed(0)
    theirs = small_timm_network().eval()
    for p in theirs.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    x, state = torch.randn(1, 3, 32, 32), renamed_for_timm(theirs)
    assert {n.split(".")[0] for n in state} == {"stem", "stages", "final_conv", "head"}
    with torch.no_grad():
        assert torch.equal(from_timm(small_timm_network().eval(), state)(x), theirs(x))
        features = from_timm(small_timm_network(num_classes=0).eval(), {"state_dict": state})
        assert torch.equal(features(x), theirs.forward_features(x).mean((2, 3)))


@pytest.mark.parametrize(
    "changes, lost, says",
    [
        (dict(padding="mask"), None, "padding='zeros'"),
        (dict(offsets="pixels"), None, "offsets='queries'"),
        (dict(num_classes=4), None, "head.weight"),
        (dict(kinds=("conv", "conv")), None, "mix.0"),
        ({}, "stages.1.0.self_attn.q.weight", "q.weight"),
        ({}, "stem.conv2.bn.bias", "stem.4.bias"),
    ],
    ids=["mask", "pixels", "classes", "kinds", "lost in a layer", "lost"],
)
def test_what_timm_weights_do_not_fit(changes, lost, says):
    state = renamed_for_timm(small_timm_network())
    state.pop(lost, None)
    with pytest.raises(ValueError, match=says):
        from_timm(small_timm_network(**changes), state)


def test_layers_of_timm_that_do_not_fit():
    make = lambda b=4, h=1, **more: HaloAttention(8, 12, 2, 4, block_size=b, halo_size=h, padding="zeros", **more)
    state = timm_layer_state(2, 4, 6, 8, 4, 1, False, torch.float32)
    assert torch.equal(from_timm(make(), state).rel_width, state["pos_embed.width_rel"][2:])
    for layer, says in (
        (make(h=2), "tables must have"),
        (make(qkv_bias=True), "q.bias"),
        (HaloAttention(8, 16, 2, 4, block_size=4, halo_size=1, padding="zeros"), "kv.weight must be"),
    ):
        with pytest.raises(ValueError, match=says):
            from_timm(layer, state)


def test_two_ways_to_count_offsets():
    "At stride 1 the same; at stride 2 the tables count queries: rows that pixels of one query never reach are not there."
    assert HaloAttention(16, num_heads=2, block_size=4, halo_size=1, offsets="queries").offsets == "pixels"
    layer = HaloAttention(16, num_heads=2, block_size=4, halo_size=1, stride=2, offsets="queries")
    assert layer.rel_height.shape == (7, 8) and query_rows_of_timm(4, 1, 2).tolist() == [
        [1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 5],
    ]
    assert torch.equal(query_rows_of_timm(4, 1, 1), offset_rows(4, 1))
    x = torch.randn(1, 16, 8, 8).half()
    assert layer.half()(x).dtype == torch.float16 and layer(x).shape == (1, 16, 4, 4)
    out, lse = layer.attend(*layer.project(x), return_lse=True)
    assert out.dtype == torch.float16 and lse.shape == (1, 2, 4, 4)


@pytest.mark.parametrize("make, want", [(halonet26t, 12_478_496), (halonet50ts, 22_730_976)], ids=["26t", "50ts"])
def test_parameters_of_timm_networks(make, want):
    "timm's counts less the rows of tables that are never read."
    assert count_parameters(make) == want


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


def packed_and_plain(block_size=4):
    "A layer as a function of x and its parameters, and the same by the public operation."
    torch.manual_seed(0)
    layer = HaloAttention(
        32, num_heads=2, value_ratio=2.0, block_size=block_size, halo_size=1, scale_rel=True, backend="triton"
    ).to(device_under_test())
    names = [n for n, _ in layer.named_parameters()]

    def packed(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), x)

    def plain(x, *values):
        given = dict(zip(names, values))
        qkv = F.linear(x.movedim(1, -1), given.pop("qkv.weight")).split(layer.widths, -1)
        q, k, v = (t.unflatten(-1, (2, -1)).movedim(-2, 1) for t in qkv)
        out = halo_attention(q, k, v, block_size, 1, **given, scale_rel=True, backend="torch")
        return out.movedim(1, -2).flatten(-2).movedim(-1, 1)

    return packed, plain, [p.detach() for p in layer.parameters()]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_packed_is_the_operation(layout):
    packed, plain, parameters = packed_and_plain()
    x = torch.randn(2, 32, 3, 4, device=device_under_test()).contiguous(memory_format=layout)
    check_against_reference(packed, plain, [x, *parameters], grad_tol=3e-5)


@pytest.mark.parametrize("block_size, shape", [(1, (2, 3)), (2, (2, 2)), (3, (4, 5)), (9, (10, 9))], ids=str)
def test_packed_blocks_that_fill_no_tile(block_size, shape):
    "The rows of a tile behind a block's last query must leave alone what that query passes on to the keys' gradients."
    packed, plain, parameters = packed_and_plain(block_size)
    x = torch.randn(2, 32, *shape, device=device_under_test())
    check_against_reference(packed, plain, [x, *parameters], grad_tol=3e-5)


def test_packed_compiles():
    packed, _, parameters = packed_and_plain()
    check_compiles(packed, [torch.randn(1, 32, 3, 4, device=device_under_test()), *parameters])


def test_packed_under_autocast():
    packed, _, parameters = packed_and_plain()
    check_autocast(packed, [torch.randn(1, 32, 4, 4, device=device_under_test()), *parameters])


def test_packed_operation():
    torch.manual_seed(0)
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
    sizes, pieces = [], []
    count = lambda *args, **rest: pieces.append(1) or run_backward(*args, **rest)
    monkeypatch.setitem(_plan_packed_backward.__globals__, "run_backward", count)
    for most in (PARTS_BYTES, bytes_):
        monkeypatch.setitem(_images_at_once.__globals__, "PARTS_BYTES", most)
        forget()  # or the first plan would serve both
        leaf = x.clone().requires_grad_()
        q = leaf.movedim(1, -1)[:, None]
        sizes.append(_images_at_once(q, q, torch.empty(18, 16), (4, 4, 4, 4), (4, 1, 1, 0, 1)))
        found.append(torch.autograd.grad(layer(leaf).square().sum(), [leaf, *layer.parameters()]))
    forget()
    assert sizes[0] == 3 > sizes[1] and len(pieces) == -(-3 // sizes[1])
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
    side, channels = 16 // settings["stem_stride"], settings.get("final_dim") or 32
    assert net.forward_features(x).shape == (2, channels, side, side)  # one stride of 2 for a stage


def test_kinds_block_by_block():
    net = HaloNet(4, 1, widths=(16, 32), depths=(1, 3), num_heads=(2, 2), kinds=("conv", ("halo", "conv", "halo")))
    found = [[type(block.mix[0]).__name__ for block in stage] for stage in net.stages]
    assert found == [["Conv2d"], ["HaloAttention", "Conv2d", "HaloAttention"]]


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
        (dict(stride=2, offsets="blocks"), ValueError, "offsets"),
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
        (dict(kinds=("halo", ("halo", "conv"))), ValueError, "kinds"),
        (dict(num_classes=-1), ValueError, "num_classes"),
        (dict(stem_stride=2, tiered_stem=True), ValueError, "stem_stride"),
    ]
    check_raises(HaloNet, nets, widths=(16, 32), depths=(1, 1), num_heads=(2, 2))
    with pytest.raises(ValueError, match="variant"):
        halonet("h8")
    with pytest.raises(ValueError, match="x must have shape"):
        HaloAttention(32)(torch.zeros(1, 16, 8, 8))


def test_cost_rows():
    "One row for each block and method; copies as the square of the ratio; a method that fails keeps its row."
    rows = list(cost_experiment(**PRESETS["smoke"]["cost"]))
    assert [(r["method"], r["block"], r["halo"]) for r in rows] == [
        ("reference", 1, 2),
        ("windows per pixel", 1, 2),
        ("reference", 3, 1),
        ("reference", 5, 0),
    ]
    assert [r["copies"] for r in rows if r["method"] == "reference"] == [25.0, (5 / 3) ** 2, 1.0]
    assert all(r["ms"] > 0 and r["window"] == 5 == r["block"] + 2 * r["halo"] for r in rows)
    settings = PRESETS["smoke"]["cost"] | dict(window=9)  # wider than the map: no window per pixel
    failed = [r for r in cost_experiment(**settings) if r["ms"] is None]
    assert [r["method"] for r in failed] == ["windows per pixel"] and "window_size" in failed[0]["note"]
    assert not [r for r in cost_experiment(**settings | dict(most_bytes=10)) if r["method"] == "reference"]


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


def test_networks_side_by_side(monkeypatch):
    "Rows in the order of names; the loss is that of the last ten steps, accuracies of the trained networks."

    def train(trainees, *, steps, batch_size):
        for i, t in enumerate(trainees):
            t.losses, t.seconds = [float(i)] * 5 + [100.0 + i] * 10, 1.5
            t.model.head.bias.data = 100.0 * F.one_hot(torch.tensor(i), 10).to(t.model.head.bias)

    monkeypatch.setitem(net_experiments.__globals__, "train_together", train)
    cfg, device = PRESETS["smoke"], device_under_test()
    data = halo_data(**cfg["data"])
    rows = net_experiments(("halo 1", "zeros"), data, model=cfg["model"], steps=15, batch=4, seed=3, device=device)
    assert [(r["net"], r["run"], r["steps"], r["loss"]) for r in rows] == [
        ("halo 1", 3, 15, 100.0),
        ("zeros", 3, 15, 101.0),
    ]
    share = [float((data[3] == i).float().mean()) for i in range(2)]
    assert [r["accuracy"] for r in rows] == pytest.approx(share)
    assert rows[0]["parameters"] != rows[1]["parameters"] and len(rows[0]["before"]) == len(rows[0]["after"]) == 3


def test_everything_of_a_preset(monkeypatch):
    "Every experiment under its name, with the seeds that were asked for."
    kept = []
    globals_of = run_experiments.__globals__
    monkeypatch.setitem(globals_of, "record", lambda chapter, name, **row: kept.append((name, row)) or row)
    monkeypatch.setitem(
        globals_of,
        "net_experiments",
        lambda names, data, **kw: [dict(net=n, run=kw["seed"], accuracy=0.5, seconds=1.0) for n in names],
    )
    run_experiments("smoke", "cpu", seeds=(3, 5), show=lambda text: None)
    assert [(r["net"], r["run"]) for n, r in kept if n == "nets"] == [(n, run) for run in (3, 5) for n in NETS]
    assert len([n for n, _ in kept if n == "cost"]) == 4 and all(r["preset"] == "smoke" for _, r in kept)
    kept.clear()
    run_experiments("smoke", "cpu", only="cost", show=lambda text: None)
    assert {n for n, _ in kept} == {"cost"}
    with pytest.raises(ValueError, match="only"):
        run_experiments("smoke", only="everything")


def test_peer_is_the_same_function():
    "The peer that unfolds is halo attention with zeros, so that times are compared between equals."
    i = draw((12, 8), 4, 2, B=2, dtype=torch.float64)
    want = halo_attention(**i, block_size=4, halo_size=2, padding="zeros")
    assert rel_error(unfolded_attention(**i, block_size=4, halo_size=2), want) < 1e-12
    i |= dict(rel_height=None, rel_width=None)
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


def _around(*ends):
    "Intervals with these ends, named a, b, …"
    return {n: Interval((lo + hi) / 2, (hi - lo) / 2, 3) for n, (lo, hi) in zip("abcd", ends)}


YES, OPEN, NO = (0.1, 0.9), (-0.1, 0.9), (-0.9, -0.1)
GAINS = dict(yes=_around(YES), open=_around(OPEN), no=_around(NO))
NOT_WORSE = dict(yes=_around((-0.9, 0.5)), open=_around((-1.1, 0.5)), no=_around((-3.0, -1.1)))
SPEEDS = lambda holds, part: {  # at the bounds and just below them
    kind: dict(a=x, b=99.0) for kind, x in dict(yes=holds, almost=0.99 * holds, part=part, no=0.99 * part).items()
}
VERDICTS_OF = {  # (claim, which of that name) -> made-up measurements
    ("H0 …", 0): dict(yes=PUBLISHED_MILLIONS, part=PUBLISHED_MILLIONS | dict(h6=43.5), no=dict.fromkeys(VARIANTS, 1.0)),
    ("Blocks give up", 0): {
        "yes": {"by a block": 0.0, "by less": 0.1},
        "part": {"by a block": 0.0, "by less": 0.001},
        "no": {"by a block": 0.1, "by less": 0.1},
    },
    ("Blocks are faster", 0): SPEEDS(2.0, 1.0),
    ("The same in kernels", 0): SPEEDS(1.1, 1.0),
    ("A halo improves", 0): GAINS,
    ("Larger windows", 0): GAINS | dict(part=_around(YES, OPEN)),
    ("Attention in all", 0): dict(
        yes=_around(YES, YES, YES), part=_around(YES, OPEN, YES), open=_around(OPEN, OPEN), no=_around(YES, OPEN, NO)
    ),
    ("The same with as many", 0): GAINS,
    ("Convolutions in the first", 0): dict(
        yes=STAGE_RATIOS,
        part={n: x for n, x in zip(STAGE_RATIOS, (1.01, 1.02, 1.03))},
        no={n: x for n, x in zip(STAGE_RATIOS, (1.3, 1.2, 3.8))},
    ),
    ("Attention downsampling", 0): NOT_WORSE,
    ("The same against strided", 0): NOT_WORSE,
    ("Zeros around", 0): dict(yes=0.05, almost=0.051, part=0.15, no=0.151),
    ("Masking", 0): NOT_WORSE,
    ("Our module", 0): SPEEDS(6.0, 2.0),
    ("The same, forward", 0): SPEEDS(4.0, 2.0),
    ("It needs less", 0): SPEEDS(4.0, 2.0),
    ("The attention alone", 0): SPEEDS(1.5, 1.0),
    ("The same, forward", 1): SPEEDS(1.5, 1.0),
    ("Without tables", 0): SPEEDS(1.5, 1.0),
    ("The same against unfolding", 0): SPEEDS(1.5, 1.0),
    ("A training step", 0): SPEEDS(1.5, 1.0),
    ("and needs less", 0): SPEEDS(1.5, 1.0),
}
SAID = dict(yes="holds", almost="holds in part", part="holds in part", open="not measured", no="does not hold here")


@pytest.mark.parametrize("claim, which", VERDICTS_OF, ids=str)
def test_rules(claim, which):
    rule = [c.rule for c in claims() if c.statement.startswith(claim)][which]
    for kind, measured in VERDICTS_OF[claim, which].items():
        found = rule(measured)
        assert (found if isinstance(found, str) else found[0]) == SAID[kind], kind


def test_every_claim_has_a_tested_rule():
    assert len(VERDICTS_OF) == len([c for c in claims() if c.measured is not None])


def test_three_quarters_of_every_ratio():
    "One stage below three quarters of the paper's ratio is enough for `in part`."
    for name in STAGE_RATIOS:
        low = {n: (0.75 if n != name else 0.74) * x for n, x in STAGE_RATIOS.items()}
        assert near_the_stages()({n: 0.75 * x + 1e-9 for n, x in STAGE_RATIOS.items()}) == "holds"
        assert near_the_stages()(low) == ("holds in part" if low["stages 1 to 1"] > 1 else "does not hold here")
    assert STAGE_RATIOS == pytest.approx({"stages 1 to 1": 1.357, "stages 1 to 2": 1.9, "stages 1 to 3": 3.8}, abs=1e-3)


def _recorded(monkeypatch, **tables):
    "Makes the study read these rows (benchmark -> rows) as if they were recorded."

    def read(chapter, name=None, **where):
        same = dict(device="G", date="2026-01-01T00:00:00+00:00", versions={}, preset="gpu")
        rows = [same | r for r in tables.get(name, [])]
        return [r for r in rows if all(r.get(k) == v for k, v in where.items())]

    monkeypatch.setitem(_run_of.__globals__, "load_results", read)


OLDER = "2025-12-31T20:00:00+00:00"  # the date of another run


def test_networks_are_looked_up(monkeypatch):
    def row(net, run, accuracy, steps=500, **more):
        return dict(net=net, run=run, accuracy=accuracy, steps=steps) | more

    nets = [row("halo 2", i, x) for i, x in enumerate((0.90, 0.92, 0.94))]
    nets += [row("halo 0", i, x) for i, x in ((2, 0.54), (0, 0.50), (1, 0.51))]
    nets += [row("halo 2", 0, 0.1, steps=40), row("pool", 0, 0.9), row("halo 2", 7, 0.2, preset="cpu")]
    nets += [row("halo 1", i, 0.9, date=OLDER) for i in range(3)]  # of another run
    nets += [row("halo 3", i, 0.95 + 0.01 * (i == 1)) for i in range(3)]
    _recorded(monkeypatch, nets=nets)
    (found,) = _gaps("halo 2", "halo 0").values()
    want = interval([40.0, 41.0, 40.0])
    assert (found.mean, found.half, found.n) == pytest.approx((want.mean, want.half, 3))
    assert _gaps("halo 0", "halo 2")["halo 2"].mean == pytest.approx(-want.mean)
    assert _gaps("halo 2", "halo 0", "pool") is None and _gaps("zeros", "halo 2") is None
    assert _gaps("halo 2", "halo 1") is None and _steps_of_the_halo() is None
    _recorded(monkeypatch, nets=nets + [row("halo 1", i, 0.8) for i in range(3)])
    steps = _steps_of_the_halo()
    assert [round(i.mean, 2) for i in steps.values()] == [12.0, 3.33] and list(steps) == ["1 to 2", "2 to 3"]


def test_speed_is_looked_up(monkeypatch):
    row = lambda method, layout, fwd, bwd, **more: dict(method=method, layout=layout, ms_fwd=fwd, ms_bwd=bwd) | more
    rows = [
        row("ours", "first", 2.0, 2.0),
        row("ours compiled", "first", 1.0, 4.0),
        row("ours, mask", "first", 0.1, 0.1),
        row("timm", "first", 9.0, 1.0),
        row("timm compiled", "first", 6.0, 6.0),
        row("ours", "last", 1.0, None),
        row("timm", "first", 0.1, 0.1, preset="cpu"),
        row("timm compiled", "last", 0.1, 0.1, device="older GPU", date=OLDER),
    ]
    _recorded(monkeypatch, module=rows)
    for fields, ratio, peer in (("ms_fwd", 6.0, "timm compiled"), (("ms_fwd", "ms_bwd"), 2.5, "timm")):
        (found,) = _faster("module", "layout", fields, OURS, TIMM)
        assert (found.ratio, found.peer) == (ratio, peer)
    rows[4] |= dict(ms_fwd=None)
    (found,) = _faster("module", "layout", "ms_fwd", OURS, TIMM)
    assert found.ratio == 9.0 and found.failed == ("timm compiled",)
    assert _faster("training", "size", "peak_mb", OURS, TIMM) is None


def test_more_images_are_better(monkeypatch):
    rows = [
        dict(method=m, size=256, images_per_s=x, peak_mb=y)
        for m, x, y in (("ours", 90.0, 4.0), ("timm compiled", 60.0, 8.0), ("timm", 30.0, 9.0))
    ]
    _recorded(monkeypatch, training=rows)
    assert [_faster("training", "size", f, OURS, TIMM)[0].ratio for f in ("images_per_s", "peak_mb")] == [1.5, 2.0]


def test_blocks_are_looked_up(monkeypatch):
    def row(method, side, block, ms, **more):
        return dict(method=method, side=side, block=block, ms=ms) | more

    rows = [row("ours, no tables", 56, b, ms) for b, ms in ((1, 0.1), (5, 2.0), (15, 4.0))]
    rows += [row("ours, no tables", 112, b, ms) for b, ms in ((1, 0.1), (3, 9.0), (5, None))]
    rows += [row("windows per pixel", side, 1, ms) for side, ms in ((56, 3.0), (112, 6.0))]
    rows += [row("reference", 56, b, ms, preset="cpu") for b, ms in ((1, 9.0), (3, 3.0))]
    rows += [row("windows per pixel", 224, 1, 5.0), row("ours", 56, 5, 0.01)]
    rows += [row("ours, no tables", 224, 5, 1.0, date=OLDER)]  # of another run
    _recorded(monkeypatch, cost=rows)
    found = _blocking_gain("ours, no tables", "windows per pixel")
    assert [(s.where, s.ratio) for s in found] == [("56², block 5", 1.5), ("112², block 3", 6 / 9)]
    assert _blocking_gain("reference", "reference") is None  # a CPU's rows do not count beside a GPU's
    _recorded(monkeypatch, cost=[r for r in rows if r.get("preset") == "cpu"])
    assert [s.ratio for s in _blocking_gain("reference", "reference")] == [3.0]
    _recorded(
        monkeypatch, cost=[row("reference", 56, 3, 1.0, preset="smoke"), row("reference", 56, 1, 1.0, preset="smoke")]
    )
    assert _blocking_gain("reference", "reference") is None


def test_the_least_change_is_found():
    "Of shifts by one, two and three pixels, by the reference."
    x = torch.randn(1, 1, 24, 24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = [x.roll((n, n), (2, 3)) for n in range(4)]
    outs = [halo_attention_reference(y, y, y, 4, 2).roll((-n, -n), (2, 3)) for n, y in enumerate(moved)]
    inside = [out[:, :, 4:16, 4:16] for out in outs]
    least = min(rel_error(y, inside[0]) for y in inside[1:])
    assert _broken_equivariance()["by less"] == pytest.approx(least, rel=1e-6)


def test_other_rows_are_looked_up(monkeypatch):
    layers = [dict(mass=0.3, lanes=0.32), dict(mass=0.5, lanes=0.4)]
    stages = [dict(method=f"attention in {n} of 4", ms=ms) for n, ms in ((1, 2.0), (2, 4.0), (3, 6.0), (4, 8.0))]
    nets = [dict(net="zeros", before=layers, after=[dict(mass=1, lanes=0)])]
    nets += [
        dict(net="halo 2", before=[dict(mass=9, lanes=0)]),
        dict(net="zeros", preset="cpu", before=[dict(mass=8, lanes=0)]),
    ]
    _recorded(monkeypatch, nets=nets, stages=stages)
    assert _border_law() == pytest.approx(0.1)
    assert _stage_ratios() == {"stages 1 to 1": 8 / 6, "stages 1 to 2": 2.0, "stages 1 to 3": 4.0}
    stages[2]["ms"] = None
    assert _stage_ratios() is None


def test_claims_read_the_right_pair(monkeypatch):
    "On rows of which every pair and every field has a ratio or a difference of its own."
    accuracy = dict(zip(NETS, (0.40, 0.10, 0.20, 0.70, 0.11, 0.13, 0.17, 0.19, 0.23, 0.29, 0.31)))
    look = dict(before=[dict(mass=0.3, lanes=0.32)])
    nets = [dict(net=n, run=i, steps=5, accuracy=x) | look for n, x in accuracy.items() for i in range(3)]
    fields = ("ms_fwd", "ms_bwd", "peak_mb_bwd", "peak_mb_fwd")
    side = lambda by, method, *values: dict(method=method, **by) | dict(zip(fields, values))
    core, module = dict(problem="p"), dict(layout="l")
    tables = dict(
        nets=nets,
        module=[
            side(module, "ours", 1, 1, 1, 1),
            side(module, "timm", 2, 4, 5, 7),
            side(module, "ours, mask", 0.1, 0.1, 0.1, 0.1),
        ],
        core=[
            side(core, "ours", 1.0, 1.0, 1),
            side(core, "sdpa, unfolded", 6.0, 2.0, 1),
            side(core, "sdpa, unfolded, compiled", 3.0, 9.0, 1),
            side(core, "ours, no tables", 0.5, 0.5, 1),
            side(core, "flex, no tables, in blocks", 2.0, 3.0, 1),
            side(core, "sdpa, unfolded, no tables, compiled", 3.0, 4.0, 1),
        ],
        training=[
            dict(method=m, size=256, images_per_s=x, peak_mb=y)
            for m, x, y in (("ours", 50.0, 1.0), ("ours compiled", 90.0, 2.0), ("timm compiled", 45.0, 3.0))
        ],
        cost=[
            dict(method=m, side=8, block=b, ms=ms)
            for m, b, ms in (
                ("reference", 1, 8.0),
                ("reference", 5, 2.0),
                ("ours", 5, 0.1),
                ("ours, no tables", 5, 1.0),
                ("windows per pixel", 1, 3.0),
            )
        ],
    )
    _recorded(monkeypatch, **tables)
    found = [c.judge().measured for c in claims() if callable(c.measured)]
    points = [
        {n: round(i.mean) for n, i in m.items()}
        for m in found
        if isinstance(m, dict) and hasattr(list(m.values())[0], "mean")
    ]
    assert points == [
        {"halo 0": 30},
        {"1 to 2": 20, "2 to 3": 30},
        {"conv 1": 29, "conv 1-2": 27, "conv 1-3": 23},
        {"conv 1-2": 18},
        {"pool": 17},
        {"strided conv": 11},
        {"zeros": 21},
    ]
    assert [m[0].ratio for m in found if isinstance(m, list)] == [4.0, 3.0, 2.0, 3.0, 5.0, 3.0, 4.0, 5.0, 7.0, 2.0, 3.0]


def test_nothing_recorded_is_not_measured(monkeypatch):
    _recorded(monkeypatch)
    verdicts = [c.judge().verdict for c in claims()]
    assert verdicts == ["holds", "holds"] + ["not measured"] * 20 + ["out of reach here"] * 3

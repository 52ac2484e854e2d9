# Written from the test cells of nbs/6_beyond_tokens/csa.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnbook.csa.claims_study import _counts_match, _differences, ahead, detections
from attnbook.csa.detection_nets import (
    balanced_bce,
    balanced_regression,
    bmn_loss,
    bmn_losses,
    bmn_targets,
    decode_proposals,
)
from attnbook.csa.detection_reference import (
    average_precision,
    class_hits,
    detection_map,
    match_detections,
    redrawn_map,
    soft_nms_1d,
    temporal_iou,
)
from attnbook.csa.experiments_study import (
    DRAWS,
    METHODS,
    PRESETS,
    RECIPE,
    THRESHOLDS,
    Best,
    Experiments,
    detector,
    evaluate_detector,
    gate_looks,
    held_out_map,
    inputs_of,
    name_proposals,
    strict_and_loose,
)
from attnbook.csa.gate_kernels import gate_tiles
from attnbook.csa.matching_kernels import MATCH_LAUNCH, MatchLaunch, backward_steps, match_constants
from attnbook.csa.nets import ATTENTIONS, AXES, BMN, ClassSemanticsAttention, SqueezeExcite1d
from attnbook.csa.op import boundary_matching, csa_gate, gate_op, matching_op, semantic_summary, summary_op, taps_op
from attnbook.csa.reference import (
    FUSIONS,
    bin_weights,
    boundary_matching_reference,
    csa_gate_reference,
    matching_cost,
    sampling_mask,
    semantic_summary_reference,
    valid_proposals,
)
from attnbook.csa.streams_study import (
    DISTRACTORS,
    LABELS,
    SAMPLES,
    WINDOW,
    Streams,
    _pieces,
    people,
    snippet_windows,
    stitched_streams,
    trimmed_windows,
)
from attnbook.csa.study import OpenTADMatching, SampledMatching, claims
from attnbook.lab.data import skip_without
from attnbook.lab.results import record
from attnbook.lab.stats import Interval
from attnbook.lab.testing import (
    check_against_reference,
    check_gradients,
    check_opcheck,
    check_operation,
    check_raises,
    evaluate,
    rel_error,
)
from attnbook.lab.testing import device as device_under_test
from attnbook.layers import count_parameters


@pytest.mark.parametrize("legacy", [False, True], ids=["floor", "legacy"])
@pytest.mark.parametrize("N, J, extend", [(8, 3, 0.5), (5, 2, 0.0), (1, 1, 1.0), (4, 1, 0.5), (1, 3, 1.5)])
def test_hats_are_the_mask(N, J, extend, legacy):
    T, D = 11, 9
    ax = [torch.arange(k) for k in (N, D, T, T)]
    n, d, t, s = torch.meshgrid(*ax, indexing="ij")
    found = bin_weights(s, t, d, n, num_bins=N, samples_per_bin=J, reach=int(2 * extend), legacy_border=legacy)
    torch.testing.assert_close(found * (t + d < T), sampling_mask(T, D, N, J, extend, legacy))


def test_cost_counts_the_mask():
    cost = matching_cost(20, 9, 3, 5, 8)
    assert cost["proposals"] == 20 * 9 - 9 * 8 // 2
    assert round(cost["taps"] * cost["proposals"]) == int((sampling_mask(20, 9, 8) > 0).sum())
    assert matching_cost(128, 128)["proposals"] == 8256


def test_borders_differ_only_where_samples_lie_left_of_the_video():
    a, b = sampling_mask(16, 8, 6), sampling_mask(16, 8, 6, legacy_border=True)
    n, d, t, s = (a != b).nonzero().T
    assert len(t) and (t < (d + 1) / 2).all() and (s == 0).all() and float((a - b).abs().max()) < 1


def small(B=2, C=5, T=9, O=4, N=3, dtype=torch.float64, seed=0):
    "Inputs of boundary matching."
    g = torch.Generator().manual_seed(seed)
    make = lambda *size: torch.randn(size, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    return dict(x=make(B, C, T), weight=make(O, C, N) / (C * N) ** 0.5, bias=make(O) / 2)


def gates(B=2, C=5, T=9, dtype=torch.float64, seed=0, masked=True):
    "Inputs of the gate; the mask leaves out the end of the videos."
    g = torch.Generator().manual_seed(seed)
    make = lambda *size: torch.randn(size, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    i = dict(f=make(B, C, T), channel_logits=make(B, C), time_logits=make(B, T))
    if masked:
        keep = T - torch.arange(B) * T // (B + 1)
        i["mask"] = (torch.arange(T) < keep[:, None]).to(device_under_test())
    return i


def test_references_have_right_gradients():
    check_gradients(partial(boundary_matching_reference, max_duration=6), small())
    for fuse in FUSIONS:
        check_gradients(partial(csa_gate_reference, fuse=fuse), gates())


def test_constant_features_give_sums_of_weights():
    "In the interior every bin of x = 1 is 1, so the output is the sum of W; invalid cells are 0 despite the bias."
    i = small(T=30) | dict(x=torch.ones(1, 5, 30, dtype=torch.float64))
    i = {n: v.to(device_under_test()) for n, v in i.items()}
    out = boundary_matching_reference(**i, max_duration=6, activation="none")
    want = (i["weight"].sum((1, 2)) + i["bias"])[:, None].expand(-1, 6)
    torch.testing.assert_close(out[0, :, :, 12], want)
    assert (out[0, :, 5, 25:] == 0).all() and (out[0, :, 5, 24] != 0).all()


def test_gate_by_hand():
    f = torch.tensor([[[2.0, -4.0]]])
    run = lambda fuse: csa_gate_reference(
        f, torch.tensor([[math.log(3)]]), torch.tensor([[0.0, -math.log(3)]]), fuse=fuse
    )
    for fuse, want in (("sum", [2.5, -4.0]), ("mean", [1.25, -2.0]), ("max", [1.5, -3.0]), ("prod", [0.75, -0.75])):
        torch.testing.assert_close(run(fuse), torch.tensor([[want]]))


def test_matching_commutes_with_shifts():
    i = small(T=40)
    out, moved = (boundary_matching_reference(**(i | dict(x=i["x"].roll(k, 2))), max_duration=5) for k in (0, 3))
    torch.testing.assert_close(moved[..., 13:30], out[..., 10:27])


def test_shortest_and_longest_proposal():
    "d = 0 and two bins of one sample: X at t - 1/2 and t + 1/2. The longest has one valid cell; its middle bin lies at 2.5."
    x = torch.arange(6.0, dtype=torch.float64)[None, None] ** 2
    run = lambda *w: boundary_matching_reference(
        x, torch.tensor([[w]], dtype=torch.float64), max_duration=6, samples_per_bin=1, activation="none"
    )[0, 0]
    assert run(1.0, 10.0)[0, 2] == (1 + 4) / 2 + 10 * (4 + 9) / 2
    assert run(0.0, 1.0, 0.0)[5].tolist() == [(4 + 9) / 2, 0, 0, 0, 0, 0]


BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("shape", [(2, 5, 9), (1, 1, 1), (2, 35, 7), (1, 3, 127)], ids=str)
def test_gate_agrees(shape, fuse):
    op = partial(csa_gate, fuse=fuse)
    check_against_reference(
        partial(op, backend="triton"), partial(op, backend="torch"), gates(*shape, dtype=torch.float32)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_is_a_good_citizen(backend):
    op = partial(csa_gate, backend=backend)
    check_operation(
        op,
        partial(csa_gate, backend="torch"),
        gates(dtype=torch.float32),
        skip=("autocast",),
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
    )


@pytest.mark.parametrize("fuse", FUSIONS)
def test_gate_of_long_videos(fuse):
    "Programs that walk down all channels, beside programs that take some: 70 channels are three tiles."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gate_tiles.__globals__, "LONG", 100)
        patch.setitem(gate_tiles.__globals__, "ENOUGH", 3)
        for B, whole in ((2, True), (1, False)):
            i = gates(B, 70, 131, dtype=torch.float32)
            C, grid, _ = gate_tiles("backward", i["f"], fuse, True)
            assert (C.steps, C.whole, grid[1]) == ((3, True, 1) if whole else (1, False, 3))
            check_against_reference(
                partial(csa_gate, fuse=fuse, backend="triton"), partial(csa_gate, fuse=fuse, backend="torch"), i
            )


def test_gate_ties_share_the_gradient():
    i = gates(masked=False, dtype=torch.float32) | dict(
        channel_logits=torch.zeros(2, 5, device=device_under_test()),
        time_logits=torch.zeros(2, 9, device=device_under_test()),
    )
    check_against_reference(
        partial(csa_gate, fuse="max", backend="triton"), partial(csa_gate, fuse="max", backend="torch"), i
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_garbage_in_the_padding_changes_nothing(backend):
    i = gates(dtype=torch.float32)
    dirty = i | dict(f=torch.where(i["mask"][:, None], i["f"], math.nan))
    (clean_out,), clean = evaluate(partial(csa_gate, backend=backend), i)
    (out,), grads = evaluate(partial(csa_gate, backend=backend), dirty)
    assert torch.equal(out, clean_out) and (out.masked_select(~i["mask"][:, None]) == 0).all()
    for n, g in grads.items():
        assert torch.equal(g, clean[n]), n
    full = i | dict(mask=torch.ones_like(i["mask"]))
    assert torch.equal(csa_gate(**full, backend=backend), csa_gate(**(i | dict(mask=None)), backend=backend))


def test_gate_registered():
    i = gates(1, 2, 3, dtype=torch.float32)
    check_opcheck(
        gate_op, (*(i[n].requires_grad_() for n in ("f", "channel_logits", "time_logits")), i["mask"], "prod")
    )


def test_gate_refuses():
    i = gates(dtype=torch.float32)
    bad = [
        (dict(f=i["f"][0]), ValueError, "f must"),
        (dict(f=i["f"].long()), TypeError, "f must"),
        (dict(time_logits=i["time_logits"][:, :3]), ValueError, "time_logits"),
        (dict(channel_logits=i["channel_logits"][:, :3]), ValueError, "channel_logits"),
        (dict(mask=i["mask"].float()), TypeError, "mask"),
        (dict(mask=i["mask"][:1]), ValueError, "mask"),
        (dict(fuse="add"), ValueError, ("fuse", "sum", "add")),
        (dict(fuse=1), TypeError, "fuse"),
        (dict(backend="cuda"), ValueError, "backend"),
    ]
    check_raises(csa_gate, bad, **i)


def semantics(B=2, C=6, T=9, H=5, k=3, dtype=torch.float32, masked=True):
    "Inputs of the summary."
    g = torch.Generator().manual_seed(0)
    make = lambda *size: torch.randn(size, generator=g, dtype=torch.float64).to(device_under_test(), dtype)
    i = dict(
        r=make(B, C, T),
        weight=make(H, C, k) / (C * k) ** 0.5,
        bias=make(H) / 2,
        time_weight=make(1, H),
        time_bias=make(1),
    )
    return i | (dict(mask=gates(B, 1, T)["mask"]) if masked else {})


@pytest.mark.parametrize(
    "size", [dict(), dict(masked=False), dict(B=1, C=1, T=1, H=1, k=1), dict(C=35, T=37, H=17, k=5)], ids=str
)
def test_summary_agrees(size):
    check_against_reference(
        partial(semantic_summary, backend="triton"), semantic_summary_reference, semantics(**size), grad_tol=3e-5
    )


def test_the_mean_of_one_snippet_is_that_snippet():
    "And its gradient is whole; a text without any has the mean 0."
    i = semantics(B=2, T=9)
    i["mask"] = torch.zeros_like(i["mask"])
    i["mask"][0, 4] = True
    check_against_reference(partial(semantic_summary, backend="triton"), semantic_summary_reference, i, grad_tol=3e-5)
    for backend in BACKENDS:
        mean = semantic_summary(**i, backend=backend)[1]
        assert mean[0].any() and not mean[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_summary_is_a_good_citizen(backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the torch backend's convolution
    check_operation(
        partial(semantic_summary, backend=backend), semantic_summary_reference, semantics(B=1, H=3, T=5), grad_tol=3e-5
    )


def test_summary_registered():
    i = semantics(B=1, C=2, T=3, H=2)
    check_opcheck(summary_op, (*(t.requires_grad_() for n, t in i.items() if n != "mask"), i["mask"]))


def test_summary_refuses():
    i = semantics()
    bad = [
        (dict(r=i["r"][0]), ValueError, "r must"),
        (dict(weight=i["weight"][:, :2]), ValueError, "weight"),
        (dict(weight=i["weight"][..., :2]), ValueError, ("weight", "odd")),
        (dict(bias=i["bias"][:2]), ValueError, "bias"),
        (dict(time_weight=i["time_weight"][0]), ValueError, "time_weight"),
        (dict(time_bias=i["time_bias"][0]), ValueError, "time_bias"),
        (dict(mask=i["mask"].int()), TypeError, "mask"),
        (dict(backend="x"), ValueError, "backend"),
    ]
    check_raises(semantic_summary, bad, **i)


SHAPES = {
    "plain": (dict(), dict(max_duration=6)),
    "long": (dict(B=1, T=37, C=3, O=3), dict(max_duration=11)),
    "one bin": (dict(N=1), dict(max_duration=5, samples_per_bin=1)),
    "two samples": (dict(N=4), dict(max_duration=9, samples_per_bin=2)),
    "not extended": (dict(T=17), dict(max_duration=7, extend=0.0)),
    "extended twice": (dict(T=12), dict(max_duration=5, extend=1.0)),
    "longer than the video": (dict(T=5), dict(max_duration=9)),
    "one snippet": (dict(T=1, C=1, O=1), dict(max_duration=1)),
    "legacy": (dict(T=11), dict(max_duration=8, legacy_border=True)),
    "linear": (dict(), dict(max_duration=4, activation="none")),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHAPES)
def test_matching_agrees(case, backend):
    size, options = SHAPES[case]
    dtype = torch.float64 if backend == "torch" else torch.float32
    check_against_reference(
        partial(boundary_matching, **options, backend=backend),
        partial(boundary_matching_reference, **options),
        small(**size, dtype=dtype),
        grad_tol=1e-10 if backend == "torch" else 3e-5,
    )


def test_matching_without_bias():
    i = small(dtype=torch.float32)
    i.pop("bias")
    check_against_reference(
        partial(boundary_matching, max_duration=6, backend="triton"),
        partial(boundary_matching_reference, max_duration=6),
        i,
        grad_tol=3e-5,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_matching_is_a_good_citizen(backend):
    op, options = boundary_matching, dict(max_duration=5)
    check_operation(
        partial(op, **options, backend=backend),
        partial(boundary_matching_reference, **options),
        small(B=1, dtype=torch.float32),
        dtypes=(torch.float32, torch.float16),
        grad_tol=4e-3,
        tol=4e-3,
    )


def test_matching_in_bfloat16():
    check_against_reference(
        partial(boundary_matching, max_duration=5, backend="triton"),
        partial(boundary_matching_reference, max_duration=5),
        small(B=1),
        dtype=torch.bfloat16,
        grad_tol=3e-2,
    )


def test_matching_registered():
    i = small(B=1, C=2, T=4, O=2, N=2, dtype=torch.float32)
    check_opcheck(matching_op, (*(t.requires_grad_() for t in i.values()), 3, 3, 1, False, True))
    check_opcheck(taps_op, (torch.randn(1, 4, 2, 2, device=device_under_test(), requires_grad=True), 3, 3, 1, False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_is_channels_last_and_zero_where_not_valid(backend):
    i = small(dtype=torch.float32)
    out = boundary_matching(**i, max_duration=6, activation="none", backend=backend)
    assert out.shape == (2, 4, 6, 9) and out.is_contiguous(memory_format=torch.channels_last)
    assert (out[:, :, ~valid_proposals(9, 6)] == 0).all() and (out[:, :, valid_proposals(9, 6)] != 0).all()


def test_windows_of_several_loads():
    i, options = small(B=1, C=2, T=24, O=2, N=2, dtype=torch.float32), dict(max_duration=24)
    tile = MatchLaunch(2, 8, 16, 1, 16, 16, 4, 1)
    with MATCH_LAUNCH.trying("interpreter", "forward", 32, 16, tile):
        C, _ = match_constants("forward", torch.empty(1, 24, 2, 2), 24, 2, 2, 3, 1, False, True, True)
        found = boundary_matching(**i, **options, backend="triton")
    assert C.windows > 1 or device_under_test() != "cpu"
    assert rel_error(found, boundary_matching_reference(**i, **options)) < 1e-5


@pytest.mark.parametrize("T, N, extend", [(25, 5, 0.5), (40, 8, 1.0)], ids=["last bins", "first bins"])
def test_ranges_of_bins_leave_nothing_out(T, N, extend):
    "At the ends of a video bins are skipped, the last of late proposals, the first of long and early ones; none that counts."
    i, options = (
        small(B=1, C=1, T=T, O=1, N=N, dtype=torch.float32),
        dict(max_duration=T, activation="none", extend=extend),
    )
    i |= dict(x=torch.ones_like(i["x"]), weight=torch.ones_like(i["weight"]))
    want = boundary_matching_reference(**i, **options)
    assert rel_error(boundary_matching(**i, **options, backend="triton"), want) < 1e-6


def test_backward_steps_hold_every_pair_once():
    "Of every tile of bins and snippets, the proposals whose weights are not zero are in its list, each once."
    T, D, N = 21, 13, 6
    C, _ = match_constants("backward", torch.empty(1), D, N, 4, 3, 1, False, True, False)
    steps, first = backward_steps(T, D, C, torch.device("cpu"))
    need, tiles = sampling_mask(T, D, N) > 0, -(-T // C.rows)
    for tile, (a, b) in enumerate(zip(first.tolist(), first[1:].tolist())):
        listed = torch.zeros(D + C.durations, T + C.starts)
        for d, t in steps[a:b].tolist():
            listed[d : d + C.durations, t : t + C.starts] += 1
        group, row = divmod(tile, tiles)
        touched = need[group * C.group : (group + 1) * C.group, :, :, row * C.rows : (row + 1) * C.rows].any(3).any(0)
        assert listed.max() <= 1 and (listed[:D, :T][touched] == 1).all()


def test_matching_refuses():
    i = small(dtype=torch.float32)
    bad = [
        (dict(x=i["x"][0]), ValueError, "x must"),
        (dict(x=i["x"].long()), TypeError, "x must"),
        (dict(weight=i["weight"][:, :2]), ValueError, "weight"),
        (dict(weight=i["weight"].double()), TypeError, "weight"),
        (dict(bias=i["bias"][:1]), ValueError, "bias"),
        (dict(max_duration=0), ValueError, "max_duration"),
        (dict(max_duration=2.0), TypeError, "max_duration"),
        (dict(max_duration=2**22), ValueError, "float32"),
        (dict(samples_per_bin=0), ValueError, "samples_per_bin"),
        (dict(extend=0.3), ValueError, ("extend", "1/2")),
        (dict(extend=-1), ValueError, "extend"),
        (dict(legacy_border=1), TypeError, "legacy_border"),
        (dict(activation="gelu"), ValueError, ("activation", "relu")),
        (dict(backend="cpu"), ValueError, "backend"),
    ]
    check_raises(boundary_matching, bad, **i, max_duration=4)


def test_launch_widths():
    "Output channels that are no multiple of 16, and the old border, take tiles of at most 128 channels; others the table's."
    constants = lambda O, legacy: (
        match_constants("forward", torch.empty(1), 20, 4, O, 3, 1, legacy, True, True)[0].width
    )
    with MATCH_LAUNCH.trying("interpreter", "forward", 32, 16, MatchLaunch(4, 16, 32, 1, 16, 256, 4, 1)):
        if device_under_test() == "cpu":
            assert [constants(O, False) for O in (512, 200, 40, 16, 1)] == [256, 128, 64, 16, 16]
            assert constants(512, True) == 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "O, options",
    [(512, dict()), (200, dict()), (130, dict()), (512, dict(legacy_border=True)), (72, dict(legacy_border=True))],
    ids=["512", "200", "130", "512, legacy", "72, legacy"],
)
@pytest.mark.cuda
def test_matching_at_full_size(O, options, dtype):
    if device_under_test() != "cuda":
        return
    bound = torch.finfo(dtype).eps if dtype != torch.float32 else 2e-4
    for activation in ("none", "relu") if dtype == torch.float32 else ("none",):
        op = partial(boundary_matching, max_duration=50, activation=activation, **options)
        check_against_reference(
            partial(op, backend="triton"),
            partial(op, backend="torch"),
            small(B=2, C=60, T=100, O=O, N=20),
            dtype=dtype,
            tol=min(bound, 3e-2),
            grad_tol=bound,
        )


@pytest.mark.parametrize(
    "make, count",
    [
        (lambda: ClassSemanticsAttention(400, 256), 93_569),
        (lambda: ClassSemanticsAttention(2048, 256), 409_985),
        (lambda: ClassSemanticsAttention(64, 64, 16), 4_193),
        (lambda: SqueezeExcite1d(256), 33_088),
        (lambda: BMN(400), 2_782_980),
        (lambda: BMN(2048), 3_099_396),
        (lambda: BMN(400, proposal_channels=256), 4_978_564),
        (lambda: BMN(400, 128, "csa"), 2_782_980 + 93_569),
        (lambda: BMN(2048, 64, "csa"), 3_099_396 + 409_985),
    ],
    ids=[
        "CSA 400",
        "CSA 2048",
        "CSA 64",
        "SE",
        "BMN 400",
        "BMN 2048",
        "BMN, an earlier version",
        "csa_bmn_anet",
        "csa_bmn_thumos",
    ],
)
def test_parameter_counts(make, count):
    assert count_parameters(make) == count


@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("axes", AXES)
def test_starts_as_the_identity(axes, fuse):
    torch.manual_seed(0)
    r, f = torch.randn(2, 6, 9), torch.randn(2, 8, 9)
    layer = ClassSemanticsAttention(6, 8, 5, axes=axes, fuse=fuse)
    torch.testing.assert_close(layer(r, f), f)
    assert axes in repr(layer)


def trained_looking(axes="both", fuse="sum", kernel_size=3):
    "A layer whose gates are not at rest, in float64."
    torch.manual_seed(1)
    layer = ClassSemanticsAttention(6, 8, 5, kernel_size, axes, fuse).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_semantics_act_through_neighbours_and_the_mean(kernel_size):
    "A change at snippet 6 changes the logits of snippets within the kernel, and all channels."
    layer, r = trained_looking(kernel_size=kernel_size), torch.randn(1, 6, 13, dtype=torch.float64)
    c, t = layer.logits(r, 8)
    moved = r.clone()
    moved[:, :, 6] += 1
    c2, t2 = layer.logits(moved, 8)
    near = (torch.arange(13) - 6).abs() <= kernel_size // 2
    assert ((t != t2)[0] == near).all() and (c != c2).all()


def test_gates_ignore_features():
    "No gradient flows from the gates to the features: with fixed gates the output is linear in them."
    layer, r = trained_looking(), torch.randn(2, 6, 9, dtype=torch.float64)
    f = torch.randn(2, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(r, 3 * f), 3 * layer(r, f))
    assert rel_error(layer(f[:, :6], f), layer(3 * f[:, :6], f)) > 1e-2


@pytest.mark.parametrize("axes", AXES)
def test_padding_is_ignored(axes):
    "Garbage in the padding changes nothing, and shorter videos give what they give alone."
    layer = trained_looking(axes)
    r, f = torch.randn(2, 6, 9, dtype=torch.float64), torch.randn(2, 8, 9, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    want = layer(r, f, mask)
    dirty = layer(torch.where(mask[:, None], r, 1e9), torch.where(mask[:, None], f, math.nan), mask)
    assert torch.equal(dirty, want) and (want[1, :, 6:] == 0).all()
    torch.testing.assert_close(want[1:, :, :6], layer(r[1:, :, :6], f[1:, :, :6]))
    torch.testing.assert_close(layer(r, f, torch.ones_like(mask)), layer(r, f))


def test_squeeze_excite():
    torch.manual_seed(0)
    se, x = SqueezeExcite1d(8).double(), torch.randn(2, 8, 7, dtype=torch.float64)
    gate = se.excite(se.squeeze(x.mean(2)).relu()).sigmoid()
    torch.testing.assert_close(se(x), x * gate[:, :, None])
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    torch.testing.assert_close(se(torch.where(mask[:, None], x, 5.0), mask)[1, :, :4], se(x[1:, :, :4])[0])


def test_modules_refuse():
    r, f = torch.randn(2, 6, 9), torch.randn(2, 8, 9)
    check_raises(
        ClassSemanticsAttention,
        [
            (dict(kernel_size=2), ValueError, "kernel_size"),
            (dict(axes="time"), ValueError, ("axes", "temporal")),
            (dict(fuse="add"), ValueError, "fuse"),
            (dict(hidden=0), ValueError, "hidden"),
        ],
        semantic_channels=6,
        channels=8,
    )
    check_raises(
        ClassSemanticsAttention(6, 8),
        [
            (dict(semantics=r[:, :, :5]), ValueError, "semantics"),
            (dict(features=f[:, :4]), ValueError, "features"),
            (dict(mask=torch.ones(2, 9)), TypeError, "mask"),
        ],
        semantics=r,
        features=f,
    )
    with pytest.raises(ValueError, match="reduction"):
        SqueezeExcite1d(10)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_network(attention):
    torch.manual_seed(0)
    make = dict(channels=8, proposal_channels=4, match_channels=8, map_channels=4, num_bins=3, hidden=4)
    net, x = BMN(8, 5, attention, **make).to(device_under_test()), torch.randn(2, 8, 9, device=device_under_test())
    start, end, maps = net(x)
    assert start.shape == end.shape == (2, 9) and maps.shape == (2, 2, 5, 9)
    assert min(t.min() for t in (start, end, maps)) >= 0 and max(t.max() for t in (start, end, maps)) <= 1
    (start.sum() + end.sum() + maps.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_all_attentions_but_se_start_alike():
    "With the same encoder and heads, CSA and scSE are BMN before training."
    make = dict(channels=8, proposal_channels=4, match_channels=8, map_channels=4, num_bins=3, hidden=4)
    plain, x = BMN(8, 5, **make), torch.randn(2, 8, 9)
    for attention in ("scse", "csa"):
        net = BMN(8, 5, attention, **make)
        net.load_state_dict(plain.state_dict(), strict=False)
        for a, b in zip(net(x), plain(x)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("attention", ["se", "scse", "csa", "csa+se"])
def test_masks_reach_every_attention(attention):
    "What stands far beyond the end of a video changes no feature of it."
    torch.manual_seed(0)
    net = BMN(8, 5, attention, channels=8, proposal_channels=4, match_channels=8, map_channels=4, num_bins=3, hidden=4)
    for p in [*net.parameters()]:
        nn.init.normal_(p, std=0.5)
    x, mask = torch.randn(1, 8, 16), torch.arange(16)[None] < 7
    other = torch.where(torch.arange(16) < 11, x, 5.0)
    torch.testing.assert_close(net.features(x, mask=mask)[..., :7], net.features(other, mask=mask)[..., :7])
    assert rel_error(net.features(x)[..., :7], net.features(other)[..., :7]) > 1e-4


def test_weights_start_as_xavier_says():
    "Uniform up to sqrt(6 / (fan in + fan out)), the layer of boundary matching as a convolution over bins; no biases."
    torch.manual_seed(0)
    net = BMN(8, 5, "csa", channels=16, proposal_channels=8, match_channels=32, map_channels=8, num_bins=6)
    bound = (6 / (8 * 6 + 32 * 6)) ** 0.5
    assert 0.97 * bound < float(net.weight.detach().abs().max()) <= bound
    first = net.encoder[0][0].weight
    assert float(first.detach().abs().max()) <= (6 / (first[0].numel() + len(first) * 3)) ** 0.5 * 1.0001
    biases = [p for n, p in net.named_parameters() if n.endswith("bias") and not n.startswith("csa")]
    assert len(biases) > 8 and not any(b.any() for b in biases)


def test_semantics_reach_the_gate_only():
    torch.manual_seed(0)
    make = dict(channels=8, proposal_channels=4, match_channels=8, map_channels=4, num_bins=3, hidden=4)
    net, x = BMN(8, 5, "csa", semantic_channels=3, **make), torch.randn(2, 8, 9)
    for p in net.csa.parameters():
        nn.init.normal_(p)
    a, b = (net.features(x, torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(s))) for s in (0, 1))
    assert rel_error(a, b) > 1e-3
    torch.testing.assert_close(a == 0, b == 0)  # gates are positive: they silence nothing that speaks


def by_hand():
    truth = [(torch.tensor([[0.0, 10], [20, 30]]), torch.tensor([3, 3]))]
    found = [(torch.tensor([[1.0, 10], [0, 9], [20, 28]]), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([3, 3, 3]))]
    return truth, found


def test_map_by_hand():
    truth, found = by_hand()
    result = detection_map(truth, found, (0.5, 0.85, 0.95))
    assert result == pytest.approx({0.5: (1 + 2 / 3) / 2, 0.85: 0.5, 0.95: 0.0})


def test_map_at_its_ends():
    truth, _ = by_hand()
    perfect = [(truth[0][0], torch.tensor([0.9, 0.8]), truth[0][1])]
    assert detection_map(truth, perfect) == dict.fromkeys((0.3, 0.4, 0.5, 0.6, 0.7), 1.0)
    nothing = [(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.long))]
    assert set(detection_map(truth, nothing).values()) == {0.0}
    double = lambda score: [
        (torch.cat([truth[0][0], truth[0][0][:1]]), torch.tensor([0.9, 0.5, score]), torch.tensor([3, 3, 3]))
    ]
    assert detection_map(truth, double(0.1))[0.5] == 1.0 and detection_map(truth, double(0.7))[0.5] == pytest.approx(
        (1 + 2 / 3) / 2
    )
    other = [(t, s, c + 1) for t, s, c in perfect]
    assert set(detection_map(truth, other).values()) == {0.0}, "another class is no hit"
    more = [(torch.cat([t, t]), torch.cat([s, s + 1]), torch.cat([c, c + 1])) for t, s, c in perfect]
    assert detection_map(truth, more)[0.5] == 1.0, "classes that do not occur count nowhere"


def test_map_over_videos_and_classes():
    "A detection of one video does not claim an instance of another; classes have equal weight."
    segment = torch.tensor([[0.0, 10]])
    truth = [(segment, torch.tensor([0])), (segment, torch.tensor([1])), (segment, torch.tensor([1]))]
    one = lambda c, score: (segment, torch.tensor([score]), torch.tensor([c]))
    assert detection_map(truth, [one(0, 0.5), one(1, 0.5), one(0, 0.9)])[0.5] == pytest.approx((0.5 + 0.5) / 2)
    with pytest.raises(ValueError, match="3 videos"):
        detection_map(truth, [one(0, 0.5)])


def test_equal_scores_keep_their_order():
    truth = [(torch.tensor([[0.0, 10]]), torch.tensor([0]))]
    pair = torch.tensor([[0.0, 10], [50, 60]])
    run = lambda order: detection_map(truth, [(pair[order], torch.tensor([0.5, 0.5]), torch.tensor([0, 0]))])[0.5]
    assert run([0, 1]) == 1.0 and run([1, 0]) == 0.5


def test_best_free_instance_is_claimed():
    iou = torch.tensor([[0.6, 0.9], [0.2, 0.8], [0.7, 0.1]])
    assert match_detections(iou, (0.5, 0.65)).tolist() == [[True, False, True], [True, False, True]]
    assert match_detections(torch.zeros(3, 0), (0.5,)).tolist() == [[False] * 3]
    assert match_detections(torch.tensor([[0.5]]), (0.5, 0.505)).tolist() == [[True], [False]]  # exactly enough


def test_envelope():
    assert average_precision(torch.tensor([False, True, True]), 2) == pytest.approx(2 / 3)
    assert average_precision(torch.tensor([True, False, True]), 4) == pytest.approx((1 + 2 / 3) / 4)
    assert average_precision(torch.zeros(0, dtype=torch.bool), 4) == average_precision(torch.tensor([False]), 0) == 0


def test_videos_drawn_anew():
    "A draw is the mAP of the videos as often as they were drawn; what all videos share has no spread."
    g = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.rand(*s, generator=g)
    truth, found = [], []
    for _ in range(7):
        start = rand(3) * 10
        truth.append((torch.stack([start, start + 2], 1), torch.tensor([0, 1, 1])))
        near = torch.cat([start, start + 1.5 * rand(3)])
        found.append((torch.stack([near, near + 2], 1), rand(6), torch.tensor([0, 1, 1, 0, 1, 0])))
    draws = redrawn_map(class_hits(truth, found), draws=3, seed=5)
    times = np.random.default_rng(5).multinomial(7, np.full(7, 1 / 7), size=3)
    for value, n in zip(draws.tolist(), times):
        again = [i for i, k in enumerate(n) for _ in range(k)]
        want = detection_map([truth[i] for i in again], [found[i] for i in again])
        assert value == pytest.approx(np.mean(list(want.values())), abs=1e-6)
    assert draws.std() > 0 and redrawn_map(class_hits(truth[:1] * 5, found[:1] * 5), draws=4).std() < 1e-12
    rare = class_hits([(truth[0][0], torch.tensor([2, 1, 1])), *truth[1:]], found)
    assert redrawn_map(rare, draws=40).isfinite().all()


def test_temporal_iou():
    a, b = torch.tensor([[0.0, 4], [4, 6], [1, 1]]), torch.tensor([[0.0, 4], [2, 6]])
    torch.testing.assert_close(temporal_iou(a, b), torch.tensor([[1, 1 / 3], [0, 0.5], [0, 0]]))
    assert (temporal_iou(torch.full((1, 2), math.nan), b) == 0).all()
    with pytest.raises(ValueError, match="end after"):
        temporal_iou(a, torch.tensor([[3.0, 2.0]]))


def some_segments(n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    start = torch.rand(n, generator=g) * 10
    return torch.stack([start, start + 0.5 + torch.rand(n, generator=g) * 4], 1), torch.rand(n, generator=g) + 0.01


def test_soft_nms_at_its_ends():
    "A tiny sigma is hard suppression of whatever overlaps; a huge one only sorts; what does not overlap keeps its score."
    segments, scores = some_segments()
    for a, b in zip(soft_nms_1d(segments, scores, sigma=1e-9), soft_nms_1d(segments, scores, sigma=0, method="hard")):
        live = soft_nms_1d(segments, scores, sigma=0, method="hard")[1] > 0
        torch.testing.assert_close(a[live], b[live])
    kept, s = soft_nms_1d(segments, scores, sigma=1e9)
    torch.testing.assert_close(s, scores.sort(descending=True).values)
    apart = torch.tensor([[0.0, 1], [2, 3], [1, 2]])
    torch.testing.assert_close(soft_nms_1d(apart, torch.tensor([0.2, 0.5, 0.3]))[1], torch.tensor([0.5, 0.3, 0.2]))


def test_soft_nms_by_hand():
    "Overlap 1/2 with the best: its score falls by exp(-1/4 / 0.5), below the third's."
    segments = torch.tensor([[0.0, 2], [0, 1], [5, 6]])
    kept, s = soft_nms_1d(segments, torch.tensor([0.9, 0.8, 0.6]), sigma=0.5)
    torch.testing.assert_close(s, torch.tensor([0.9, 0.6, 0.8 * math.exp(-0.5)]))
    torch.testing.assert_close(kept, segments[[0, 2, 1]])
    assert (soft_nms_1d(segments, torch.tensor([0.9, 0.8, 0.6]), min_score=0.5, max_num=5)[1] > 0).tolist() == [
        True,
        True,
        False,
    ]
    assert len(soft_nms_1d(segments, torch.tensor([0.9, 0.8, 0.6]), max_num=2)[1]) == 2


def test_soft_nms_of_a_batch_is_that_of_each():
    batch = [some_segments(seed=s) for s in range(3)]
    found = soft_nms_1d(*(torch.stack(x) for x in zip(*batch)), max_num=7)
    for i, one in enumerate(batch):
        for a, b in zip(found, soft_nms_1d(*one, max_num=7)):
            torch.testing.assert_close(a[i], b)
    assert (found[1].diff(dim=1) <= 0).all()


def test_detection_refuses():
    segments, scores = some_segments()
    check_raises(
        soft_nms_1d,
        [
            (dict(sigma=0.0), ValueError, "sigma"),
            (dict(sigma=-1.0), ValueError, "sigma"),
            (dict(method="linear"), ValueError, "method"),
            (dict(scores=scores[:3]), ValueError, "scores"),
            (dict(max_num=0), ValueError, "max_num"),
        ],
        segments=segments,
        scores=scores,
    )


def test_targets_by_hand():
    "An instance [2.25, 5.0] of 8 snippets: starts within [0.75, 3.75], ends within [3.5, 6.5]."
    nan = math.nan
    start, end, overlap = bmn_targets(torch.tensor([[[2.25, 5.0], [nan, nan]], [[nan, nan], [nan, nan]]]), 8, 4)
    torch.testing.assert_close(start[0], torch.tensor([0.25, 1, 1, 0.75, 0, 0, 0, 0]))
    torch.testing.assert_close(end[0], torch.tensor([0, 0, 0, 0.5, 1, 1, 0.5, 0]))
    assert overlap[0, 2, 2] == pytest.approx(2.75 / 3) and overlap[0, 0, 4] == pytest.approx(1 / 2.75)
    assert overlap.shape == (2, 4, 8) and (overlap[0, 3, 5:] == 0).all()
    assert (start[1] == 0).all() and (overlap[1] == 0).all()


def test_balanced_bce():
    p, y = torch.tensor([0.9, 0.2, 0.4, 0.3]), torch.tensor([True, False, False, False])
    want = -(math.log(0.9) + (math.log(0.8) + math.log(0.6) + math.log(0.7)) / 3) / 2
    assert float(balanced_bce(p, y)) == pytest.approx(want, rel=1e-5)
    assert float(balanced_bce(p, torch.ones(4, dtype=torch.bool))) == pytest.approx(-float(p.log().mean()), rel=1e-5)
    assert float(balanced_bce(p, y, torch.tensor([True, True, False, False]))) == pytest.approx(
        -(math.log(0.9) + math.log(0.8)) / 2, rel=1e-5
    )


def test_regression_draws_equal_numbers():
    "100 good, 1000 middling, 10000 poor proposals whose errors are 1, 2 and 3: the mean tells how many were drawn of each."
    overlap = torch.cat([torch.full((100,), 0.9), torch.full((1000,), 0.5), torch.full((10000,), 0.1)])
    error = torch.cat([torch.full((100,), 1.0), torch.full((1000,), 2.0), torch.full((10000,), 3.0)])
    g, valid = torch.Generator().manual_seed(0), torch.ones(11100, dtype=torch.bool)
    mean = np.mean([float(balanced_regression(overlap + error, overlap, valid, g)) for _ in range(30)])
    assert mean == pytest.approx((1 + 4 + 9) / 3, rel=0.03)
    assert balanced_regression(overlap, torch.zeros_like(overlap), valid, g) == 0
    assert balanced_regression(overlap + error, overlap, overlap < 0.2, g) == 0


def test_perfect_outputs_are_found_again():
    "Outputs equal to the targets decode to the instances, and their loss is below that of anything else tried."
    truth = torch.tensor([[[1.0, 5.0], [7.0, 10.0]]])
    start, end, overlap = bmn_targets(truth, 12, 6)
    onset = lambda at: torch.full((1, 12), 0.1).index_fill(1, torch.tensor(at), 0.9)
    start_at, end_at = onset([1, 7]), onset([4, 9])
    segments, scores = soft_nms_1d(
        *decode_proposals(start_at, end_at, overlap[:, None].expand(-1, 2, -1, -1)), max_num=2
    )
    assert sorted(segments[0].tolist()) == truth[0].tolist() and (scores > 0.6).all()
    hard = torch.stack([(overlap > 0.9).float(), overlap], 1)
    best = bmn_loss(((start > 0.5).float(), (end > 0.5).float(), hard), (start, end, overlap))
    assert best < 1e-4 < bmn_loss((start * 0 + 0.5, end * 0 + 0.5, hard * 0 + 0.5), (start, end, overlap))
    some, seeded = (start * 0 + 0.4, end * 0 + 0.3, hard * 0.5 + 0.2), lambda: torch.Generator().manual_seed(0)
    parts = bmn_losses(some, (start, end, overlap), seeded())
    total = parts["boundaries"] + parts["good"] + 5 * parts["overlap"]
    torch.testing.assert_close(bmn_loss(some, (start, end, overlap), seeded()), total)
    assert parts["overlap"] > 0.01 and float(parts["boundaries"]) == pytest.approx(
        float(balanced_bce(some[0], start > 0.5) + balanced_bce(some[1], end > 0.5))
    )


def test_decoding_respects_candidates():
    maps = torch.ones(1, 2, 3, 5)
    segments, scores = decode_proposals(
        torch.tensor([[0.1, 0.8, 0.1, 0.1, 0.2]]), torch.tensor([[0.1, 0.1, 0.9, 0.1, 0.1]]), maps
    )
    live = {tuple(s) for s, x in zip(segments[0].tolist(), scores[0]) if x > 0}
    assert live == {(0.0, 3.0), (1.0, 3.0), (4.0, 5.0)}
    assert segments[0, 0].tolist() == [1.0, 3.0] and float(scores[0, 0]) == pytest.approx(0.8 * 0.9)
    plateau = torch.tensor([[0.1, 0.8, 0.6, 0.3, 0.1]])  # 0.6 is no maximum but above half of the largest
    segments, scores = decode_proposals(plateau, torch.tensor([[0.1, 0.1, 0.9, 0.1, 0.1]]), maps)
    assert {s for s, x in zip(segments[0, :, 0].tolist(), scores[0]) if x > 0} == {0.0, 1.0, 2.0}


def test_streams():
    skip_without("seglearn")
    a, b = (stitched_streams((1, 2), 6, snippets=96, seed=5) for _ in range(2))
    assert a.x.tobytes() == b.x.tobytes() and a.x.shape == (6, 96 * 16, 6) and np.isfinite(a.x).all()
    assert set(a.person) <= {1, 2} and not (stitched_streams((1, 2), 6, snippets=96, seed=6).x == a.x).all()
    for s, c, d in zip(a.segments, a.labels, a.distractors):
        both = np.concatenate([s, d])
        both = both[both[:, 0].argsort()]
        assert len(s) == len(c) >= 1 and (both[1:, 0] >= both[:-1, 1]).all() and both.min() > 0 and both.max() < 96
        assert ((s[:, 1] - s[:, 0]) * 0.32 >= 3).all() and ((s[:, 1] - s[:, 0]) * 0.32 <= 12).all()
    assert not any(map(len, stitched_streams((1,), 3, snippets=96, distractors=False).distractors))


def test_every_second_pair_touches():
    "And a stream has every sample of its plan; two of the same exercise are always apart."
    for touching, low, high in ((0.0, 0, 0), (0.5, 0.25, 0.55), (1.0, 0.7, 1)):
        rng, touch, pairs = np.random.default_rng(0), 0, 0
        for _ in range(60):
            plan = _pieces(rng, 2048, True, touching)
            assert sum(size for _, size in plan) == 2048 and plan[0][0] == plan[-1][0] == "rest"
            assert min(size for kind, size in plan if kind == "rest") >= 50
            follow = [(a, b) for (a, _), (b, _) in zip(plan, plan[1:]) if "rest" not in (a, b)]
            assert all(a != b for a, b in follow)
            touch, pairs = touch + len(follow), pairs + sum(kind != "rest" for kind, _ in plan) - 1
        assert low <= touch / pairs <= high


def test_streams_are_quiet_where_nothing_happens():
    "Rotation within instances is far above that in rests, and joints do not jump."
    skip_without("seglearn")
    s = stitched_streams((3,), 4, snippets=96, distractors=False, touching=0.0, seed=1)
    for x, spans in zip(s.x, s.segments):
        at = (np.arange(len(x)) / SAMPLES)[:, None]
        inside, near = (
            ((at > spans[:, 0]) & (at < spans[:, 1])).any(1),
            ((at > spans[:, 0] - 1) & (at < spans[:, 1] + 1)).any(1),
        )
        speed = np.abs(x[:, 3:]).mean(1)
        assert speed[inside].mean() > 5 * speed[~near].mean()


def test_joints_do_not_show(monkeypatch):
    "Of recordings that are one everywhere, and a sensor without noise, every stream is one everywhere: fades sum to one."
    names = [(p, arm, e) for p in (1, 2) for arm in (0, 1) for e in (*LABELS, *DISTRACTORS)]
    bank, noise = {k: np.ones((1000, 6)) for k in names}, {k[:2]: np.zeros((50, 6)) for k in names}
    monkeypatch.setitem(stitched_streams.__globals__, "watch_bank", lambda: (bank, noise))
    s = stitched_streams((1, 2), 9, snippets=96, seed=2)
    np.testing.assert_allclose(s.x[..., :3], 1, atol=1e-6)
    assert set(s.person) == {1, 2} and s.x[..., 3:].max() <= 1 + 1e-6


def test_people_are_in_one_split():
    skip_without("seglearn")
    tested = []
    for fold in range(5):
        found = people(fold)
        assert sorted(p for part in found.values() for p in part) == list(range(1, 11))
        assert [len(part) for part in found.values()] == [6, 2, 2]
        tested += found["test"]
    assert sorted(tested) == list(range(1, 11)) and people(5) == people(0)
    with pytest.raises(ValueError, match="who"):
        stitched_streams((11,), 1)


def test_windows_lie_around_their_snippets():
    x = torch.arange(5 * SAMPLES, dtype=torch.float32)[None, :, None].expand(-1, -1, 6)
    w = snippet_windows(x)
    assert (
        w.shape == (1, 5, 6, WINDOW)
        and w[0, 2, 0, 24:40].tolist() == list(range(32, 48))
        and w[0, 0, 0, :24].sum() == 0
    )


def test_windows_across_a_joint_are_left_out():
    "An instance of class 3 from snippet 10 to 20 of 40: windows whose middle is within two snippets of a joint count for nothing."
    spans = [np.array([[10.0, 20.0]])]
    one = Streams(np.zeros((1, 640, 6), np.float32), spans, [np.array([3])], [np.zeros((0, 2))], np.array([4]))
    x, y = trimmed_windows(one)
    assert len(x) == len(y) == 32 and int((y == 3).sum()) == 6 and int((y == 5).sum()) == 26
    unlabelled = Streams(one.x, [np.zeros((0, 2))], [np.zeros(0, int)], spans, one.person)
    assert set(trimmed_windows(unlabelled)[1].tolist()) == {5} and len(trimmed_windows(unlabelled)[1]) == 32


def test_trimmed_windows_know_what_they_show():
    skip_without("seglearn")
    s = stitched_streams((1, 4), 4, snippets=96, seed=2)
    x, y = trimmed_windows(s)
    assert len(x) == len(y) and set(y.tolist()) <= set(range(6)) and 5 in y
    _, who = trimmed_windows(s, "person")
    assert set(who.tolist()) == {p - 1 for p in s.person}
    only = Streams(s.x[:1], s.segments[:1], s.labels[:1], s.distractors[:1], s.person[:1])
    _, y = trimmed_windows(only)
    assert set(y.tolist()) == {*s.labels[0].tolist(), 5}


def test_names():
    chances = torch.tensor([[[0.9, 0.1, 0.0, 0.0], [0.7, 0.3, 0.0, 0.0], [0.0, 0.2, 0.8, 0.0]]])
    ((s, v, c),) = name_proposals(
        torch.tensor([[[0.0, 2.0], [2.0, 3.0], [0.0, 1.0]]]), torch.tensor([[1.0, 0.5, 0.0]]), chances
    )
    assert c.tolist() == [0, 1, 2, 1] and s.tolist() == [[0, 2], [0, 2], [2, 3], [2, 3]]
    torch.testing.assert_close(v, torch.tensor([0.8, 0.2, 0.4, 0.1]))


def test_gate_looks_see_what_is_there():
    skip_without("seglearn")
    s = stitched_streams((1, 2), 12, snippets=96, seed=4)
    middle, action = np.arange(96) + 0.5, torch.zeros(12, 96)
    for i, spans in enumerate(s.segments):
        for a, b in spans:
            action[i, (middle > a) & (middle < b)] = 1
    classes = torch.stack([torch.as_tensor(np.isin(np.arange(5), c)) for c in s.labels]).float()
    found = gate_looks(classes, action, s)
    assert found["gate_action"] == pytest.approx(1) and found["gate_distractor"] < 0
    assert found["gate_shares_class"] > found["chance_shares_class"]


def test_wide_has_as_many_parameters():
    make = lambda method: count_parameters(lambda: detector(64, method, width=0.25, bins=8, duration=16))
    assert abs(make("wide BMN") / make("CSA") - 1) < 0.02 < abs(make("BMN") / make("CSA") - 1)
    assert make("untrained") == make("person") == make("CSA") > make("k=1")


def test_perfect_detector_scores_one():
    "A network that returns what the targets say, on streams whose classes are known, has a mAP near 1."
    skip_without("seglearn")
    s = stitched_streams((1, 2), 6, snippets=64, seed=3)
    middle = np.arange(64) + 0.5
    chances = torch.zeros(6, 64, 6)
    chances[..., 5] = 1
    for i in range(6):
        for (a, b), c in zip(s.segments[i], s.labels[i]):
            inside = torch.as_tensor((middle > a) & (middle < b))
            chances[i, inside] = F.one_hot(torch.tensor(int(c)), 6).float()
    start, end, overlap = bmn_targets(s.padded(), 64, 40)
    edge = lambda k: (
        torch.stack([sum((-(torch.arange(64.0) - p).square()).exp() for p in spans[:, k] - k) for spans in s.segments])
        + 0.01
    )

    class Oracle(nn.Module):
        csa = None

        def forward(self, x, r):
            return edge(0), edge(1), overlap[:, None].expand(-1, 2, -1, -1) ** 4

    test = {"x": chances.mT, "semantics": chances.mT, "chances": chances, "streams": s}
    found = evaluate_detector(Oracle(), test, keep=50, device="cpu")
    assert found["map_50"] > 0.95 and found["map_30"] >= found["map_50"] >= found["map_70"] >= found["map_95"]
    assert found["proposal_map"] > 0.7 and found["naming_map"] > 0.95 and found["thumos_map"] >= found["mean_map"] > 0.7
    assert np.mean(found["redrawn"]) == pytest.approx(found["mean_map"], abs=0.05) and len(found["redrawn"]) == DRAWS
    assert held_out_map(Oracle(), test, keep=50, device="cpu") == pytest.approx(found["mean_map"])
    nobody = dict(test, chances=torch.zeros_like(chances).index_fill(2, torch.tensor([5]), 1.0))
    assert evaluate_detector(Oracle(), nobody, keep=50, device="cpu")["naming_map"] == 0


def test_the_best_look_is_kept():
    "Weights come back from the look that measured most, the first of equals, whatever came after."
    net, values = nn.Linear(1, 1), iter([0.3, 0.7, 0.7, 0.1])
    best = Best(lambda net: next(values))
    for k in range(4):
        nn.init.constant_(net.weight, k)
        assert best(net) == (0.3, 0.7, 0.7, 0.1)[k]
    best.restore(net)
    assert float(net.weight.detach()) == 1 and best.at == 2 and best.value == 0.7 and best.looks == 4


def test_a_detector_is_chosen_on_people_held_out(monkeypatch):
    skip_without("seglearn")
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["smoke"] | dict(streams=(6, 4), steps=4))
    lab = Experiments("tiny", "cpu")
    seen = {s: set(lab.of(False)[s]["streams"].person.tolist()) for s in ("train", "val", "test")}
    assert not seen["train"] & seen["val"] and not seen["val"] & seen["test"]
    row = lab.run("BMN")
    assert [k for k, _ in row["curve"]] == [2, 4] and row["recipe"] == RECIPE
    assert row["chosen"] == max(row["curve"], key=lambda e: e[1])[0]


def test_means_over_thresholds():
    each = [k / 100 for k in range(len(THRESHOLDS))]  # 0 at 0.3, 13 at 0.95
    found = strict_and_loose(each)
    assert found["mean_map"] == pytest.approx(np.mean(range(4, 14)) / 100)
    assert found["thumos_map"] == pytest.approx(np.mean([0, 2, 4, 6, 8]) / 100)


def test_inputs_of_methods():
    part = {n: torch.full((2, 3, 4), float(i)) for i, n in enumerate(("class", "person", "untrained"))}
    seen = {m: inputs_of(part, how) for m, how in METHODS.items()}
    assert seen["CSA"]["x"].mean() == seen["CSA"]["semantics"].mean() == 0
    assert seen["untrained"]["x"].mean() == 0 and seen["untrained"]["semantics"].mean() == 2
    assert seen["person"]["semantics"].mean() == 1 and seen["blind CSA"]["x"].mean() == 2
    assert seen["blind CSA"]["semantics"].mean() == 0 and seen["blind CSA, person"]["semantics"].mean() == 1
    assert seen["BMN reads both"]["x"].shape == (2, 6, 4) and seen["BMN reads both"]["x"][:, 3:].mean() == 0
    for method in METHODS:
        net = detector(8, method, width=1 / 32, bins=2, duration=4)
        x = torch.randn(1, 16 if method == "BMN reads both" else 8, 6)
        assert net(x, torch.randn(1, 8, 6))[2].shape == (1, 2, 4, 6)


@pytest.mark.parametrize("peer", [SampledMatching, OpenTADMatching], ids=lambda peer: peer.__name__)
def test_peers_are_the_same_function(peer):
    "On valid cells: so that times are compared between equals."
    dtype = torch.float64 if peer is SampledMatching else torch.float32
    i = small(T=12, N=4, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the peer's convolution
        want, got = boundary_matching_reference(**i, max_duration=7), peer(12, 7, 4, dtype, device_under_test())(**i)
    valid = valid_proposals(12, 7)
    assert got.shape == want.shape and rel_error(got[:, :, valid], want[:, :, valid]) < 1e-5


def test_the_layer_compiles_whole():
    "One graph with the gate's operation in it, forward and backward, and the same numbers."
    torch._dynamo.reset(), torch.manual_seed(0)
    layer = ClassSemanticsAttention(8, 16, hidden=8, backend="triton").to(device_under_test())
    r, f = (torch.randn(2, c, 12, device=device_under_test(), requires_grad=True) for c in (8, 16))
    whole = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    found, want = (
        (torch.autograd.grad(y.square().sum(), [r, f, *layer.parameters()]), y) for y in (whole(r, f), layer(r, f))
    )
    torch.testing.assert_close(found[1], want[1])
    for a, b in zip(found[0], want[0]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def intervals(*triples):
    return {f"over {i}": Interval(mean, half, n) for i, (mean, half, n) in enumerate(triples)}


@pytest.mark.parametrize(
    "found, verdict",
    [
        (((2, 1, 5),), "holds"),
        (((2, 3, 5),), "not measured"),
        (((0.1, 0.5, 5),), "does not hold here"),
        (((-2, 1, 5),), "does not hold here"),
        (((0.5, 0.4, 5),), "holds"),
        (((2, 1, 5), (1, 0.5, 5)), "holds"),
        (((2, 1, 5), (1, 3, 5)), "holds in part"),
        (((2, 1, 5), (-4, 3, 5)), "does not hold here"),
        (((2, 1, 5), (0, 0.5, 5)), "does not hold here"),
        (((2, 3, 5), (-2, 4, 5)), "not measured"),
        (((2, math.inf, 1),), "not measured"),
        (((2, 1, 5), (2, math.inf, 1)), "not measured"),
    ],
    ids=str,
)
def test_ahead(found, verdict):
    assert ahead()(intervals(*found))[0] == verdict


def made_up(tmp_path, monkeypatch, **means):
    "Rows of a gpu run in which each method has these mAPs by seed."
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
    for method, values in means.items():
        for run, value in enumerate(values):
            record(
                "csa",
                "detection",
                key=("method", "run", "steps"),
                device="a GPU",
                preset="gpu",
                method=method.replace("_", " "),
                run=run,
                steps=10,
                mean_map=value / 100,
                gate_action=value / 100,
                gate_distractor=0.1,
                gate_boundary=0.0,
            )


def judged(statement):
    return next(c for c in claims() if c.statement.startswith(statement)).judge()


def test_claims_about_detectors(tmp_path, monkeypatch):
    """Every claim with the methods that it must compare: gains of five points where it holds, and none over the one method that says no.

    Seeds differ by a point, differences by a tenth.
    """
    base = dict.fromkeys(
        "BMN,SE,scSE,wide BMN,channel only,snippet only,k=1,untrained,person,blind BMN,blind CSA person,blind scSE,BMN reads both".split(
            ","
        ),
        40,
    )
    best = base | {"CSA": 45, "CSA+SE": 50, "blind CSA": 45}

    def verdicts(means):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        names = {n.replace("CSA person", "CSA, person"): m for n, m in means.items()}
        made_up(folder, monkeypatch, **{n: [m - 1, m + 0.1, m + 1 + len(n) / 100] for n, m in names.items()})
        return {c.statement: c.judge().verdict for c in claims() if c.statement in needs}

    needs = {  # claim -> methods that CSA (or the first of them) has to beat
        "CSA improves BMN": ("BMN",),
        "and does so beyond its parameters": ("wide BMN",),
        "CSA is better than squeeze-and-excitation": ("SE",),
        "CSA is better than the same layer fed with the detector's own features (scSE)": ("scSE",),
        "CSA and squeeze-and-excitation complement each other": ("CSA", "SE"),
        "Both gates are better than one": ("channel only", "snippet only"),
        "The local temporal axis matters": ("k=1",),
        "It is class semantics that help": ("untrained", "person", "scSE"),
        "A detector that knows no classes is helped by gates that do": ("blind BMN", "blind CSA person", "blind scSE"),
        "and more than by reading the class features itself": ("BMN reads both",),
    }
    assert set(verdicts(best).values()) == {"holds"} and len(verdicts(best)) == len(needs)
    for rival in (*base, "CSA"):
        found = verdicts(best | {rival: 60})
        for statement, rivals in needs.items():
            if rival != "CSA" or statement.startswith("CSA and"):
                want = "does not hold here" if rival in rivals else "holds"
                assert found[statement] == want, (rival, statement)


def test_claims_without_all_methods(tmp_path, monkeypatch):
    made_up(
        tmp_path,
        monkeypatch,
        BMN=(40, 41, 42),
        SE=(46, 47, 48),
        CSA=(45, 46, 47),
        scSE=(46, 44, 48),
        untrained=(44, 45, 46.1),
        person=(40, 41, 42.2),
    )
    assert judged("CSA improves BMN").verdict == "holds" and judged("CSA improves BMN").measured[
        "over BMN"
    ].mean == pytest.approx(5)
    assert judged("CSA is better than squeeze").verdict == "does not hold here"
    assert judged("It is class semantics").verdict == "holds in part", "undecided against scSE"
    assert judged("Both gates").verdict == "not measured" and judged("and does so beyond").verdict == "not measured"
    for method, run in ((m, r) for m in ("BMN", "CSA") for r in range(3)):  # a shorter training counts nowhere
        row = dict(method=method, run=run, steps=5, mean_map=0.99 if method == "BMN" else 0.01)
        record("csa", "detection", key=("method", "run", "steps"), device="a GPU", preset="gpu", **row)
    assert judged("CSA improves BMN").verdict == "holds"


@pytest.mark.parametrize(
    "action, distractor, verdict",
    [
        (0.5, 0.1, "holds"),
        (-0.5, 0.4, "holds"),
        (0.5, -0.6, "holds in part"),
        (0.2, 0.0, "holds in part"),
        (0.05, 0.0, "does not hold here"),
    ],
)
def test_claim_about_the_snippet_gate(tmp_path, monkeypatch, action, distractor, verdict):
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
    for method, a in (("CSA", action), ("scSE", 0.0)):
        row = dict(
            method=method, run=0, steps=10, mean_map=0.5, gate_action=a, gate_distractor=distractor, gate_boundary=0.9
        )
        record("csa", "detection", key=("method", "run", "steps"), device="a GPU", preset="gpu", **row)
    assert judged("Gates over snippets").verdict == verdict


def test_rows_of_the_first_streams_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
    rows = [
        dict(steps=160, map_30=0.9),
        dict(steps=20, map_30=0.5, thumos_map=0.4),
        dict(steps=10, map_30=0.5, thumos_map=0.4),
    ]
    for row in rows:
        record(
            "csa", "detection", key=("method", "run", "steps"), device="a GPU", preset="gpu", method="CSA", run=0, **row
        )
    assert [r["steps"] for r in detections()] == [20, 10] and [r["steps"] for r in detections(longest=True)] == [20]


def test_streams_drawn_anew_widen_the_interval(tmp_path, monkeypatch):
    "Seeds agree to the last digit, but the streams do not: a difference of two points with a deviation of one and a half."
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
    g, noise = np.random.default_rng(0), np.random.default_rng(1).normal(size=100)
    for method, mean, luck in (("BMN", 40.0, 0 * noise), ("CSA", 42.0, 1.5 * noise / noise.std(ddof=1))):
        for run in range(3):
            row = dict(method=method, run=run, steps=10, mean_map=(mean + g.normal() / 1e4) / 100)
            row["redrawn"] = ((mean + luck) / 100).tolist()
            record("csa", "detection", key=("method", "run", "steps"), device="a GPU", preset="gpu", **row)
    found = judged("CSA improves BMN")
    assert found.verdict == "not measured" and found.measured["over BMN"].half == pytest.approx(1.96 * 1.5, 0.01)
    assert _differences("CSA", "BMN", steps=10) == found.measured and _differences("CSA", "BMN", steps=20) is None
    for wrong in ("SE", "wide BMN"):
        assert _differences("CSA", wrong) is None


def test_claims_about_time(tmp_path, monkeypatch):
    "Forward three times at worst and nine at best, backward ten times; a fifth of the memory, later a hundredth."
    monkeypatch.setenv("ATTNBOOK_RESULTS", str(tmp_path))

    def write(bench, method, T, **fields):
        record("csa", bench, key=("method", "T"), device="a GPU", preset="gpu", method=method, B=1, T=T, D=T, **fields)

    for T, theirs in ((128, 9.0), (256, 3.0)):
        write("matching", "ours", T, ms_fwd=1.0, ms_bwd=1.0, peak_mb_fwd=20.0)
        write("matching", "sampled", T, ms_fwd=theirs, ms_bwd=10.0, peak_mb_fwd=100.0)
        write("matching", "sampled, compiled", T, ms_fwd=2 * theirs, ms_bwd=20.0, peak_mb_fwd=200.0)
        for bench, peer in (("gate", "torch, compiled"), ("layer", "torch, compiled")):
            write(bench, "ours", T, ms_fwd=1.0, ms_bwd=1.0)
            write(bench, peer, T, ms_fwd=0.9, ms_bwd=1.2)
        write("gate", "SE's product, compiled", T, ms_fwd=0.1, ms_bwd=0.1)
    for method, ms in (("ours", 1.0), ("sampled", 1.2)):
        write("training", method, 128, ms=ms)
    found = judged("Boundary matching is faster")
    assert found.verdict == "holds in part" and "worst 3x" in found.reason and "best 9x" in found.reason
    assert judged("The same, forward and backward").verdict == "holds" and "worst 6.5x" in judged("The same,").reason
    assert judged("and takes less memory").verdict == "holds in part"
    assert judged("The fused gate").verdict == "holds", "backward makes up for forward, and SE computes something else"
    assert judged("The whole layer").verdict == "holds" and judged("A training step").verdict == "holds in part"


def test_counts_claim():
    assert judged("Parameters").verdict == "holds" and _counts_match({"CSA": 1}) == "does not hold here"

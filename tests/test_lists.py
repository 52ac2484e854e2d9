# Written from the test cells of nbs/1_foundations/12_lists.ipynb by `attnbook export`. Do not edit.
import math

import pytest
import torch

from attnbook.lab.testing import check_opcheck, check_raises, check_writes_everything, rel_error
from attnbook.lab.testing import device as device_under_test
from attnbook.lists import find_slots, select_largest, select_largest_op, sum_slots


def _hard_rows(n):
    "Six rows for each of two heads, five of them hard."
    s = torch.randn(1, 2, 6, n, generator=torch.Generator().manual_seed(0)).to(device_under_test())
    s[0, 0, 1] = s[0, 0, 1].round()                      # ties at the limit
    s[0, 0, 2] = torch.where(s[0, 0, 2] > 0, 0.0, -0.0)  # these are equal
    s[0, 0, 3, ::3] = s[0, 0, 3].max()                   # more candidates than lanes
    s[0, 0, 4, 5:] = -math.inf                           # too few
    s[0, 0, 5], s[0, 1, 0] = -math.inf, -s[0, 1, 0].abs() - 1e30
    return s


SELECTIONS = [(64, 7), (200, 9), (150, 90)] + [(200, 90), (5000, 300), (9000, 2500)] * (device_under_test() == "cuda")


@pytest.mark.parametrize("n, w", SELECTIONS)
def test_selection_is_exact(n, w):
    s = _hard_rows(n)
    assert torch.equal(select_largest(s, w, backend="triton"), select_largest(s, w, backend="torch"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ties_go_to_the_earlier(backend):
    s = torch.tensor([[[[1.0, 2, 2, 2, 0, 2]]]], device=device_under_test())
    assert select_largest(s, 3, backend=backend).tolist() == [[[[1, 2, 3]]]]


def test_the_selection_of_the_library():
    check_opcheck(select_largest_op, (_hard_rows(40), 5))
    bad = [(dict(count=0), ValueError, ["count", "0"]), (dict(count=2.0), TypeError, ["count", "2.0"])]
    check_raises(select_largest, bad, scores=torch.zeros(2, 3), count=2)


@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("often", [1, 3, 9, 20], ids="{} more slots".format)
def test_folding(often, mean):
    "Row 3 stands in `often` lists more than chance puts it there, row 5 in none."
    g = torch.Generator().manual_seed(0)
    index = torch.randint(-1, 40, (2, 2, 20, 4), generator=g).int()
    index[:, :, :often, 0] = 3
    index = index.masked_fill(index == 5, -1).to(device_under_test())
    xs = [torch.randn(2, 2, 80, d, generator=g).to(index.device) for d in (16, 5)]
    counts, table = find_slots(index, 40)
    flat = index.flatten(2).long()
    assert torch.equal(counts, (flat[:, :, None] == torch.arange(40, device=flat.device)[:, None]).sum(-1).int())
    for x, y in zip(xs, sum_slots(xs, index, counts, table, mean)):
        at = torch.where(flat < 0, 40, flat)[..., None].expand_as(x)
        want = x.new_zeros(2, 2, 41, x.shape[3]).scatter_add(2, at, x)[:, :, :40]
        want = want / counts.clamp_min(1)[..., None] if mean else want
        assert rel_error(y, want) < 1e-6 and (y[:, :, 5] == 0).all()


def test_folding_has_one_order():
    g = torch.Generator().manual_seed(1)
    index = torch.randint(0, 9, (1, 1, 30, 6), generator=g).int().to(device_under_test())
    x = torch.randn(1, 1, 180, 16, generator=g).to(index.device)
    first, *more = (sum_slots([x], index, *find_slots(index, 9))[0] for _ in range(3))
    assert all(torch.equal(first, y) for y in more)
    check_writes_everything(lambda x: sum_slots([x], index, *find_slots(index, 9))[0], (x,), grad=False)

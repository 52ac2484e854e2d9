# Written from the test cells of nbs/1_foundations/10_layers.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math

import pytest
import torch
from torch import nn

from attnbook.layers import DropPath, Mlp, count_parameters, drop_path_rates, init_linear, sinusoids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rate", [0.25, 0.5, 0.9])
def test_drop_path_scales_what_it_keeps(rate, dtype):
    torch.manual_seed(0)
    x = torch.randn(4000, 2, 3).to(dtype).requires_grad_()
    y = DropPath(rate).train()(x)
    kept = (y != 0).flatten(1).any(1)
    assert y.dtype == dtype
    assert abs(float(kept.float().mean()) - (1 - rate)) < 4 * math.sqrt(
        rate * (1 - rate) / 4000
    )  # four standard deviations
    assert torch.equal(y, torch.where(kept[:, None, None], x / (1 - rate), torch.zeros_like(x)))  # whole samples
    y.float().sum().backward()
    torch.testing.assert_close(x.grad.float(), kept[:, None, None].expand(x.shape) / (1 - rate), rtol=1e-2, atol=0)


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    y = DropPath(0.25).train()(torch.ones(20000, 1))
    assert abs(float(y.mean()) - 1) < 0.02 and set(y.unique().tolist()) == {0.0, float(torch.tensor(1) / 0.75)}


@pytest.mark.parametrize(
    "drop", [DropPath(0.9).eval(), DropPath(0.0).train(), DropPath().train()], ids=["eval", "rate 0", "default"]
)
def test_drop_path_is_the_identity(drop):
    x = torch.randn(8, 3)
    assert drop(x) is x and not drop.state_dict()


def test_drop_path_drops_what_overflowed():
    torch.manual_seed(0)
    y = DropPath(0.5).train()(torch.full((64, 3), math.inf))
    assert set(y.flatten().tolist()) == {0.0, math.inf}


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, math.nan])
def test_drop_path_refuses(rate):
    with pytest.raises(ValueError, match="rate must be from 0 to below 1"):
        DropPath(rate)


def test_drop_path_rates():
    assert drop_path_rates(0.2, 5) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert drop_path_rates(0.2, 1) == [0] and drop_path_rates(0.2, 0) == []


def test_mlp():
    torch.manual_seed(0)
    mlp, x = Mlp(6, 10).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    assert {n: tuple(p.shape) for n, p in mlp.named_parameters()} == {
        "fc1.weight": (10, 6),
        "fc1.bias": (10,),
        "fc2.weight": (6, 10),
        "fc2.bias": (6,),
    }
    inner = x @ mlp.fc1.weight.T + mlp.fc1.bias
    gelu = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    torch.testing.assert_close(mlp(x), gelu @ mlp.fc2.weight.T + mlp.fc2.bias, rtol=1e-12, atol=1e-12)


def test_init_linear():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 5, bias=False), nn.Conv2d(3, 4, 3), nn.LayerNorm(5))
    before = {n: p.clone() for n, p in net.named_parameters()}
    net.apply(init_linear).requires_grad_(False)
    assert float(net[0].weight.std()) == pytest.approx(0.02, rel=0.02) and abs(float(net[0].weight.mean())) < 1e-3
    assert float(net[1].weight.std()) == pytest.approx(0.02, rel=0.1) and not net[0].bias.any()
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters() if n[0] in "23")


@pytest.mark.parametrize("dim", [1, 2, 3, 6, 7])
def test_sinusoids(dim):
    half, table = dim // 2, sinusoids(3, 4, dim)
    assert table.shape == (4, dim) and not table[:, 2 * half :].any()
    for i in range(half):
        x = torch.arange(3, 7) * 1e4 ** (-i / max(half - 1, 1))
        torch.testing.assert_close(table[:, i], x.sin(), rtol=0, atol=1e-5)
        torch.testing.assert_close(table[:, half + i], x.cos(), rtol=0, atol=1e-5)
    assert torch.equal(sinusoids(0, 9, dim)[3:7], table)


def test_count_parameters():
    net = nn.Sequential(nn.Linear(4, 3), nn.Embedding(7, 4), nn.LayerNorm(4))
    net.append(net[0])  # shared
    net[1].weight.requires_grad_(False)
    assert count_parameters(net) == 15 + 28 + 8 and count_parameters(net, trainable=True) == 15 + 8
    assert count_parameters(lambda: Mlp(10**5, 10**6)) == 2 * 10**11 + 11 * 10**5  # 800 GB

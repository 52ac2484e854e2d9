# Written from the test cells of nbs/1_foundations/14_vit.ipynb by `attnbook export`. Do not edit.
# fmt: off
import math
import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnbook.lab.testing import check_against_reference, check_gradients, check_raises, make_qkv, rel_error
from attnbook.lab.testing import device as device_under_test
from attnbook.layers import count_parameters
from attnbook.vit.inside import attention_maps, layer_statistics
from attnbook.vit.nets import Attention, Block, ViT
from attnbook.vit.patches import PatchDrop, PatchEmbed, from_patches, mix_patches, shuffle_patches, to_patches
from attnbook.vit.reference import head_statistics_reference, resize_positions
from attnbook.vit.statistics import head_statistics
from attnbook.vit.weights import (
    PARAMETERS,
    VARIANTS,
    deit,
    deit_base,
    deit_small,
    deit_tiny,
    load_weights,
    parameter_formula,
    vit_base_patch16_224,
    vit_from_state,
    vit_large_patch16_224,
    vit_small_patch16_224,
    vit_tiny_patch16_224,
)


def test_positions_are_stretched():
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(4.0), indexing="ij")
    pos = torch.cat([torch.full((2, 3), 7.0), torch.stack([y, x, torch.ones_like(y)], -1).flatten(0, 1)])[None]
    new = resize_positions(pos, (6, 4), (12, 8), 2)
    assert torch.equal(new[:, :2], pos[:, :2])
    image = new[0, 2:].unflatten(0, (12, 8))
    want = (torch.arange(12.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(image[4:8, 4, 0], want[4:8])
    torch.testing.assert_close(image[6, 3:5, 1], want[3:5])
    torch.testing.assert_close(image[..., 2], torch.ones(12, 8))
    assert resize_positions(pos, (6, 4), (6, 4), 2) is pos
    assert resize_positions(pos.bfloat16(), (6, 4), (3, 3), 2).dtype == torch.bfloat16


def test_positions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="pos_embed must have 1 . 3 x 3 positions, not 9"):
        resize_positions(torch.zeros(1, 9, 2), (3, 3), (4, 4))


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_statistics_of_uniform_attention(prefix):
    T = prefix + 6
    k = torch.randn(1, 2, T, 4)
    s = head_statistics_reference(torch.zeros_like(k), k, grid_size=(2, 3), num_prefix_tokens=prefix)
    torch.testing.assert_close(s.entropy, torch.full((1, 2, T), math.log(T)))
    torch.testing.assert_close(s.received, torch.ones(1, 2, T))
    assert s.prefix_mass.shape == (1, 2, T, prefix) and torch.allclose(s.prefix_mass, torch.tensor(1 / T))
    corner = (0 + 1 + 2 + 1 + math.sqrt(2) + math.sqrt(5)) / T  # patch (0, 0), row by row
    torch.testing.assert_close(s.distance[0, 0, 0], torch.tensor(corner))


def test_statistics_of_a_head_that_looks_at_one_patch():
    k = torch.zeros(1, 1, 13, 4)
    k[..., 1 + 7, 0] = 1e4  # patch (1, 3) of a 3 x 4 grid
    q = torch.zeros_like(k)
    q[..., 0] = 1
    s = head_statistics_reference(q, k, grid_size=(3, 4))
    assert s.entropy.abs().max() == 0 and s.received[0, 0, 8] == 13 and s.received.sum() == 13
    assert s.distance[0, 0, 0] == math.sqrt(10) and s.distance[0, 0, 7] == 0 and s.prefix_mass.max() == 0


SHAPES = {  # grid, prefix, heads, kv_heads, rows
    "3 x 4": ((3, 4), 1, 2, 2, 5),
    "5 x 3, 4 in front": ((5, 3), 4, 2, 1, 4),
    "1 x 7": ((1, 7), 0, 1, 1, 100),
    "one patch": ((1, 1), 1, 1, 1, None),
    "a row at a time": ((2, 3), 1, 3, 3, 1),
}


@pytest.mark.parametrize("grid, prefix, heads, kv_heads, rows", SHAPES.values(), ids=SHAPES)
def test_statistics_agree_with_the_reference(grid, prefix, heads, kv_heads, rows):
    q, k, _ = make_qkv(2, heads, prefix + math.prod(grid), 8, kv_heads=kv_heads)
    kw = dict(grid_size=grid, num_prefix_tokens=prefix, scale=0.7)
    check_against_reference(
        lambda q, k: tuple(head_statistics(q, k, rows=rows, **kw)),
        lambda q, k: tuple(head_statistics_reference(q, k, **kw)),
        (q, k),
        tol=1e-5,
        floor=1e-3,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_16_bit_tensors_are_exact(dtype):
    "Nothing but q and k is rounded."
    q, k, _ = make_qkv(1, 2, 10, 8, dtype=dtype)
    got, want = (f(q, k, grid_size=(3, 3)) for f in (head_statistics, head_statistics_reference))
    for a, b in zip(got, want):
        assert a.dtype == torch.float32 and rel_error(a, b) < 1e-5


def test_statistics_take_the_lse():
    q, k, _ = make_qkv(1, 2, 13, 8, dtype=torch.float64)
    lse = torch.logsumexp(q @ k.transpose(-1, -2) * 8**-0.5, -1)
    kw = dict(grid_size=(3, 4), rows=5)
    for a, b in zip(head_statistics(q, k, lse=lse, **kw), head_statistics(q, k, **kw)):
        assert rel_error(a, b) < 1e-12
    other = head_statistics(q, k, lse=lse + 1, **kw)
    assert rel_error(other.received, head_statistics(q, k, **kw).received / math.e) < 1e-12  # it is used


def test_statistics_have_gradients():
    q, k, _ = make_qkv(1, 2, 10, 4)
    check_gradients(lambda q, k: tuple(head_statistics(q, k, grid_size=(3, 3), rows=4)), (q, k))


class Largest(TorchDispatchMode):
    "Remembers how many numbers the largest tensor has that any operation returns."

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.numbers = max(self.numbers, t.numel())
        return out


def test_no_buffer_of_all_pairs():
    q, k = (torch.randn(1, 1, 401, 4, requires_grad=True) for _ in range(2))
    with Largest() as largest:
        s = head_statistics(q, k, grid_size=(20, 20), rows=16)
        (s.entropy.sum() + s.received.pow(2).sum() + s.distance.sum()).backward()
    assert largest.numbers < 0.1 * 401**2 and q.grad.abs().sum() > 0
    with Largest() as largest:
        head_statistics_reference(q, k, grid_size=(20, 20))
    assert largest.numbers >= 401**2  # the control


def test_what_statistics_refuse():
    q, k, _ = make_qkv(1, 2, 10, 4)
    check_raises(
        head_statistics,
        [
            (dict(grid_size=(3, 4)), ValueError, ["grid_size", "9 patches", "3 x 4"]),
            (dict(num_prefix_tokens=-1), ValueError, ["num_prefix_tokens", "-1"]),
            (dict(num_prefix_tokens=2), ValueError, ["grid_size", "8 patches"]),
            (dict(k=k[:, :, :9]), ValueError, ["k", "(1, kv_heads, 10, 4)"]),
            (dict(k=k.double()), TypeError, ["k", "float64"]),
            (dict(lse=torch.zeros(1, 2, 9)), ValueError, ["lse"]),
            (dict(rows=0), ValueError, ["rows", "0"]),
            (dict(scale="x"), TypeError, ["scale"]),
        ],
        q=q,
        k=k,
        grid_size=(3, 3),
    )


def test_patches_there_and_back():
    x = torch.arange(2 * 3 * 8 * 12.0).reshape(2, 3, 8, 12)
    patches = to_patches(x, (4, 3))
    assert patches.shape == (2, 8, 3, 4, 3) and torch.equal(patches[1, 5], x[1, :, 4:8, 3:6])
    assert torch.equal(from_patches(patches, (2, 4)), x)
    with pytest.raises(ValueError, match="patch_size 4 x 4, not .8, 13."):
        to_patches(torch.zeros(1, 1, 8, 13), 4)
    with pytest.raises(ValueError, match="grid_size must have 8 patches, not 2 x 3"):
        from_patches(patches, (2, 3))


def test_the_embedding_is_a_linear_map_of_patches():
    embed, x = PatchEmbed((4, 3), 3, 5), torch.randn(2, 3, 8, 12)
    want = to_patches(x, (4, 3)).flatten(2) @ embed.proj.weight.flatten(1).T + embed.proj.bias
    torch.testing.assert_close(embed(x), want)
    with pytest.raises(ValueError, match="multiples of patch_size 4 x 3, not .9, 12."):
        embed(torch.zeros(1, 3, 9, 12))


def test_dropped_patches():
    torch.manual_seed(0)
    x = torch.arange(2 * 12.0).reshape(2, 12, 1).expand(-1, -1, 3)
    drop = PatchDrop(0.3, num_prefix_tokens=2).train()
    y = drop(x)
    assert y.shape == (2, 2 + 7, 3) and torch.equal(y[:, :2], x[:, :2])
    assert (y[:, 1:, 0].diff(dim=1) > 0).all() and (y[0, 2:, 0] != y[1, 2:, 0] - 12).any()  # in order; sets differ
    assert drop.eval()(x) is x and PatchDrop().train()(x) is x and PatchDrop(0.99, 2).train()(x).shape[1] == 3
    with pytest.raises(ValueError, match="rate must be from 0 to below 1, not 1"):
        PatchDrop(1.0)


def test_shuffled_patches_are_the_same_patches():
    x = torch.randn(3, 2, 8, 12)
    y = shuffle_patches(x, 4, generator=torch.Generator().manual_seed(0))
    a, b = (to_patches(t, 4).flatten(2).sum(-1).sort(1).values for t in (x, y))
    torch.testing.assert_close(a, b)
    assert not torch.equal(x, y) and torch.equal(y, shuffle_patches(x, 4, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0, None])
def test_mixed_patches(share):
    x = torch.arange(4.0)[:, None, None, None].expand(4, 2, 8, 8) * 1.0
    mixed, partner, shares = mix_patches(x, 2, share=share, generator=torch.Generator().manual_seed(3))
    assert sorted(partner.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(mixed.mean((1, 2, 3)), (1 - shares) * torch.arange(4.0) + shares * partner)
    if share is not None:
        assert torch.allclose(shares, torch.tensor(share))
    else:
        assert len(set(shares.tolist())) > 1
    assert to_patches(mixed, 2).flatten(2).std(-1).max() == 0  # whole patches are taken


def _attention(dim=12, heads=3, **kw):
    torch.manual_seed(0)
    attn = Attention(dim, heads, **kw).double()
    for p in attn.parameters():
        nn.init.normal_(p, std=0.3)
    return attn, torch.randn(2, 7, dim, dtype=torch.float64)


def test_gates_switch_heads_off():
    attn, x = _attention()
    want = attn(x)
    assert torch.equal(attn(x, None, torch.ones(3)), want)
    off, per_image = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    got, mixed = attn(x, None, off), attn(x, None, per_image)
    torch.testing.assert_close(mixed[0], got[0])
    with torch.no_grad():
        attn.proj.weight[:, 4:8] = 0
    torch.testing.assert_close(got, attn(x))
    torch.testing.assert_close(attn(x, None, torch.zeros(3)), attn.proj.bias.expand_as(x))
    assert not torch.allclose(mixed[1], got[1])


def test_gates_have_gradients():
    attn, x = _attention()
    check_gradients(lambda gates: attn(x, None, gates), (torch.tensor([1.0, 0.5, 2.0]),))


def test_another_attention_is_plugged_in():
    from attnbook.engine import attention

    attn, x = _attention()
    same = Attention(12, 3, attend=attention).double()
    same.load_state_dict(attn.state_dict())
    torch.testing.assert_close(same(x), attn(x))
    near = Attention(12, 3, attend=partial(attention, window_size=1)).double()
    near.load_state_dict(attn.state_dict())
    torch.testing.assert_close(near(x), attn.merge(attn.project(x)[2]))  # each token sees itself
    with pytest.raises(ValueError, match="attn_drop must be 0"):
        Attention(12, 3, attend=attention, attn_drop=0.1)
    with pytest.raises(ValueError, match="num_heads must divide dim = 12, not 5"):
        Attention(12, 5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_blocks_can_be_finished_by_others(qk_norm):
    torch.manual_seed(0)
    attn = Attention(12, 3, qk_norm=qk_norm)
    block, x = Block(12, attn, init_values=0.3).eval(), torch.randn(2, 5, 12)
    q, k, v = attn.project(block.norm1(x))
    out = attn.merge((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v)
    torch.testing.assert_close(block.finish(x, out), block(x))


def test_dropout_drops():
    torch.manual_seed(0)
    x = torch.randn(64, 5, 12)
    for how in (dict(proj_drop=0.5), dict(drop_path=0.5)):
        block = Block(12, Attention(12, 3), **how)
        assert torch.equal(block.eval()(x), block(x)) and not torch.equal(block.train()(x), block(x))
    stays = (Block(12, Attention(12, 3), drop_path=0.9).train()(x) == x).flatten(1).all(1)
    assert 0.6 < stays.float().mean() < 1  # 0.81 of the samples
    attn = Attention(12, 3, attn_drop=0.5)
    assert torch.equal(attn.eval()(x), attn(x)) and not torch.equal(attn.train()(x), attn(x))


def _small(seed=0, **kw):
    "A small model with all parameters random."
    torch.manual_seed(seed)
    model = ViT(**dict(img_size=16, patch_size=4, num_classes=5, dim=24, depth=3, num_heads=3) | kw)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.to(device_under_test()).eval()


def _images(batch=2, size=(16, 16), channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=g).to(device_under_test())


FORMS = {
    "plain": {},
    "registers": dict(reg_tokens=2),
    "no_embed_class": dict(no_embed_class=True, reg_tokens=1),
    "mean": dict(global_pool="avg"),
    "no class token": dict(class_token=False),
    "scales": dict(init_values=0.1),
    "qk_norm": dict(qk_norm=True),
    "distilled": dict(distilled=True),
    "no bias": dict(qkv_bias=False),
    "features": dict(num_classes=0),
    "wide patches": dict(patch_size=(8, 4)),
}


@pytest.mark.parametrize("kw", FORMS.values(), ids=FORMS)
def test_gates_of_the_model(kw):
    model, x = _small(**kw), _images()
    want = model(x)
    assert want.shape == (2, kw.get("num_classes", 5) or 24) and want.isfinite().all()
    gates = torch.ones(3, 3, device=x.device)
    assert torch.equal(model(x, gates), want)
    gates[1, 2] = 0
    off = model(x, gates)
    assert not torch.allclose(off, want, atol=1e-4)
    each = torch.stack([torch.ones_like(gates), gates])
    torch.testing.assert_close(model(x, each), torch.stack([want[0], off[1]]), atol=1e-5, rtol=1e-4)


def test_blocks_can_be_run_in_part():
    model, x, seen = _small(), _images(), []
    tokens, grid = model.embed(x)
    first = model.run_blocks(tokens, grid, stop=2, look=lambda i, block, t: seen.append((i, t)))
    torch.testing.assert_close(model.norm(model.run_blocks(first, grid, start=2)), model.forward_features(x))
    assert [i for i, _ in seen] == [0, 1] and torch.equal(seen[0][1], tokens) and tokens.shape == (2, 17, 24)


def test_other_sizes_of_images():
    model, x = _small(reg_tokens=1), _images(size=(24, 8))
    assert model(x).shape == (2, 5)
    want = resize_positions(model.pos_embed, (4, 4), (6, 2), 2)
    assert torch.equal(model.positions((6, 2)), want)
    with pytest.raises(ValueError, match="multiples of patch_size 4 x 4, not .16, 18."):
        model(_images(size=(16, 18)))


def test_a_permutation_of_patches_permutes_the_features():
    "Without positions a transformer does not know where a patch was."
    model, x = _small(no_embed_class=True), _images()
    with torch.no_grad():
        model.pos_embed.zero_()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).to(x.device)
    moved = from_patches(to_patches(x, 4)[:, order], (4, 4))
    a, b = model.forward_features(x), model.forward_features(moved)
    torch.testing.assert_close(a[:, 1:][:, order], b[:, 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a[:, 0], b[:, 0], atol=1e-4, rtol=1e-4)


def test_checkpointing_changes_nothing():
    model, x = _small().train(), _images()
    grads = []
    for on in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(on)
        model(x).sum().backward()
        grads.append(model.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_training_drops_and_evaluation_does_not():
    for kw in (
        dict(patch_drop=0.5),
        dict(pos_drop=0.5),
        dict(drop_rate=0.5),
        dict(proj_drop=0.5),
        dict(attn_drop=0.5),
        dict(drop_path=0.9),
    ):
        model, x = _small(**kw), _images(8)
        assert torch.equal(model(x), model(x)), kw
        assert not torch.equal(model.train()(x), model(x)), kw
    assert _small(patch_drop=0.5).train().embed(x)[0].shape == (8, 1 + 8, 24)
    model = _small(distilled=True).train()
    a, b = model.forward_features(x)[:, :2].unbind(1)
    both = (model.head(a), model.head_dist(b))
    torch.testing.assert_close(model(x), (both[0] + both[1]) / 2)
    model.distilled_training = True
    for got, want in zip(model(x), both):
        torch.testing.assert_close(got, want)


def test_what_the_model_refuses():
    check_raises(
        ViT,
        [
            (dict(num_heads=5), ValueError, ["num_heads", "24", "5"]),
            (dict(depth=-1), ValueError, ["depth", "-1"]),
            (dict(img_size=15), ValueError, ["multiples of patch_size 4 x 4", "(15, 15)"]),
            (dict(global_pool="max"), ValueError, ["global_pool", "max"]),
            (dict(class_token=False, global_pool="token"), ValueError, ["class_token"]),
            (dict(distilled=True, global_pool="avg"), ValueError, ["global_pool", "avg"]),
            (dict(make_attention=[Attention]), ValueError, ["make_attention", "2", "1"]),
            (dict(weight_init="xavier"), ValueError, ["weight_init", "xavier"]),
            (dict(reg_tokens=1.5), TypeError, ["reg_tokens", "1.5"]),
            (dict(mlp_ratio=0), ValueError, ["mlp_ratio", "0"]),
        ],
        img_size=16,
        patch_size=4,
        dim=24,
        depth=2,
        num_heads=3,
    )
    model, x = _small(), _images()
    check_raises(
        model,
        [
            (dict(head_gates=torch.ones(3, 4)), ValueError, ["head_gates", "(3, 3)", "(3, 4)"]),
            (dict(head_gates=torch.ones(3)), ValueError, ["head_gates"]),
            (dict(head_gates=torch.ones(3, 3, 3)), ValueError, ["head_gates", "(2, 3, 3)"]),
        ],
        images=x,
    )


@pytest.mark.parametrize("how, linear, places", [("timm", 0.02, 0.02), ("width", 64**-0.5, 0.2)])
def test_initial_weights(how, linear, places):
    model = ViT(64, 4, 3, 10, dim=64, depth=1, num_heads=2, weight_init=how)
    std = lambda t: float(t.detach().std())
    assert std(model.blocks[0].attn.qkv.weight) == pytest.approx(linear, rel=0.15)
    assert std(model.blocks[0].mlp.fc2.weight) == pytest.approx(linear / 2 if how == "width" else linear, rel=0.15)
    assert std(model.pos_embed) == pytest.approx(places, rel=0.15) and std(model.head.weight) == pytest.approx(
        0.02, rel=0.3
    )
    assert model.blocks[0].attn.qkv.bias.abs().max() == 0 and 0 < std(model.cls_token) < 0.03


def test_attention_of_others_in_some_blocks():
    class Identity(nn.Module):
        def __init__(self, dim, num_heads, qkv_bias):
            super().__init__()
            self.num_heads, self.grids = num_heads, []

        def forward(self, x, grid_size):
            self.grids.append(grid_size)
            return x

    model, x = _small(make_attention=[Identity, Attention, Attention]), _images()
    assert model(x).shape == (2, 5) and model.blocks[0].attn.grids == [(4, 4)]
    assert [type(b.attn).__name__ for b in model.blocks] == ["Identity", "Attention", "Attention"]


FACTORIES = {
    "tiny": (vit_tiny_patch16_224, deit_tiny),
    "small": (vit_small_patch16_224, deit_small),
    "base": (vit_base_patch16_224, deit_base),
    "large": (vit_large_patch16_224,),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_published_numbers_of_parameters(name):
    for make in FACTORIES[name]:
        assert count_parameters(make) == PARAMETERS[name]
    assert parameter_formula(*VARIANTS[name][:2]) == PARAMETERS[name]
    if f"{name} distilled" in PARAMETERS:
        assert count_parameters(lambda: FACTORIES[name][1](distilled=True)) == PARAMETERS[f"{name} distilled"]


def test_other_numbers_of_parameters():
    assert count_parameters(lambda: deit_tiny(200, img_size=448)) == 5_675_912  # dual cross-attention's base
    small = dict(img_size=28, patch_size=4, in_channels=1, num_classes=10, dim=64, depth=6, num_heads=4)
    assert count_parameters(lambda: ViT(**small)) == 305_034
    assert parameter_formula(64, 6, patches=49, patch_numbers=16, num_classes=10) == 305_034
    with pytest.raises(ValueError, match="variant must be one of"):
        deit("large")


def test_published_models_are_made_by_name():
    from attnbook.models import create_model, model_card

    with torch.device("meta"):
        assert create_model("deit_tiny_distilled_patch16_224", num_classes=7).head_dist.out_features == 7
        assert create_model("vit_small_patch16_224", num_classes=3).head.out_features == 3
    card = model_card("deit_base_patch16_224")
    assert card.parameters == 86_567_656 and card.chapter == "vit" and card.image == 224


TIMM = {
    "plain": {},
    "registers": dict(reg_tokens=2),
    "no_embed_class": dict(no_embed_class=True, reg_tokens=1),
    "mean": dict(global_pool="avg"),
    "no class token": dict(class_token=False, global_pool="avg"),
    "scales": dict(init_values=0.1),
    "qk_norm": dict(qk_norm=True),
    "no bias": dict(qkv_bias=False),
    "features": dict(num_classes=0),
    "ratio 2": dict(mlp_ratio=2.0),
    "distilled": None,
}


def _theirs(form, **kw):
    "timm's model of a form, with all parameters random."
    VisionTransformerDistilled = pytest.importorskip("timm.models.deit").VisionTransformerDistilled
    VisionTransformer = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    torch.manual_seed(0)
    sizes = dict(img_size=24, patch_size=8, num_classes=7, embed_dim=48, depth=2, num_heads=3) | kw
    model = (VisionTransformerDistilled if form is None else VisionTransformer)(**sizes | (form or {}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.to(device_under_test()).eval()


@pytest.mark.parametrize("form", TIMM.values(), ids=TIMM)
def test_timm_models_load(form):
    theirs, x = _theirs(form), _images(size=(24, 24))
    ours = vit_from_state(theirs.state_dict(), num_heads=3).to(x.device).eval()
    assert count_parameters(ours) == count_parameters(theirs)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), atol=1e-5, rtol=1e-4)
    for model in (ours, theirs):
        model(x).pow(2).mean().backward()
    want = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert rel_error(p.grad, want[name].grad, floor=1e-4) < 1e-4, name


@pytest.mark.parametrize("form", [{}, dict(no_embed_class=True)], ids=["plain", "no_embed_class"])
def test_timm_models_at_another_size(form):
    theirs, x = _theirs(form, dynamic_img_size=True), _images(size=(40, 16))
    ours = vit_from_state(theirs.state_dict(), num_heads=3).to(x.device).eval()
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
    there = vit_from_state(theirs.state_dict(), num_heads=3, img_size=(40, 16)).to(x.device).eval()
    assert there.grid_size == (5, 2)
    torch.testing.assert_close(there(x), theirs(x), atol=1e-5, rtol=1e-4)


def test_published_models_have_timms_parameters():
    timm = pytest.importorskip("timm")
    names = dict(
        vit_tiny_patch16_224=vit_tiny_patch16_224,
        vit_large_patch16_224=vit_large_patch16_224,
        deit_small_patch16_224=deit_small,
        deit_base_distilled_patch16_224=partial(deit_base, distilled=True),
    )
    for name, make in names.items():
        with torch.device("meta"):
            theirs, ours = timm.create_model(name), make()
        shapes = lambda model: {n: tuple(t.shape) for n, t in model.state_dict().items()}
        assert shapes(ours) == shapes(theirs), name


def test_checkpoints_that_almost_fit():
    model, x = _small(init_values=0.3), _images()
    state = model.state_dict()
    odd = {"epoch": 3, "model": {"module." + re.sub(r"ls(\d)\.gamma", r"gamma_\1", n): t for n, t in state.items()}}
    odd["model"]["module.pre_logits.fc.weight"] = torch.zeros(2)
    assert torch.equal(vit_from_state(odd, num_heads=3).eval()(x.cpu()), model.cpu()(x.cpu()))
    other = vit_from_state(state, num_heads=3, num_classes=2)
    assert other.head.weight.shape == (2, 24) and torch.equal(other.pos_embed, model.pos_embed)
    assert vit_from_state(state, num_heads=3, num_classes=0)(x.cpu()).shape == (2, 24)
    wide = _small(seed=1, init_values=0.3, img_size=(16, 32)).cpu()
    assert torch.equal(load_weights(wide, state).pos_embed, resize_positions(state["pos_embed"], (4, 4), (4, 8)).cpu())
    back = load_weights(_small(seed=2, init_values=0.3).cpu(), wide.state_dict(), grid_size=(4, 8))
    assert torch.equal(back.pos_embed, resize_positions(wide.pos_embed, (4, 8), (4, 4)))


def test_states_that_do_not_fit_are_refused():
    state = _small().cpu().state_dict()
    without = {n: t for n, t in state.items() if n != "norm.bias"}
    other = state | {"blocks.1.mlp.fc2.bias": torch.zeros(3)}
    check_raises(
        lambda state: load_weights(_small().cpu(), state),
        [
            (dict(state=without), ValueError, ["norm.bias is missing"]),
            (dict(state=state | {"extra": torch.zeros(1)}), ValueError, ["extra is left over"]),
            (dict(state=other), ValueError, ["blocks.1.mlp.fc2.bias is (3,), not (24,)"]),
        ],
        state=state,
    )
    check_raises(
        lambda state, **kw: vit_from_state(state, **kw),
        [
            (dict(state={"a": torch.zeros(1)}), ValueError, ["timm's names", "not a"]),
            (dict(num_heads=None), ValueError, ["num_heads", "24"]),
        ],
        state=state,
        num_heads=3,
    )


def test_statistics_of_the_layers():
    model, x = _small(reg_tokens=1).double(), _images().double()
    A, found = attention_maps(model, x), layer_statistics(model, x)
    assert A.shape == (2, 3, 3, 18, 18) and len(found) == 3
    torch.testing.assert_close(A.sum(-1), torch.ones_like(A[..., 0]))
    tokens, grid = model.embed(x)
    second = model.run_blocks(tokens, grid, stop=1)
    q, k, _ = model.blocks[1].attn.project(model.blocks[1].norm1(second))
    want = head_statistics_reference(q, k, grid_size=grid, num_prefix_tokens=2)
    for got, ref in zip(found[1], want):
        torch.testing.assert_close(got, ref)
    torch.testing.assert_close(found[1].received, A[:, 1].sum(-2))
    torch.testing.assert_close(found[1].prefix_mass, A[:, 1, ..., :2])


def test_a_penalty_on_entropy_trains():
    model, x = _small(depth=2), _images()
    before = layer_statistics(model, x)[0].entropy.mean()
    grads = torch.autograd.grad(before, [model.blocks[0].attn.qkv.weight, model.patch_embed.proj.weight])
    assert all(g.abs().sum() > 0 for g in grads)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight -= 0.1 * grads[0] / grads[0].norm()
    assert layer_statistics(model, x)[0].entropy.mean() < before


def test_attention_without_queries_is_refused():
    class Nothing(nn.Identity):
        def __init__(self, *args):
            super().__init__()

        def forward(self, x, grid_size):
            return x

    with pytest.raises(TypeError, match=r"blocks\[0\].attn must have project.*Nothing"):
        layer_statistics(_small(make_attention=Nothing), _images())

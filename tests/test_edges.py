"""What must hold for the operations and models of all chapters alike: shapes on the meta device, export with a dynamic batch."""

import pytest
import torch

from attnbook.autoint import interacting_layer
from attnbook.convit import ConViT, gpsa
from attnbook.davit import channel_group_attention, window_attention
from attnbook.engine import attention
from attnbook.halo import HaloNet, halo_attention
from attnbook.music import relative_attention
from attnbook.neighborhood import na1d, na2d
from attnbook.vit import ViT


def meta(*shape):
    return torch.empty(*shape, device="meta")


Q, MAP = meta(1, 2, 12, 8), meta(1, 2, 4, 4, 8)
ON_META = {
    "attention": (lambda: attention(Q, Q, Q, is_causal=True), Q.shape),
    "na1d": (lambda: na1d(Q, Q, Q, 3), Q.shape),
    "na2d": (lambda: na2d(MAP, MAP, MAP, 3), MAP.shape),
    "halo": (lambda: halo_attention(MAP, MAP, MAP, 2, 1), MAP.shape),
    "relative": (lambda: relative_attention(Q, Q, Q, meta(2, 3, 8)), Q.shape),
    "gpsa": (lambda: gpsa(Q, Q, Q, meta(2, 3), meta(2), (3, 4)), Q.shape),
    "channel": (lambda: channel_group_attention(Q, Q, Q), Q.shape),
    "window": (lambda: window_attention(MAP, MAP, MAP, 2), MAP.shape),
    "interacting": (lambda: interacting_layer(meta(2, 5, 6), meta(4, 6, 8), num_heads=2), (2, 5, 8)),
}


@pytest.mark.parametrize("name", ON_META)
def test_shapes_on_the_meta_device(name):
    run, shape = ON_META[name]
    out = run()
    assert out.is_meta and out.shape == shape


EXPORTED = {
    "halo": (
        lambda: HaloNet(2, 1, widths=(8, 16), depths=(1, 1), num_heads=(2, 2), num_classes=3, stem_stride=1),
        (3, 8, 6),
    ),
    "vit": (lambda: ViT(8, 4, num_classes=3, dim=16, depth=1, num_heads=2), (3, 8, 8)),
    "convit": (lambda: ConViT(16, 4, dim=16, num_heads=4, depth=2, gpsa_layers=1, num_classes=3), (3, 16, 16)),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_export_with_a_dynamic_batch(name):
    make, shape = EXPORTED[name]
    torch.manual_seed(0)
    model, batch = make().eval(), torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (torch.randn(2, *shape),), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(5, *shape)
    torch.testing.assert_close(exported(x), model(x))

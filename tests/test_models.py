# Written from the test cells of nbs/1_foundations/16_models.ipynb by `attnbook export`. Do not edit.
# fmt: off
import functools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn as nn

from attnbook.layers import count_parameters
from attnbook.models import (
    ModelCard,
    _without_storage,
    count_flops,
    create_model,
    list_models,
    model_card,
    register_model,
    register_models,
)


class _Tiny(nn.Module):
    def __init__(self, num_classes: int = 10, in_channels: int = 3):
        super().__init__()
        self.conv, self.head = nn.Conv2d(in_channels, 4, 3, padding=1, bias=False), nn.Linear(4, num_classes)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        return self.head((self.conv(x) * self.scale).mean((2, 3)))


def test_cards_are_checked_against_the_model():
    card = ModelCard("tiny", _Tiny, 158, image=8)
    assert count_parameters(card.make) == card.parameters == 4 * 3 * 9 + 50 and card.inputs()[0].shape == (1, 3, 8, 8)
    assert count_flops(card) == 2 * (64 * 4 * 27 + 40)
    assert count_flops(replace(card, image=None, example=lambda: (torch.zeros(1, 3, 4, 4),))) == 2 * (16 * 4 * 27 + 40)
    with pytest.raises(ValueError, match="'tiny' names no inputs"):
        count_flops(replace(card, image=None))


def test_models_are_registered_once(monkeypatch):
    cards = {}
    monkeypatch.setattr(sys.modules[register_model.__module__], "_CARDS", cards)
    make = lambda num_classes=10: _Tiny(num_classes)
    make.__module__ = "attnbook.halo.nets"
    register_models({"a": (make, 158, 8), "b": (functools.partial(make, 20), 208)}, published="Table 1", weights="none")
    assert (cards["a"].image, cards["b"].image, cards["a"].chapter, cards["b"].published) == (
        8,
        None,
        "halo",
        "Table 1",
    )
    register_models({"a": (make, 159)})
    assert cards["a"].parameters == 159, "a notebook that runs its cell again"
    other = lambda: None
    other.__module__ = "attnbook.davit.nets"
    with pytest.raises(ValueError, match="a model 'a' already, of attnbook.halo.nets"):
        register_model(other, name="a", parameters=1)

    @register_model(parameters=158, image=8)
    def my_model():
        return _Tiny()

    assert cards["my_model"].make is my_model and "158 (0.0 M)" in cards["my_model"]._repr_markdown_()


def test_every_model_has_the_parameters_of_its_card():
    wrong = {n: (count_parameters(model_card(n).make), model_card(n).parameters) for n in list_models()}
    assert len(wrong) >= 30 and not {n: pair for n, pair in wrong.items() if pair[0] != pair[1]}


@pytest.mark.parametrize(
    "name, gmacs",
    [("davit_tiny", 4.54), ("nat_mini", 2.7), ("convit_tiny", 1.08), ("halonet_h0", 2.31)],
    ids=lambda v: str(v),
)
def test_flops_are_the_published_ones(name, gmacs):
    "Within 2 %: the papers count a multiply-add as one (HaloNet and ConViT publish none: those were counted here, and guard against a change)."
    assert abs(count_flops(name) / 2e9 - gmacs) < 0.02 * gmacs


def smallest_models() -> list[str]:
    "Of each chapter the smallest model whose card has inputs."
    cards = sorted(map(model_card, list_models()), key=lambda c: (c.parameters, c.name))
    return [*{c.chapter: c.name for c in reversed(cards) if c.image or c.example}.values()]


@pytest.mark.parametrize("name", smallest_models())
def test_every_chapters_models_can_be_counted(name):
    "Without allocating them, but for those whose work depends on values."
    assert count_flops(name) > 0


def test_a_model_is_created_by_name():
    with torch.device("meta"):
        assert create_model("halonet_h0", num_classes=7).head.out_features == 7
    assert {"halonet_h1", "davit_tiny", "convit_small", "nat_tiny", "dinat_base"} <= set(list_models()) and list_models(
        "halonet_h[01]"
    ) == ["halonet_h0", "halonet_h1"]
    with pytest.raises(ValueError, match="not 'halonet_h9'; did you mean halonet_h"):
        create_model("halonet_h9")
    with pytest.raises(TypeError, match="halonet_h0 takes .*num_classes.*, not 'classes'"):
        create_model("halonet_h0", classes=3)


DEPARTS = {  # chapter -> why its models do not keep to the vocabulary, or not yet
    "davit": "its head is a norm and a linear layer, as in timm's, and the norm stays without classes",
    "dcal": "a dict of branches, each with features of its own",
    "medusa": "its features come with the attentions of its heads",
}
VISION = [n for n in list_models() if model_card(n).image]
KEPT = [n for n in VISION if model_card(n).chapter not in DEPARTS]


def smallest_of_each_chapter(names):
    cards = sorted((model_card(n) for n in names), key=lambda c: c.parameters)
    return [c.name for c in {c.chapter: c for c in reversed(cards)}.values()]


def test_who_departs_from_the_vocabulary():
    "Every exception is a chapter with vision models; most models are none."
    assert set(DEPARTS) <= {model_card(n).chapter for n in VISION} and all(DEPARTS.values())
    assert {"halo", "neighborhood", "van", "ulsam", "hyperzzw", "vit", "convit"} <= {
        model_card(n).chapter for n in KEPT
    }


@pytest.mark.parametrize("name", KEPT)
def test_one_vocabulary(name):
    "Fifteen channels of input and no classes: a weight takes the fifteen, no head is there, `forward_features` is."
    with torch.device("meta"):
        model = create_model(name, num_classes=0, in_channels=15)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert not any(n.split(".")[0] in ("head", "head_dist", "classifier", "fc") for n in shapes)
    assert any(15 in s for s in shapes.values()) and callable(model.forward_features)


@pytest.mark.parametrize("name", smallest_of_each_chapter(KEPT))
def test_features_without_classes(name):
    "With no classes: one row of features an image, as wide as what the head of the usual model takes."
    from torch._subclasses.fake_tensor import FakeTensorMode

    card, fake = model_card(name), FakeTensorMode(allow_non_fake_inputs=True)
    images = torch.zeros(2, 15, card.image, card.image)
    net = _without_storage(lambda: create_model(name, num_classes=0, in_channels=15), fake)
    with fake, torch.no_grad():
        out, deep = net(fake.from_tensor(images)), net.forward_features(fake.from_tensor(images))
    with torch.device("meta"):
        head = create_model(name, num_classes=7, in_channels=15).head
    assert out.shape == (2, head.in_features) and head.out_features == 7
    assert head.in_features in deep.shape and deep.dim() in (3, 4) and len(deep) == 2


def test_importing_the_library_imports_nothing_else():
    code = "import sys, attnbook; assert not {'torch', 'numpy', 'triton'} & set(sys.modules); assert 'list_models' in dir(attnbook); attnbook.list_chapters(); assert 'torch' not in sys.modules; print(attnbook.create_model.__name__, attnbook.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[0] == "create_model", done.stderr
    code = "import attnbook\nattnbook.no_such"
    assert (
        "module 'attnbook' has no attribute 'no_such'"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    )

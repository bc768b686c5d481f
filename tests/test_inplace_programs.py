"""Views and writes in any order: gradients are right, or an error says why not; never silently wrong."""

from __future__ import annotations

import random

import numpy as np
import pytest

import tensorgrad as tg


def writing(change):
    """A step that changes its first tensor in place and returns it."""

    def step(x, y, k):
        change(x, y if x.shape == y.shape else y.mean(), k)
        return x

    return step


def keep_shape(change):
    """A step on matrices; others pass through."""
    return lambda x, y, k: change(x, k) if x.ndim == 2 else x


STEPS = {
    "add": lambda x, y, k: x + (y if x.shape == y.shape else y.sum()),
    "mul": lambda x, y, k: x * (y if x.shape == y.shape else y.mean()),
    "sin": lambda x, y, k: x.sin(),
    "sum": lambda x, y, k: x.sum(0, keepdim=True),
    "index": lambda x, y, k: x[[0, 0]],
    "cat": lambda x, y, k: tg.cat([x.reshape(-1), y.reshape(-1)])[:6],
    "flip": lambda x, y, k: x.flip(0),
    "flat": lambda x, y, k: x.reshape(-1),
    "slice": lambda x, y, k: x[::2],
    "split": lambda x, y, k: x.split(1)[k % len(x)],
    "expand": lambda x, y, k: x.unsqueeze(0).expand(2, *x.shape)[1],
    "row": keep_shape(lambda x, k: x[k % len(x)]),
    "column": keep_shape(lambda x, k: x[:, k % x.shape[1]]),
    "transpose": keep_shape(lambda x, k: x.t()),
    "diagonal": keep_shape(lambda x, k: x.diagonal()),
    "unbind": keep_shape(lambda x, k: x.unbind()[0]),
    "+=": writing(lambda x, y, k: x.add_(y)),
    "*=": writing(lambda x, y, k: x.mul_(y)),
    "copy_": writing(lambda x, y, k: x.copy_(y)),
    "sigmoid_": writing(lambda x, y, k: x.sigmoid_()),
    "fill_": writing(lambda x, y, k: x[..., :1].fill_(0.5)),
    "set row": writing(lambda x, y, k: x.__setitem__(k % len(x), y.mean())),
    "set where": writing(lambda x, y, k: x.__setitem__(x > 0.3, y.mean())),
    "+= transposed": keep_shape(lambda x, k: x.add_(x.t()) if x.shape[0] == x.shape[1] else x),
}


def program(seed, length=5):
    """A function of two 3x3 tensors that makes `length` more, each from two earlier ones, and adds up some of them."""
    rng = random.Random(seed)
    names = list(STEPS)
    steps = [(rng.choice(names), rng.randrange(1000), rng.randrange(1000), rng.randrange(10)) for _ in range(length)]

    def run(a, b):
        values = [a * 1, b * 1]
        for name, i, j, k in steps:
            values.append(STEPS[name](values[i % len(values)], values[j % len(values)], k))
        return tuple(v * v for v in (values[-1], values[-2], values[5], values[1]))

    run.steps = [name for name, *_ in steps]
    return run


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_random_programs(first):
    refused, wrong = 0, []
    for seed in range(first, first + 100):
        rng = np.random.default_rng(seed)
        inputs = [tg.tensor(rng.uniform(-1, 1, (3, 3)), requires_grad=True) for _ in range(2)]
        fn = program(seed)
        try:
            tg.autograd.grad([o.sum() for o in fn(*inputs) if o.requires_grad], inputs, allow_unused=True)
        except RuntimeError as error:
            assert "in-place" in str(error) or "read-only" in str(error), f"program {seed} {fn.steps}: {error}"
            refused += 1
            continue
        if not tg.autograd.gradcheck(fn, inputs, raise_exception=False):
            wrong.append((seed, fn.steps))
    assert wrong == []
    assert refused < 25


def sequence(*statements):
    """A function of x that runs the statements on h = x * 1 and a view v of it, and reads both."""
    view, *writes = statements

    def run(x):
        h = x * 1
        v = view(h)
        for change in writes:
            change(h, v)
        return v * v, h * h

    return run


VIEWS = {"row": lambda h: h[1], "transpose": lambda h: h.t(), "flat": lambda h: h.view(-1), "column": lambda h: h[:, 0],
         "diagonal": lambda h: h.diagonal(), "element": lambda h: h[0, 1], "split": lambda h: h.split(1)[1],
         "view of view": lambda h: h.t()[1].unsqueeze(0)}
WRITES = {
    "base": lambda h, v: h.mul_(3.0), "view": lambda h, v: v.mul_(3.0), "base by itself": lambda h, v: h.mul_(h),
    "view by itself": lambda h, v: v.mul_(v), "base by view": lambda h, v: h.add_(v.mean()),
    "view by base": lambda h, v: v.add_(h.mean()), "base forgotten": lambda h, v: h.fill_(2.0),
    "view forgotten": lambda h, v: v.fill_(2.0), "part of base": lambda h, v: h.__setitem__(0, h[1] * 1),
    "other view": lambda h, v: h[1].sigmoid_(), "transposed": lambda h, v: h.add_(h.t()),
    "copied onto itself": lambda h, v: h.copy_(h),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("write", WRITES)
def test_view_and_write(view, write):
    x = tg.tensor([[0.2, 0.4], [0.6, 0.8]], dtype=tg.float64, requires_grad=True)
    assert tg.autograd.gradcheck(sequence(VIEWS[view], WRITES[write]), (x,))
    assert tg.autograd.gradcheck(sequence(VIEWS[view], WRITES[write], WRITES["base"], WRITES["view"]), (x,))

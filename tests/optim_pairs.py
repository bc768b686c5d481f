"""Optimizers with options to try, and the same parameters, gradients and models in tensorgrad and in PyTorch."""
import numpy as np
import torch

import tensorgrad as tg
from tensorgrad import nn

OPTIMIZERS = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd_decay": ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    "sgd_momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "sgd_dampening": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd_nesterov": ("SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
    "adam": ("Adam", {}),
    "adam_options": ("Adam", {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.2}),
    "adamw": ("AdamW", {}),
    "adamw_options": ("AdamW", {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.2}),
    "adamw_no_decay": ("AdamW", {"weight_decay": 0.0}),
    "muon": ("Muon", {"lr": 0.02}),
    "muon_options": ("Muon", {"lr": 0.02, "momentum": 0.8, "nesterov": False, "weight_decay": 0.3, "ns_steps": 3,
                              "adjust_lr_fn": "match_rms_adamw"}),
}
SHAPES = [(3, 4), (7,), (), (300, 250), (1, 5, 2)]
MATRICES = [(3, 4), (9, 2), (300, 250), (5, 5)]
ALIKE = [*MATRICES, (3, 4), (300, 250), (3, 4), (1, 6)]  # some of one shape


def twins(shapes, dtype):
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    return ([nn.Parameter(tg.tensor(a)) for a in arrays],
            [torch.nn.Parameter(torch.from_numpy(a.copy())) for a in arrays])


def give_gradients(ours, theirs, rng, absent=()):
    """The same random gradients to both; None to those numbered in `absent`."""
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        g = rng.normal(size=p.shape).astype(p.dtype)
        p.grad = None if i in absent else tg.tensor(g)
        q.grad = None if i in absent else torch.from_numpy(g)


def assert_equal(ours, theirs, dtype):
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == "float64" else {"rtol": 1e-4, "atol": 2e-5}
        np.testing.assert_allclose(p.detach().numpy(), q.detach().numpy(), **tolerance, err_msg=f"parameter {i}")


def model_pair(dtype="float64"):
    def build(n):
        return n.Sequential(n.Linear(6, 8), n.GELU(), n.LayerNorm(8), n.Linear(8, 3))
    theirs, ours = build(torch.nn).to(getattr(torch, dtype)), build(nn).to(np.dtype(dtype))
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    return ours, theirs


def train_pair(ours, theirs, opt, reference, steps=3, clip=None, zero=True):
    rng = np.random.default_rng(3)
    for _ in range(steps):
        x = rng.normal(size=(5, 6)).astype(next(ours.parameters()).dtype)
        for model, o, t, library in ((ours, opt, tg.tensor, nn), (theirs, reference, torch.tensor, torch.nn)):
            if zero:
                o.zero_grad()
            (model(t(x)) ** 2).mean().backward()
            if clip:
                library.utils.clip_grad_norm_(model.parameters(), clip)
            o.step()

"""tensorgrad.optim against torch.optim, in lockstep on the same gradients; state_dict, Muon, schedules."""
import math

import numpy as np
import pytest

import tensorgrad as tg
from tensorgrad import nn, optim
from tensorgrad.device import cpu
from tensorgrad.optim import schedules
from tensorgrad.optim.muon import newton_schulz

torch = pytest.importorskip("torch")
from optim_pairs import (  # noqa: E402
    ALIKE,
    MATRICES,
    OPTIMIZERS,
    SHAPES,
    assert_equal,
    give_gradients,
    model_pair,
    train_pair,
    twins,
)


@pytest.fixture
def full_precision_muon(monkeypatch):
    """PyTorch's Muon orthogonalizes in bfloat16; let it keep the dtype, so that the formulas can be compared."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_in_lockstep(name, dtype, full_precision_muon):
    kind, options = OPTIMIZERS[name]
    ours, theirs = twins(ALIKE if kind == "Muon" else SHAPES, dtype)
    opt, reference = getattr(optim, kind)(ours, **options), getattr(torch.optim, kind)(theirs, **options)
    rng = np.random.default_rng(2)
    for step in range(20):
        give_gradients(ours, theirs, rng, absent=((0,), (1, 3), ())[step % 3])  # those neither move nor age
        for o in (opt, reference):
            o.param_groups[0]["lr"] = options.get("lr", 1e-3) * (1 + step % 4)
            o.step()
        assert_equal(ours, theirs, dtype)


@pytest.mark.parametrize("name", ["sgd_nesterov", "adamw_options", "muon"])
def test_groups_have_their_own_options(name, full_precision_muon):
    kind, options = OPTIMIZERS[name]
    ours, theirs = twins(MATRICES, "float64")

    def make(library, params):
        groups = [{"params": params[:2], "weight_decay": 0.5}, {"params": params[2:3], "lr": 0.3}]
        made = getattr(library, kind)(groups, **options)
        made.add_param_group({"params": params[3], "weight_decay": 0.0})
        return made

    opt, reference = make(optim, ours), make(torch.optim, theirs)
    assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in reference.param_groups]
    rng = np.random.default_rng(2)
    for _ in range(5):
        give_gradients(ours, theirs, rng)
        opt.step()
        reference.step()
    assert_equal(ours, theirs, "float64")


def test_training_with_clipping_equals_torch():
    ours, theirs = model_pair()
    opt = optim.AdamW(ours.parameters(), lr=0.01)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    train_pair(ours, theirs, opt, reference, steps=10, clip=0.1)
    assert_equal(ours.parameters(), theirs.parameters(), "float64")
    train_pair(ours, theirs, opt, reference, steps=3, zero=False)  # gradients accumulate in place
    assert_equal(ours.parameters(), theirs.parameters(), "float64")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaled_step_equals_clipping_before_it(name, full_precision_muon):
    kind, options = OPTIMIZERS[name]
    ours, theirs = twins(ALIKE if kind == "Muon" else SHAPES, "float64")
    opt, reference = getattr(optim, kind)(ours, **options), getattr(torch.optim, kind)(theirs, **options)
    rng = np.random.default_rng(4)
    for step in range(4):
        give_gradients(ours, theirs, rng, absent=((), (1,))[step % 2])
        clip = (0.5, 1e6)[step == 3]
        torch.nn.utils.clip_grad_norm_(theirs, clip)
        reference.step()
        norm = tg.nn.utils.get_total_norm([p.grad for p in ours if p.grad is not None]).item()
        opt.step(grad_scale=min(1.0, clip / (norm + 1e-6)))
        assert_equal(ours, theirs, "float64")


# ---- state_dict ----

def to_arrays(state):
    return {"state": {i: {k: v.numpy().copy() for k, v in entry.items()} for i, entry in state["state"].items()},
            "param_groups": state["param_groups"]}


def to_torch(state):
    return {"state": {i: {k: torch.from_numpy(v.numpy().copy()) for k, v in entry.items()}
                      for i, entry in state["state"].items()}, "param_groups": state["param_groups"]}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_goes_round_through_torch(name, full_precision_muon):
    kind, options = OPTIMIZERS[name]
    ours, theirs = twins(MATRICES, "float64")
    make, make_reference = getattr(optim, kind), getattr(torch.optim, kind)
    opt, reference, rng = make(ours, **options), make_reference(theirs, **options), np.random.default_rng(0)
    for _ in range(4):
        give_gradients(ours, theirs, rng, absent=(2,))  # which has no state then
        opt.step()
        reference.step()
    mine, other = opt.state_dict(), reference.state_dict()
    if any(other["state"].values()):
        assert list(mine["state"]) == list(other["state"]) == [0, 1, 3]
    for number, entry in mine["state"].items():
        for key, value in entry.items():
            if key != "step" or kind.startswith("Adam"):
                np.testing.assert_allclose(np.array(value), other["state"][number][key].numpy(), rtol=1e-9, atol=1e-12)
                assert value.dtype == other["state"][number][key].numpy().dtype
    assert [g["params"] for g in mine["param_groups"]] == [g["params"] for g in other["param_groups"]]
    # ours into torch, torch's into ours; both go on as if nothing had happened
    exchanged, exchanged_reference = make(ours, lr=9.0), make_reference(theirs, lr=9.0)
    exchanged.load_state_dict(to_arrays(other))
    exchanged_reference.load_state_dict(to_torch(mine))
    assert exchanged.param_groups[0]["lr"] == options.get("lr", 1e-3)
    for _ in range(3):
        give_gradients(ours, theirs, rng)
        exchanged.step()
        exchanged_reference.step()
    assert_equal(ours, theirs, "float64")


def test_state_dict_with_names_and_groups():
    ours, theirs = model_pair()

    def make(library, model):
        named = list(model.named_parameters())
        return library.AdamW([{"params": named[:2], "lr": 0.5}, {"params": named[2:]}])

    opt, reference = make(optim, ours), make(torch.optim, theirs)
    for mine, other in zip(opt.state_dict()["param_groups"], reference.state_dict()["param_groups"], strict=True):
        assert mine["params"] == other["params"] and mine["param_names"] == other["param_names"]
        assert {k: other[k] for k in mine if k != "params"} == {k: v for k, v in mine.items() if k != "params"}


def test_load_state_dict_checks_before_it_writes():
    ours, _ = twins(MATRICES, "float32")
    opt = optim.AdamW(ours)
    for p in ours:
        p.grad = tg.ones(*p.shape)
    opt.step()
    state = to_arrays(opt.state_dict())
    state["state"][0]["exp_avg"] = np.zeros((9, 9), "float32")
    del state["state"][1]["exp_avg_sq"]
    state["param_groups"] = [{**state["param_groups"][0], "lr": 77.0, "amsgrad": True}]
    with pytest.raises(ValueError) as error:
        opt.load_state_dict(state)
    for part in ("exp_avg of parameter 0 has shape (9, 9), the parameter (3, 4)",
                 "exp_avg_sq of parameter 1 is missing", "amsgrad=True is not supported", "nothing was loaded"):
        assert part in str(error.value)
    assert opt.param_groups[0]["lr"] == 1e-3 and opt.state[ours[0]]["exp_avg"].numpy().all()
    with pytest.raises(ValueError, match=r"groups of sizes \[4\], this optimizer \[2\]"):
        optim.AdamW(ours[:2]).load_state_dict(opt.state_dict())
    opt.load_state_dict({"state": {}, "param_groups": opt.state_dict()["param_groups"]})
    assert not opt.state and not opt._flat[0].buffers[0].state["exp_avg"].any()  # as new


def test_wrong_arguments():
    p = nn.Parameter(tg.ones(3))
    with pytest.raises(ValueError, match="no parameters"):
        optim.SGD([])
    with pytest.raises(TypeError, match="put the single Tensor into a list"):
        optim.SGD(p)
    with pytest.raises(TypeError, match="takes Tensors, not str"):
        optim.SGD(["weight"])
    with pytest.raises(ValueError, match="result of an operation"):
        optim.SGD([p * 2])
    with pytest.raises(ValueError, match="a parameter twice"):
        optim.SGD([p, p])
    with pytest.raises(ValueError, match="a parameter twice"):
        optim.SGD([{"params": [p]}, {"params": [p]}])
    with pytest.raises(ValueError, match="lr must be at least 0, not -1"):
        optim.AdamW([p], lr=-1)
    with pytest.raises(ValueError, match="betas"):
        optim.AdamW([p], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        optim.SGD([p], nesterov=True)
    with pytest.raises(ValueError, match="Muon takes matrices"):
        optim.Muon([p])
    with pytest.raises(ValueError, match="adjust_lr_fn"):
        optim.Muon([nn.Parameter(tg.ones(2, 2))], adjust_lr_fn="other")


def test_closure_and_zero_grad():
    p = nn.Parameter(tg.ones(2))
    opt = optim.SGD([p], lr=0.5)

    def closure():
        opt.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with tg.no_grad():
        assert opt.step(closure).item() == 2
    assert np.array_equal(p.detach().numpy(), [0, 0])
    opt.zero_grad(set_to_none=False)
    assert p.grad is not None and not p.grad.numpy().any()
    opt.zero_grad()
    assert p.grad is None
    assert "lr: 0.5" in repr(opt)


# ---- Muon ----

def test_newton_schulz_makes_singular_values_near_one():
    rng = np.random.default_rng(0)
    for shape in ((20, 50), (50, 20), (30, 30)):
        matrix = rng.normal(size=shape)
        before = matrix.copy()
        u, _, vt = np.linalg.svd(matrix, full_matrices=False)
        result = newton_schulz(cpu, matrix)
        assert np.array_equal(matrix, before)
        values = np.linalg.svd(result, compute_uv=False)
        assert 0.3 < values.min() and values.max() < 1.25
        rotated = u.T @ result @ vt.T  # same singular vectors
        assert abs(rotated - np.diag(np.diag(rotated))).max() < 1e-8


def test_muon_gives_flagged_groups_to_adamw(full_precision_muon):
    ours, theirs = twins([(4, 6), (5, 3), (6,)], "float64")
    opt = optim.Muon([{"params": ours[:1]}, {"params": ours[1:], "use_muon": False, "lr": 0.01, "weight_decay": 0.0}])
    references = [torch.optim.Muon(theirs[:1]),
                  torch.optim.AdamW(theirs[1:], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)]
    rng = np.random.default_rng(0)
    for _ in range(5):
        give_gradients(ours, theirs, rng)
        opt.step()
        for reference in references:
            reference.step()
    assert_equal(ours, theirs, "float64")
    again = optim.Muon([{"params": ours[:1]}, {"params": ours[1:], "use_muon": False}])
    again.load_state_dict(opt.state_dict())
    assert set(again.state[ours[2]]) == {"step", "exp_avg", "exp_avg_sq"} and again.state[ours[2]]["step"] == 5


def test_muon_fits_faster_than_sgd():
    """The point of it: badly scaled least squares, where plain gradient steps crawl."""
    rng = np.random.default_rng(0)
    x = tg.tensor(rng.normal(size=(64, 8)) * np.logspace(0, -2, 8))
    y = x @ tg.tensor(rng.normal(size=(8, 8)))
    losses = {}
    for name, make in {"muon": lambda p: optim.Muon([p], lr=0.1, weight_decay=0.0),
                       "sgd": lambda p: optim.SGD([p], lr=0.1, momentum=0.95)}.items():
        w = nn.Parameter(tg.zeros(8, 8, dtype=tg.float64))
        opt = make(w)
        for _ in range(60):
            opt.zero_grad()
            loss = ((x @ w - y) ** 2).mean()
            loss.backward()
            opt.step()
        losses[name] = loss.item()
    assert math.isfinite(losses["muon"]) and losses["muon"] < 0.05


# ---- schedules ----

def nanogpt_cosine(it, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


def test_cosine_is_nanogpts():
    schedule = optim.get_schedule("cosine", learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, decay_iters=2000)
    for it in (0, 1, 50, 99, 100, 101, 1000, 1999, 2000, 2001, 9999):
        assert schedule(it) == pytest.approx(nanogpt_cosine(it, 1e-3, 1e-4, 100, 2000), rel=1e-12)


def test_other_schedules():
    options = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 9, "decay_iters": 109}
    by_name = {name: optim.get_schedule(name, **options) for name in schedules.SCHEDULES}
    assert set(by_name) == {"constant", "linear", "cosine", "wsd"}
    for schedule in by_name.values():
        assert [schedule(it) for it in (0, 4, 8)] == pytest.approx([0.1, 0.5, 0.9]) and schedule(9) == 1.0
    assert by_name["constant"](10**9) == 1.0
    assert [by_name["linear"](it) for it in (59, 109, 500)] == pytest.approx([0.55, 0.1, 0.1])
    wsd = optim.get_schedule("wsd", **options, decay_fraction=0.2)
    assert [wsd(it) for it in (50, 86, 87)] == pytest.approx([1.0, 1.0, 1.0])
    assert [wsd(it) for it in (98, 109, 500)] == pytest.approx([0.55, 0.1, 0.1])
    for name in ("linear", "cosine", "wsd"):  # a decay that ends within the warm-up, and one without warm-up
        short = optim.get_schedule(name, learning_rate=1.0, warmup_iters=5, decay_iters=3)
        assert short(5) == 0.0
        assert optim.get_schedule(name, learning_rate=1.0, decay_iters=10)(0) == 1.0
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        optim.get_schedule("step", learning_rate=1.0)

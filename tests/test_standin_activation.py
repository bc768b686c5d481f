"""What CUDA's kernels of activations, softmax and unscaling do for the operations above them, emulated: the gradient of
a bias comes with the activation's, rows with infinities and NaN are PyTorch's, gradients are unscaled in their buffer.
"""

from __future__ import annotations

import numpy as np
import pytest
import standin
from standin_device import gpu, kernels  # noqa: F401

import tensorgrad as tg
from tensorgrad import amp, nn, optim
from tensorgrad.nn import functional as F

torch = pytest.importorskip("torch", reason="compared with PyTorch")
ACTIVATIONS = {
    "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "relu2": F.relu2,
    "swiglu": F.swiglu,
}  # fmt: skip


# ---- a bias's gradient comes with the activation's ---


def layers(device, activation="gelu"):
    tg.manual_seed(0)
    fc, proj = nn.Linear(12, 40 * (1 + (activation == "swiglu"))), nn.Linear(40, 12)
    x = tg.tensor(np.random.default_rng(0).standard_normal((3, 7, 12)).astype(np.float32), device=device)
    return fc.to(device), proj.to(device), x


def gradients(device, function, activation="gelu", dtype=None):
    """The gradients of both layers' parameters for function(fc, proj, x)."""
    fc, proj, x = layers(device, activation)
    with tg.autocast(dtype=dtype, enabled=dtype is not None):
        y = function(fc, proj, x)
    y.float().square().sum().backward()
    return [p.grad.cpu().numpy() for p in (*fc.parameters(), *proj.parameters())]


def compare(function, launcher, sums, activation="gelu", dtype=None):
    """As on the CPU, with `sums` launches of column_sum."""
    launcher.names.clear()
    found = [gradients(device, function, activation, dtype) for device in ("cuda", "cpu")]
    tolerance = 0.05 if dtype else 1e-5
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())
    assert launcher.names.count("column_sum") == sums


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_gradient_comes_with_the_activation_s(activation, dtype, kernels):  # noqa: F811
    if dtype:
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    function = ACTIVATIONS[activation]
    compare(lambda fc, proj, x: proj(function(fc(x))), kernels, 1, activation, dtype)  # that of proj


def doubled(gradient):
    gradient *= 2  # in place: the sums that came along are no longer its own


def test_sums_hold_for_that_very_gradient_only(kernels):  # noqa: F811
    def twice_used(fc, proj, x):
        h = fc(x)
        return proj(F.gelu(h)) + h[..., :12]

    def other_order(fc, proj, x):
        h = fc(x)
        y = h[..., :12] * 1.0
        return proj(F.gelu(h)) + y

    def two_activations(fc, proj, x):
        h = fc(x)
        return proj(F.gelu(h) + F.silu(h))

    def hooked(change):
        def function(fc, proj, x):
            h = fc(x)
            h.register_hook(change)
            return proj(F.gelu(h))

        return function

    for function in (twice_used, other_order, two_activations, hooked(doubled), hooked(lambda g: g * 3)):
        compare(function, kernels, 2)
    compare(hooked(lambda g: None), kernels, 1)  # it only looked


def test_gate_and_value_of_two_layers(kernels):  # noqa: F811
    def function(fc, proj, x):
        return proj(F.swiglu(fc(x), x.repeat(1, 1, 4)[..., :40].contiguous()))

    compare(function, kernels, 2)


def test_higher_orders_frozen_biases_and_a_second_time(kernels):  # noqa: F811
    found = []
    for device in ("cuda", "cpu"):
        fc, proj, x = layers(device)
        y = proj(F.gelu(fc(x))).square().sum()
        y.backward(retain_graph=True)
        y.backward()
        (first,) = tg.autograd.grad(proj(F.gelu(fc(x))).square().sum(), fc.bias, create_graph=True)
        (second,) = tg.autograd.grad(first.square().sum(), fc.bias)
        fc.bias.requires_grad_(False)
        (weight,) = tg.autograd.grad(proj(F.gelu(fc(x))).square().sum(), fc.weight)
        found.append([t.cpu().numpy() for t in (fc.bias.grad, first.detach(), second, weight)])
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


# ---- softmax ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_along_any_dimension(name, dtype, kernels):  # noqa: F811
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    rng, kind = np.random.default_rng(0), tg.dtypes.as_dtype(dtype)
    tolerance = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.003}[dtype]
    for shape, dim in (((4, 33), -1), ((4, 33), 0), ((2, 9, 5), 1), ((3,), 0), ((2, 2600), 1)):
        values, cotangent = (tg.tensor(rng.standard_normal(shape).astype(np.float32)).to(kind) for _ in range(2))
        found = []
        for device, wide in (("cuda", kind), ("cpu", tg.float64)):
            x = values.to(wide).to(device).detach().requires_grad_()
            y = getattr(x, name)(dim)
            y.backward(cotangent.to(wide).to(device))
            assert y.dtype == x.grad.dtype == wide
            found.append([t.detach().cpu().double().numpy() for t in (y, x.grad)])
        for got, want in zip(*found, strict=True):
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())
    assert set(kernels.names) == {f"row_{name}_forward", f"row_{name}_backward"}


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_rows_with_infinities_and_nan_are_torch_s(name, kernels):  # noqa: F811
    inf, nan = np.inf, np.nan
    for width in (3, 40):
        rows = np.random.default_rng(0).standard_normal((7, width)).astype(np.float32)
        rows[0, 1], rows[1, 1], rows[2, 1] = inf, -inf, nan
        rows[3], rows[4], rows[5] = -inf, nan, np.finfo(np.float32).min
        rows[6, 1:], rows[6, 0] = -inf, nan
        ours = getattr(tg.tensor(rows, device="cuda"), name)(1).cpu().numpy()
        np.testing.assert_allclose(ours, getattr(torch.tensor(rows), name)(1).numpy(), rtol=1e-5, atol=1e-6)
    target = [0] * len(rows)
    loss = F.cross_entropy(tg.tensor(rows, device="cuda"), tg.tensor(target, device="cuda"), reduction="none")
    theirs = torch.nn.functional.cross_entropy(torch.tensor(rows), torch.tensor(target), reduction="none")
    np.testing.assert_allclose(loss.cpu().numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6)


# ---- unscaling ---


def unscaled(lib, device, scale, factor, dtype="float32"):
    """(gradients after unscale_, the flag) of two parameters, the second with a gradient outside of the flat buffer."""
    values = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    a, b = (lib.nn.Parameter(lib.tensor(v, device=device).to(getattr(lib, dtype))) for v in values)
    opt = lib.optim.SGD([a, b], lr=0.1)
    scaler = lib.amp.GradScaler(device, init_scale=scale)
    scaler.scale((a.float() * a.float() * factor).sum() + b.float().sum()).backward()
    b.grad = lib.tensor(values[1].T.copy(), device=device).to(getattr(lib, dtype)).T  # given, and not contiguous
    scaler.unscale_(opt)
    if lib is torch:
        found = sum(v.item() for v in scaler._found_inf_per_device(opt).values())
        return [p.grad.float().numpy() for p in (a, b)], found
    return [p.grad.float().cpu().numpy() for p in (a, b)], int(scaler._device.item(scaler._found[opt]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # PyTorch refuses float16
@pytest.mark.parametrize("scale, factor", [(2.0**16, 1.0), (2.0**-120, 1e10), (2.0**-10, 3e38), (8.0, np.inf),
                                           (8.0, np.nan)])
@pytest.mark.parametrize("where", ["kernels", "gpu", "cpu"])
def test_unscaled_as_in_torch(where, scale, factor, dtype, request):
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    if where != "cpu":
        request.getfixturevalue(where)
    with np.errstate(all="ignore"):
        ours = unscaled(tg, "cpu" if where == "cpu" else "cuda", scale, factor, dtype)
    theirs = unscaled(torch, "cpu", scale, factor, dtype)
    assert ours[1] == bool(theirs[1])
    for got, want in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_gradients_are_unscaled_in_one_launch_per_buffer(kernels):  # noqa: F811
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 1)).to("cuda")
    opt = optim.AdamW([{"params": [p for p in model.parameters() if p.ndim == n]} for n in (2, 1)])
    scaler = amp.GradScaler("cuda")
    scaler.scale(model(tg.ones(2, 4, device="cuda")).sum()).backward()
    kernels.names.clear()
    with standin.counting() as waits:
        scaler.unscale_(opt)
    assert kernels.names == ["unscale"] * 2 and waits == []

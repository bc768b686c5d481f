"""kernels/cuda/cudnn.py without a GPU: graphs that the real cuDNN accepts where it is installed, and, with a stand-in
for cuDNN, what is computed, that packed projections and gradients are not copied, and the way back where it refuses."""

from __future__ import annotations

import math
import types
import warnings

import numpy as np
import pytest
import standin
from standin_device import kernels  # noqa: F401
from test_standin_training import make

import tensorgrad as tg
from tensorgrad.kernels.cuda import cudnn as ours

pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
DIM = 16


def packed(batch, length, heads, groups, dim):
    """Sizes and strides of q, k, v in a packed projection, and of the output and the gradients."""
    row = (heads + 2 * groups) * dim
    sizes = [(batch, n, length, dim) for n in (heads, groups, groups)]
    inside = [(s, (length * row, dim, row, 1)) for s in sizes]
    out = (sizes[0], (length * heads * dim, dim, heads * dim, 1))
    return inside, out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("heads, groups", [(12, 12), (8, 2)])
def test_the_real_cudnn_accepts_the_graphs(heads, groups, dtype):
    cudnn = pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    try:
        cudnn.backend_version()
    except Exception as error:
        pytest.skip(f"libcudnn is not installed: {error}")
    inside, out = packed(2, 128, heads, groups, 64)
    for g in (ours.forward_graph(cudnn, *inside, out, dtype, True, 0.125, sm_version=90),
              ours.backward_graph(cudnn, *inside, out, tuple(inside), dtype, True, 0.125, sm_version=90)):
        g.validate()
        try:
            g.build_operation_graph()
        except RuntimeError as error:
            if "SUBLIBRARY_LOADING_FAILED" in str(error):
                pytest.skip("this version of libcudnn builds no graph without the NVIDIA driver")
            raise


class FakeTensor:
    def __init__(self, name, dim, stride, uid, data_type=None):
        self.name, self.dim, self.stride, self.uid = name, dim, stride, uid

    def set_output(self, value):
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def set_uid(self, uid):
        self.uid = uid
        return self

    def set_data_type(self, data_type):
        return self


class FakeGraph:
    """Attention on the addresses and strides that the graph was given, in float64."""

    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        self.dtype = tg.dtypes.as_dtype(io_data_type)

    def tensor(self, **options):
        return FakeTensor(**options)

    def sdpa(self, name, q, k, v, generate_stats, attn_scale, use_causal_mask):
        self.options, self.inputs = (attn_scale, use_causal_mask), (q, k, v)
        self.outputs = [FakeTensor("o", 0, 0, 0), FakeTensor("stats", 0, 0, 0)]
        return self.outputs

    def sdpa_backward(self, name, q, k, v, o, dO, stats, attn_scale, use_causal_mask):
        self.options, self.inputs = (attn_scale, use_causal_mask), (q, k, v, dO)
        self.outputs = [FakeTensor(n, 0, 0, 0) for n in ("dq", "dk", "dv")]
        return self.outputs

    def validate(self): ...
    def build_operation_graph(self): ...
    def create_execution_plans(self, modes): ...
    def check_support(self): ...
    def build_plans(self): ...

    def get_workspace_size(self):
        return 8

    def at(self, tensor, pointers, dtype=None):
        import ctypes

        dtype = dtype or self.dtype
        size = (sum((n - 1) * s for n, s in zip(tensor.dim, tensor.stride, strict=True)) + 1) * dtype.itemsize
        flat = np.frombuffer((ctypes.c_char * size).from_address(pointers[tensor.uid]), dtype)
        return np.lib.stride_tricks.as_strided(flat, tensor.dim, [s * dtype.itemsize for s in tensor.stride])

    def execute(self, pointers, workspace, handle):
        scale, causal = self.options
        q, k, v, *g = (self.at(t, pointers).astype(np.float64) for t in self.inputs)
        share = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, share, 1), np.repeat(v, share, 1)
        scores = q @ k.swapaxes(-1, -2) * scale
        if causal:
            scores += np.where(np.tri(*scores.shape[-2:], dtype=bool), 0, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        if not g:
            self.at(self.outputs[0], pointers)[...] = (p @ v).astype(self.dtype)
            self.at(self.outputs[1], pointers, np.dtype(np.float32))[...] = 0
            return
        dp = g[0] @ v.swapaxes(-1, -2)
        ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
        whole = ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ g[0]
        for out, x in zip(self.outputs, whole, strict=True):
            view = self.at(out, pointers)
            view[...] = x.reshape(x.shape[0], view.shape[1], -1, *x.shape[2:]).sum(2).astype(self.dtype)


def fake(refuse=None):
    """cuDNN; it refuses to "plan" or to "execute"."""

    def no(*arguments, **options):
        raise RuntimeError("no engine for this graph\nand more")

    def pygraph(**options):
        graph = FakeGraph(**options) if refuse != "plan" else no()
        if refuse == "execute":
            graph.execute = no
        return graph

    kinds = types.SimpleNamespace(BFLOAT16="bfloat16", HALF="float16", FLOAT="float32")
    return types.SimpleNamespace(pygraph=pygraph, data_type=kinds, heur_mode=types.SimpleNamespace(A=0, FALLBACK=1),
                                 set_stream=lambda handle, pointer: None)


@pytest.fixture
def fused(kernels, monkeypatch):  # noqa: F811
    attention = ours.Cudnn(standin, fake(), 1)
    monkeypatch.setattr(ours, "_states", {(standin, 0): attention})
    monkeypatch.setattr(ours, "LENGTHS", 8)
    return attention


def gradients(dtype="bfloat16", **fields):
    model = make("cuda", n_embd=32, **fields)
    rng = np.random.default_rng(0)
    x = tg.tensor(rng.integers(0, 300, (2, 8)), device="cuda")
    with tg.autocast(dtype):
        loss = model(x, x)[1]
    loss.backward()
    return loss.item(), [p.grad.cpu().numpy() for p in model.parameters()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fields", [{}, dict(n_kv_head=1), dict(position="rotary")], ids=str)
def test_the_model_computes_the_same(fields, dtype, fused, monkeypatch):
    got = gradients(dtype, **fields)
    assert len(fused.plans) == 2 and None not in fused.plans.values()
    monkeypatch.setattr(ours, "_states", {(standin, 0): None})
    want = gradients(dtype, **fields)
    assert got[0] == pytest.approx(want[0], rel=2e-3)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, atol=0.03 * np.abs(b).max() + 1e-6)


def test_projections_and_their_gradient_stay_packed(fused, monkeypatch):
    """q, k, v are read in the projection's output; dq, dk, dv come as one array, which its gradient reads."""
    seen = []
    run = fused._run
    monkeypatch.setattr(fused, "_run", lambda make, arguments, arrays: (
        seen.append(dict(enumerate(arrays, 1))) or run(make, arguments, arrays)))
    gradients()
    forward, backward = seen[0], seen[-1]
    row = 3 * 32 * 2
    for arrays, first in ((forward, 1), (backward, 7)):
        q, k, v = (arrays[first + i] for i in range(3))
        assert q.strides == k.strides == v.strides and q.strides[2] == row
        assert k.data.ptr - q.data.ptr == v.data.ptr - k.data.ptr == 32 * 2
    assert forward[4].strides[2] == 32 * 2  # the heads of the output lie side by side


@pytest.mark.parametrize("what", ["plan", "execute"])
def test_what_cudnn_refuses_runs_without_it_and_is_told_once(what, kernels, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ours, "LENGTHS", 8)
    monkeypatch.setattr(ours, "_states", {(standin, 0): ours.Cudnn(standin, fake(refuse=what), 1)})
    with pytest.warns(UserWarning, match="cuDNN refuses this attention, .*: no engine for this graph$") as told:
        got = gradients()
    assert len(told) == 1 and "softmax_forward" in kernels.names
    monkeypatch.setattr(ours, "_states", {(standin, 0): None})
    assert gradients()[0] == got[0]


def test_only_what_it_can_take(fused):
    def attend(dtype="bfloat16", dim=DIM, length=8, keys=8, **options):
        q, k = (tg.randn(1, 2, n, dim, device="cuda").to(getattr(tg, dtype)) for n in (length, keys))
        tg.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, scale=1 / math.sqrt(dim), **options)

    for options in (dict(dtype="float32"), dict(dropout_p=0.5), dict(dim=6), dict(length=1), dict(keys=9)):
        attend(**options)
    assert fused.plans == {}
    attend()
    assert len(fused.plans) == 1


def test_without_cudnn_nothing_is_said(monkeypatch):
    xp = types.SimpleNamespace(__name__="cupy", cuda=types.SimpleNamespace(
        Device=lambda: types.SimpleNamespace(id=0, compute_capability="90")))
    monkeypatch.setitem(__import__("sys").modules, "cudnn", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours._open(xp) is None
    broken = types.SimpleNamespace(create_handle=lambda: 1 / 0)
    monkeypatch.setitem(__import__("sys").modules, "cudnn", broken)
    with pytest.warns(UserWarning, match="cuDNN is installed but cannot be used"):
        assert ours._open(xp) is None
    monkeypatch.setenv("TENSORGRAD_CUDNN", "0")
    assert ours._open(xp) is None

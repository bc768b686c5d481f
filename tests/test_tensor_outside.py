"""Tensors and the world outside: files, NumPy, DLPack, text, devices, random state."""
import copy
import pickle

import numpy as np
import pytest

import tensorgrad as tg
from tensorgrad.device import DeviceError

torch = None
try:
    import torch
except ImportError:
    pass
needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed")


def test_save_and_load_also_what_is_not_contiguous(tmp_path):
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {"t": tg.from_numpy(a.T), "strided": tg.from_numpy(a)[:, ::2], "f": np.asfortranarray(a),
               "i": tg.arange(3), "scalar": tg.tensor(2.5), "empty": tg.zeros(0, 3)}
    tg.save(tensors, tmp_path / "x.safetensors", {"note": "kept"})
    loaded = tg.load(tmp_path / "x.safetensors")
    for name, value in tensors.items():
        value = value if isinstance(value, np.ndarray) else value.numpy()
        assert loaded[name].shape == value.shape and loaded[name].dtype == value.dtype
        np.testing.assert_array_equal(loaded[name].numpy(), value)
    from tensorgrad.io import load_metadata
    assert load_metadata(tmp_path / "x.safetensors")["note"] == "kept"


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    tg.save({"a": tg.ones(2)}, path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        tg.save({"a": tg.zeros(2)}, path)
    assert tg.load(path)["a"].tolist() == [1.0, 1.0] and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_load_of_what_is_no_safetensors_file(tmp_path):
    (tmp_path / "x").write_bytes(b"not a header")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        tg.load(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no file"):
        tg.load(tmp_path / "y")
    with pytest.raises(TypeError, match="'a' is a list"):
        tg.save({"a": [1]}, tmp_path / "z")


def test_numpy_shares_memory_and_refuses_a_gradient():
    x = tg.zeros(3)
    x.numpy()[1] = 5
    assert x.tolist() == [0.0, 5.0, 0.0] and np.asarray(x) is not None
    a = np.ones(2)
    t = tg.from_numpy(a)
    a[0] = 7
    assert t[0].item() == 7 and tg.tensor(a) is not t and tg.tensor(a).dtype == tg.float64
    with pytest.raises(RuntimeError, match="detach"):
        tg.ones(2, requires_grad=True).numpy()
    with pytest.raises(RuntimeError, match="detach"):
        np.asarray(tg.ones(2, requires_grad=True))


def test_array_times_tensor_is_a_tensor():
    x = tg.ones(3, dtype=tg.float64, requires_grad=True)
    for y in (np.arange(3.0) * x, np.arange(3.0) + x, np.arange(3.0) - x, np.arange(3.0) / x, np.float64(2) * x,
              np.ones((2, 3)) @ x):
        assert isinstance(y, tg.Tensor) and y.requires_grad


def test_dlpack_both_ways():
    a = np.arange(6.0).reshape(2, 3)
    t = tg.from_dlpack(a)
    a[0, 0] = 9
    assert t[0, 0].item() == 9
    assert np.from_dlpack(tg.ones(3)).tolist() == [1, 1, 1]
    with pytest.raises(BufferError, match="detach"):
        np.from_dlpack(tg.ones(3, requires_grad=True))


@needs_torch
def test_dlpack_with_torch():
    assert tg.from_dlpack(torch.arange(3)).tolist() == [0, 1, 2]
    assert torch.from_dlpack(tg.ones(2, 2)).sum().item() == 4


@needs_torch
@pytest.mark.parametrize("values", [
    [1.0, 2.5, -3.25], [[1.0, 2.0], [3.0, 4.0]], 3.0, [1, 20, 300], [True, False], [1e-5, 1.0], [1e10, 1.0],
    [0.0, -0.5],
    [float("nan"), 1.0], [float("inf"), -1.5], [[[0.1]]], [100000.0, 2.0], [1e-8], [], [[1, 2], [3, 4]], 7, True,
    [0.001, 0.01], [123456.789, 0.1], [1.5] * 30,
], ids=str)
def test_prints_like_torch(values):
    assert repr(tg.tensor(values)) == repr(torch.tensor(values))


@needs_torch
def test_prints_attributes_and_summaries_like_torch():
    assert repr(tg.ones(2, requires_grad=True)) == repr(torch.ones(2, requires_grad=True))
    assert repr(tg.ones(2, dtype=tg.float64)).replace("float64", "torch.float64") == repr(torch.ones(2).double())
    assert repr(tg.arange(2000)) == repr(torch.arange(2000))
    assert repr(tg.zeros(50, 50)) == repr(torch.zeros(50, 50))
    assert "grad_fn=<exp>" in repr(tg.ones(1, requires_grad=True).exp())


def test_to_copies_with_a_gradient():
    x = tg.ones(2, requires_grad=True)
    x.to(tg.float64).sum().backward()
    assert x.grad.dtype == tg.float32 and x.to("cpu") is x and x.to(tg.float32) is x


def test_absent_devices_say_what_is_missing():
    with pytest.raises(DeviceError, match="devices are 'cpu', 'cuda'"):
        tg.ones(1, device="tpu")
    if not tg.cuda.is_available():
        with pytest.raises(DeviceError) as caught:
            tg.ones(1, device="cuda")
        assert "\n" not in str(caught.value) and ("pip install" in str(caught.value) or "driver" in str(caught.value))
    with pytest.raises(DeviceError):
        tg.ones(1, device="cuda:99")


def test_random_state_restores_everything():
    tg.manual_seed(3)
    tg.rand(5)
    state = tg.get_rng_state()
    first = [tg.rand(3).tolist(), tg.randn(3).tolist(), tg.randperm(9).tolist(), tg.randint(0, 9, (4,)).tolist()]
    tg.set_rng_state(state)
    again = [tg.rand(3).tolist(), tg.randn(3).tolist(), tg.randperm(9).tolist(), tg.randint(0, 9, (4,)).tolist()]
    assert first == again and first[0] != tg.rand(3).tolist()
    a, b = tg.Generator(seed=1), tg.Generator(seed=1)
    assert tg.rand(4, generator=a).tolist() == tg.rand(4, generator=b).tolist()


def test_deepcopy_and_pickle_of_leaves():
    x = tg.randn(2, 3, requires_grad=True)
    for y in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert y.requires_grad and y.tolist() == x.tolist() and not np.shares_memory(x.array, y.array)
    with pytest.raises(RuntimeError, match="leaf"):
        copy.deepcopy(x * 2)


def test_errors_name_op_shapes_and_remedy():
    with pytest.raises(ValueError, match=r"matmul: \(8, 64, 768\) @ \(512, 768\): .*768 and 512 differ; .*mean b.mT"):
        tg.zeros(8, 64, 768) @ tg.zeros(512, 768)
    with pytest.raises(ValueError, match=r"add: \(3,\) \+ \(4,\): these shapes do not broadcast"):
        tg.zeros(3) + tg.zeros(4)
    with pytest.raises(TypeError, match="expected a Tensor, got list"):
        tg.ones(2) @ [1.0]

"""The small product inside compiled kernels, and the panels that it reads, against NumPy in float64."""
import numpy as np
import pytest

pytest.importorskip("numba", reason="needs the extra fast")
from tensorgrad.kernels.compiled_math import F32, njit_fast  # noqa: E402
from tensorgrad.kernels.compiled_tile import ROWS, WIDTH, pack, pack_transposed, room, tile  # noqa: E402


@njit_fast
def one_tile(k, a, row, step, panel, c, c_row, scale, add):
    tile(k, a, a + row, a + 2 * row, a + 3 * row, step, panel, c, c + c_row, c + 2 * c_row, c + 3 * c_row, scale, add)


@pytest.mark.parametrize("k", [0, 1, 2, 7, 64, 301])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_tile(k, transposed, add):
    """The rest of the result's rows is left alone; what stands there counts only if it is added to."""
    rng = np.random.default_rng(k)
    a, b = rng.standard_normal((ROWS, k)).astype(np.float32), rng.standard_normal((k, WIDTH)).astype(np.float32)
    c = np.full((ROWS, WIDTH + 3), 0.5 if add else np.nan, np.float32)
    c[:, WIDTH:] = 9
    stored = np.array(a, order="F" if transposed else "C")
    one_tile(k, stored.ctypes.data, stored.strides[0], stored.strides[1], b.ctypes.data, c.ctypes.data, c.strides[0],
             F32(2), add)
    want = 2 * (a.astype(float) @ b) + (0.5 if add else 0)
    np.testing.assert_allclose(c[:, :WIDTH], want, rtol=2e-5, atol=2e-5 * np.abs(want).max(initial=1))
    assert (c[:, WIDTH:] == 9).all()


@pytest.mark.parametrize("columns", [1, WIDTH - 1, WIDTH, WIDTH + 1, 3 * WIDTH + 5])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_panels(columns, k):
    """Both ways give the same panels; the last is filled up with zeros; rows may lie apart."""
    wide = np.random.default_rng(0).standard_normal((k, columns + 4)).astype(np.float32)
    b = wide[:, :columns]
    turned = np.ascontiguousarray(b.T)
    panels = np.full((2, room(columns, k)), np.nan, np.float32)
    pack(b.ctypes.data, b.strides[0], k, columns, panels[0])
    pack_transposed(turned.ctypes.data, turned.strides[0], columns, k, panels[1])
    want = np.zeros((k, room(columns, 1)), np.float32)
    want[:, :columns] = b
    want = want.reshape(k, -1, WIDTH).transpose(1, 0, 2)  # (panels, k, WIDTH)
    np.testing.assert_array_equal(panels, np.broadcast_to(want.reshape(-1), panels.shape))

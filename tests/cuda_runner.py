"""What the cases of the CUDA kernels (cuda_cases.py) are written with: arrays, launches and comparisons."""

import math
from dataclasses import dataclass

import numpy as np
from cuda_emulator import dtype_of

from tensorgrad.kernels.cuda.signatures import KERNELS

ROUNDING = {"float32": 2.0**-22, "bfloat16": 2.0**-8, "float16": 2.0**-10}  # an ulp or two: half of one is the rounding
NOISE = 3e-6  # of float32 arithmetic, times the largest value in sight


@dataclass
class Runner:
    """One kernel family at one choice of types; `offset` elements before each array make its address odd."""

    launcher: object
    name: str
    types: tuple
    offset: int = 0

    def __post_init__(self):
        self.rng = np.random.default_rng(5)
        self.letters = dict(zip(KERNELS[self.name].template, self.types, strict=True))

    def dtype(self, letter):
        return dtype_of(self.letters.get(letter, letter))

    def empty(self, shape, letter="float32"):
        """An array full of NaN (of 0 for integers)."""
        dtype = self.dtype(letter)
        flat = np.full(math.prod(shape) + self.offset, np.nan if dtype.kind not in "iu" else 0).astype(dtype)
        return flat[self.offset :].reshape(shape)

    def given(self, values, letter="float32"):
        """`values` in the dtype of `letter`, on an address of the Runner's kind."""
        array = self.empty(np.shape(values), letter)
        array[...] = values
        return array

    def normal(self, *shape, letter="float32", scale=1.0):
        return self.given(self.rng.standard_normal(shape) * scale, letter)

    def launch(self, name, *values, types=None):
        self.launcher.launch(name, self.types if types is None else types, *values)

    def close(self, got, want, letter="float32", scale=None, what=""):
        """Is `got` what `want` (float64) rounds to, up to the noise of float32 sums of size `scale`? Infinities and NaN
        must be where `want` has them."""
        want = np.broadcast_to(np.asarray(want, np.float64), got.shape)
        if not got.size:
            return
        got, odd = wide(got), ~np.isfinite(want)
        np.testing.assert_array_equal(got[odd], want[odd], what or letter)
        want = np.where(odd, 0, want)
        if scale is None:
            scale = np.abs(want).max()
        allowed = ROUNDING[self.letters.get(letter, letter)] * np.abs(want) + NOISE * scale + 1e-7
        error = np.where(odd, 0, np.abs(got - want))
        worst = np.unravel_index(np.argmax(np.nan_to_num(error / allowed, nan=np.inf)), got.shape)
        times = error[worst] / allowed[worst]
        assert (error <= allowed).all(), (
            f"{what or letter}{[*map(int, worst)]}: {got[worst]}, not {want[worst]}; {times:.3g} times the tolerance"
        )


def wide(array):
    return array.astype(np.float64)

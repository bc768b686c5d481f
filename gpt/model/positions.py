"""Order: fixed position vectors, and rotations of queries and keys. (Learned positions are an nn.Embedding.)

Tables are computed once per length, dtype and device and shared by all layers; they are no part of the weights.
"""
import math
from functools import lru_cache

import tensorgrad as tg


def _angles(length, dim, theta, stretch=None):
    """Position times frequency theta**(-2i/dim), stretched or not, float64: (length, dim/2)."""
    positions = tg.arange(length, dtype=tg.float64).unsqueeze(1)               # (length, 1)
    return positions * stretched_frequencies(dim, theta, stretch)              # (length, dim/2)


def stretched_frequencies(dim, theta, stretch=None):
    """theta**(-2i/dim), float64 (dim/2,), where `stretch` is None. Else it is (factor, between): frequencies are
    divided by the factor, all of them where `between` is None; else those of wavelengths above between[0] in full,
    below between[1] not at all, and those in between in part (Llama 3.1)."""
    exponents = tg.arange(0, dim, 2, dtype=tg.float64) / dim                   # (dim/2,)
    frequencies = (exponents * -math.log(theta)).exp()
    if stretch is None:
        return frequencies
    factor, between = stretch
    if between is None:
        return frequencies / factor
    longest, shortest = between
    turns = frequencies / (2 * math.pi)                                        # 1 / wavelength
    kept = ((turns - 1 / longest) / (1 / shortest - 1 / longest)).clamp(0, 1)  # share that is not stretched
    return frequencies * kept + frequencies / factor * (1 - kept)


@lru_cache(maxsize=16)
def sinusoidal_table(length, dim, dtype, device):
    """(length, dim): sine in the even columns, cosine in the odd ones (Vaswani et al. 2017, section 3.5)."""
    with tg.no_grad():
        angles = _angles(length, dim, 10000.0)
        table = tg.stack([angles.sin(), angles.cos()], dim=-1)                 # (length, dim/2, 2)
        return table.reshape(length, dim).to(device=device, dtype=dtype)


@lru_cache(maxsize=16)
def rotary_table(length, head_dim, theta, dtype, device, stretch=None):
    """(cos, sin) of at least float32, each (length, head_dim): the angles twice in a row, as F.rotary wants them.
    `stretch`: GPTConfig.rope_stretch."""
    dtype = tg.promote_types(dtype, tg.float32)
    with tg.no_grad():
        angles = _angles(length, head_dim, theta, stretch)
        angles = tg.cat([angles, angles], dim=-1)                              # (length, head_dim)
        return angles.cos().to(device=device, dtype=dtype), angles.sin().to(device=device, dtype=dtype)

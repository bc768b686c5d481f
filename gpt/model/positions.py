"""Order: fixed position vectors, and rotations of queries and keys. (Learned positions are an nn.Embedding.)

Tables are computed once per length, dtype and device and shared by all layers; they are no part of the weights.
"""
import math
from functools import lru_cache

import tensorgrad as tg


def _angles(length, dim, theta):
    """Position times frequency theta**(-2i/dim), float64: (length, dim/2)."""
    exponents = tg.arange(0, dim, 2, dtype=tg.float64) / dim                   # (dim/2,)
    positions = tg.arange(length, dtype=tg.float64).unsqueeze(1)               # (length, 1)
    return positions * (exponents * -math.log(theta)).exp()                    # (length, dim/2)


@lru_cache(maxsize=16)
def sinusoidal_table(length, dim, dtype, device):
    """(length, dim): sine in the even columns, cosine in the odd ones (Vaswani et al. 2017, section 3.5)."""
    with tg.no_grad():
        angles = _angles(length, dim, 10000.0)
        table = tg.stack([angles.sin(), angles.cos()], dim=-1)                 # (length, dim/2, 2)
        return table.reshape(length, dim).to(device=device, dtype=dtype)


@lru_cache(maxsize=16)
def rotary_table(length, head_dim, theta, dtype, device):
    """(cos, sin) of at least float32, each (length, head_dim): the angles twice in a row, as `rotate` wants them."""
    dtype = tg.promote_types(dtype, tg.float32)
    with tg.no_grad():
        angles = _angles(length, head_dim, theta)
        angles = tg.cat([angles, angles], dim=-1)                              # (length, head_dim)
        return angles.cos().to(device=device, dtype=dtype), angles.sin().to(device=device, dtype=dtype)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + hs/2]) of x (B, nh, T, hs) by its position's angle (Su et al. 2021, "RoFormer"; the
    pairing and direction of Llama as in Hugging Face). cos, sin: (T, hs)."""
    low, high = x.chunk(2, dim=-1)                                             # (B, nh, T, hs/2) each
    return (x * cos + tg.cat([-high, low], dim=-1) * sin).to(x.dtype)

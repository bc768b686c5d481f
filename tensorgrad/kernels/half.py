"""The fused routines for float16 and bfloat16 where a device has none of its own for them: computed by the float32
ones, results rounded to 16 bits. Sums, statistics, losses and the gradients of weights stay in float32."""

import numpy as np

# Which results are as wide as the inputs; the others are float32.
NARROW = {
    "linear": (0,), "linear_backward": (0,), "matmul": (0,),
    "gelu": (0,), "gelu_backward": (0,), "silu": (0,), "silu_backward": (0,),
    "swiglu": (0,), "relu2": (0,), "relu2_backward": (0,), "rotary": (0,),
    "softmax": (0,), "softmax_backward": (0,), "log_softmax": (0,), "log_softmax_backward": (0,),
    "layer_norm": (0,), "layer_norm_backward": (0,), "rms_norm": (0,), "rms_norm_backward": (0,),
    "add_layer_norm": (0, 3), "add_layer_norm_backward": (0,), "add_rms_norm": (0, 2), "add_rms_norm_backward": (0,),
    "cross_entropy": (), "cross_entropy_backward": (0,), "embedding_backward": (), "dropout": (0,),
    "attention": (0,), "attention_backward": (0, 1, 2),
}  # fmt: skip


def is_half(dtype):
    """Is it float16 or bfloat16?"""
    return dtype.itemsize == 2 and dtype.kind in "fV"


class HalfRoutines:
    """A module of routines, `base`, that takes 16-bit arrays too."""

    def __init__(self, base):
        self._base = base

    def __getattr__(self, name):
        routine, narrow = getattr(self._base, name), NARROW[name]

        def run(*arguments):
            dtype, wide = None, []
            for a in arguments:
                if hasattr(a, "dtype") and hasattr(a, "astype") and is_half(a.dtype):
                    dtype = dtype or a.dtype
                    a = a.astype(np.float32)
                wide.append(a)
            result = routine(*wide)
            if not isinstance(result, tuple):
                return result if result is None or not narrow else result.astype(dtype)
            return tuple(
                r.astype(dtype) if i in narrow and r is not None else r for i, r in enumerate(result)
            )

        self.__dict__[name] = run  # found at once from now on
        return run

    def embedding(self, xp, weight, ids):
        return self._base.embedding(xp, weight, ids)  # rows are only moved

    def swiglu_backward(self, xp, gate, value, g, dgate, dvalue):
        gradients = [xp.empty(a.shape, np.float32) for a in (dgate, dvalue)]
        self._base.swiglu_backward(xp, *(a.astype(np.float32) for a in (gate, value, g)), *gradients)
        dgate[...], dvalue[...] = (a.astype(dgate.dtype) for a in gradients)

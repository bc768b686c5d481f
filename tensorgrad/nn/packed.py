"""PackedWeight: a matrix that lies in memory in 16 or 8 bits and computes as float32 (see kernels/packed.py)."""

import numpy as np

from ..device import device
from ..engine import wrap
from ..kernels import packed
from .parameter import Parameter


class PackedWeight(Parameter):
    """A frozen weight (out, in) of a Linear or Embedding that is stored narrow and computes as float32.

    `array`: uint16, the bits of bfloat16; float16; or int8 with `scale`, a float32 array (out, groups). Its memory is
    shared, so that a file may stay mapped. Takes no gradient: asking for one is a TypeError."""

    def __init__(self, array, scale=None):
        if array.dtype not in (np.uint16, np.float16, np.int8) or (array.dtype == np.int8) != (scale is not None):
            raise TypeError(f"PackedWeight: needs uint16, float16, or int8 with a scale, got {array.dtype}")
        super().__init__(wrap(array, device("cpu")), requires_grad=False)
        self.scale = scale

    @property
    def kind(self):
        """"bfloat16", "float16" or "int8"."""
        return {"uint16": "bfloat16"}.get(self.array.dtype.name, self.array.dtype.name)

    def requires_grad_(self, requires_grad=True):
        if requires_grad:
            raise TypeError(f"a weight stored as {self.kind} takes no gradient; load the model in float32 to train it, "
                            "or train LoRA adapters on it")
        return self

    def detach(self):
        """The values as a float32 Tensor, so that state_dict and what is saved hold them; it cannot be written to, as
        nothing of that would arrive here."""
        values = self.widened()
        values.array.flags.writeable = False
        return values

    def widened(self, rows=slice(None)):
        """The values, or those of some rows, as a float32 Tensor of its own."""
        scale = None if self.scale is None else self.scale[rows]
        return wrap(packed.widen(np, self.array[rows], scale), self.device)

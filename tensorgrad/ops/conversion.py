"""Copies, dtypes and devices: clone, to, float, cpu ..."""

from .. import dtypes
from ..device import Device
from ..device import device as as_device
from ..engine import Op, apply
from .common import cast, is_tensor


class Copy(Op):
    """A copy in C order."""

    def forward(ctx, x):
        return x.copy()

    def backward(ctx, g):
        return g


class ToDevice(Op):
    """A copy on another device; the gradient travels back."""

    def forward(ctx, x, target):
        ctx.source, ctx.device = ctx.device, target
        return target.copy_from(ctx.source, x)

    def backward(ctx, g):
        return apply(ToDevice, g, target=ctx.source)


class ConversionMethods:
    """PyTorch's converting methods; copies between dtypes and devices carry the gradient."""

    def clone(self):
        """A copy that passes the gradient on."""
        return apply(Copy, self)

    def to(self, *args, device=None, dtype=None, copy=False):
        """self with another dtype and/or on another device: to("cuda"), to(tg.float64), to(other_tensor). Both are
        operations with a gradient. Returns self where nothing changes (unless copy)."""
        for arg in args:
            if is_tensor(arg):
                device, dtype = arg.device, arg.array.dtype
            elif isinstance(arg, Device) or (isinstance(arg, str) and arg.partition(":")[0] in ("cpu", "cuda")):
                device = arg
            elif isinstance(arg, bool):
                copy = arg
            else:
                dtype = arg
        result = self
        if dtype is not None:
            result = cast(result, dtypes.as_dtype(dtype))
        if device is not None and as_device(device) is not self.device:
            result = apply(ToDevice, result, target=as_device(device))
        return result.clone() if copy and result is self else result

    def type_as(self, other):
        return cast(self, other.array.dtype)

    def float(self):
        return cast(self, dtypes.float32)

    def double(self):
        return cast(self, dtypes.float64)

    def half(self):
        return cast(self, dtypes.float16)

    def bfloat16(self):
        return cast(self, dtypes.bfloat16_dtype())

    def long(self):
        return cast(self, dtypes.int64)

    def int(self):
        return cast(self, dtypes.int32)

    def bool(self):
        return cast(self, dtypes.bool)

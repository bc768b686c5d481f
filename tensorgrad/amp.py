"""Automatic mixed precision: products in 16 bits, everything that adds up in 32 (Micikevicius et al. 2018,
arXiv:1710.03740), with torch.amp's names.

    with tg.autocast("bfloat16"):
        logits, loss = model(x, y)
    loss.backward()

Inside, `linear`, `matmul` and its relatives, and attention compute in 16 bits from whatever they get (float64 is left
alone); weights are cast once and kept until they change; losses compute in float32. Everything else keeps the dtype it
is given and accumulates in float32. Weights and their gradients stay float32. So does torch.autocast on a CPU, and here
it is so on every device. float16 needs a GradScaler, because its smallest gradients would vanish; bfloat16 does not.
"""

from contextlib import ContextDecorator

import numpy as np

from . import dtypes
from .engine import modes, wrap
from .kernels import routines
from .nn.utils import merged

_KINDS = ("cpu", "cuda")
_DEFAULT = {"cpu": "bfloat16", "cuda": "float16"}  # PyTorch's


class autocast(ContextDecorator):
    """Products in 16 bits inside `with` (or a decorated function), to any depth.

    `autocast("bfloat16")`, `autocast(dtype=tg.float16)`: on all devices; `autocast("cuda", dtype=tg.bfloat16)`: on one
    kind, by default float16 on CUDA and bfloat16 on the CPU. enabled=False switches an outer context off inside.
    cache_enabled is accepted; casts of weights are always kept, until the weight changes."""

    def __init__(self, device_type=None, dtype=None, enabled=True, cache_enabled=True):
        if device_type is not None and str(device_type).partition(":")[0] not in _KINDS:  # autocast("bfloat16")
            if dtype is not None:
                raise ValueError(f"autocast: the device type is 'cpu' or 'cuda', not {device_type!r}")
            device_type, dtype = None, device_type
        kinds = _KINDS if device_type is None else (str(device_type).partition(":")[0],)
        self._dtypes = {}
        for kind in kinds:
            chosen = dtypes.as_dtype(dtype or _DEFAULT[kind]) if enabled else None
            if chosen is not None and chosen.name not in ("float16", "bfloat16"):
                raise ValueError(f"autocast: dtype must be bfloat16 or float16, not {chosen}")
            self._dtypes[kind] = chosen
        self._before = []

    def _recreate_cm(self):
        other = autocast.__new__(autocast)  # a decorated function may run in several threads at once
        other._dtypes, other._before = self._dtypes, []
        return other

    def __enter__(self):
        self._before.append(modes.autocast)
        table = {**(modes.autocast or {}), **self._dtypes}
        modes.autocast = table if any(table.values()) else None
        return self

    def __exit__(self, *error):
        modes.autocast = self._before.pop()


def is_autocast_enabled(device_type=None):
    """Are products of tensors on `device_type` ("cpu", "cuda"; any, unless given) computed in 16 bits here?"""
    table = modes.autocast or {}
    return any(table.values()) if device_type is None else table.get(device_type) is not None


def get_autocast_dtype(device_type):
    """The 16-bit dtype in force for "cpu" or "cuda", or what autocast(device_type) would take."""
    return (modes.autocast or {}).get(device_type) or dtypes.as_dtype(_DEFAULT[device_type])


class GradScaler:
    """Scales the loss so that float16 gradients do not vanish, as torch.amp.GradScaler.

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)             # before clipping
        clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)                 # left out where a gradient is infinite or nan
        scaler.update()

    The factor starts at `init_scale`, is multiplied by `backoff_factor` after a step with a gradient that is not finite
    and by `growth_factor` after `growth_interval` steps in a row without. Factor and flag live on the device of the
    loss. `step` reads the flag, which waits for the device; `step(optimizer, wait=False)` does not: a GPU reads it
    itself and leaves everything as it is, also the number of updates. The results are the same."""

    def __init__(
        self,
        device="cuda",
        init_scale=65536.0,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=2000,
        enabled=True,
    ):
        if growth_factor <= 1 or not 0 < backoff_factor < 1:
            raise ValueError("GradScaler: growth_factor must be above 1 and backoff_factor between 0 and 1")
        self._options = {"growth_factor": float(growth_factor), "backoff_factor": float(backoff_factor),
                         "growth_interval": int(growth_interval)}  # fmt: skip
        self._enabled, self._initial = enabled, (float(init_scale), 0)
        self._scale = self._streak = None  # 0-d arrays on the loss's device, made there when it is first seen
        self._device = None
        self._found = {}  # optimizer -> 0-d int32 array, 1 where a gradient was not finite

    def is_enabled(self):
        return self._enabled

    def get_scale(self):
        """The present factor; waits for the device."""
        if not self._enabled:
            return 1.0
        return self._initial[0] if self._scale is None else float(self._device.item(self._scale))

    def scale(self, outputs):
        """A loss (or several) times the factor."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, tuple | list):
            return type(outputs)(self.scale(o) for o in outputs)
        self._settle(outputs.device)
        return outputs * wrap(self._scale, self._device).to(outputs.device)

    def _settle(self, device):
        if self._scale is None:
            self._device = device
            self._scale = device.asarray(np.float32(self._initial[0]))
            self._streak = device.asarray(np.int32(self._initial[1]))

    def unscale_(self, optimizer):
        """Divide the gradients of the optimizer's parameters by the factor and note whether all are finite."""
        if not self._enabled:
            return
        if optimizer in self._found:
            raise RuntimeError("GradScaler: unscale_() was already called for this optimizer since the last update()")
        if self._scale is None:
            raise RuntimeError("GradScaler: no loss was scaled yet; call scale(loss).backward() first")
        xp, inverse = self._device.xp, 1.0 / self._scale
        found = xp.zeros((), np.int32)
        gradients = _gradients(optimizer)
        for array in merged([g.array for g in gradients]):  # the optimizer's flat buffer as a whole
            flat = array.reshape(-1)
            routines(self._device).unscale(xp, flat, inverse, found)
            if not array.flags.c_contiguous:  # `flat` is a copy
                array[...] = flat.reshape(array.shape)
        for g in gradients:
            g._bump()
        self._found[optimizer] = found

    def step(self, optimizer, wait=True, **options):
        """optimizer.step(**options), left out where unscaling (done now, unless it was) found a gradient that is not
        finite."""
        if not self._enabled:
            return optimizer.step(**options)
        if optimizer not in self._found:
            self.unscale_(optimizer)
        found = self._found[optimizer]
        if wait:
            return None if self._device.item(found) else optimizer.step(**options)
        return optimizer.step(**options, found_inf=wrap(found, self._device))

    def update(self, new_scale=None):
        """Adapt the factor to what the steps since the last update found, or set it to `new_scale`."""
        if not self._enabled:
            return
        if new_scale is not None:
            self._scale = self._device.asarray(np.float32(new_scale))
        else:
            if not self._found:
                raise RuntimeError("GradScaler: update() before any step()")
            xp, options = self._device.xp, self._options
            bad = sum(f.astype(np.int32) for f in self._found.values()) > 0
            streak = xp.where(bad, 0, self._streak + 1).astype(np.int32)
            grow = streak >= options["growth_interval"]
            factor = xp.where(bad, options["backoff_factor"], xp.where(grow, options["growth_factor"], 1.0))
            self._scale = self._device.xp.asarray((self._scale * factor).astype(np.float32))
            self._streak = xp.asarray(xp.where(grow, 0, streak).astype(np.int32))
        self._found = {}

    def state_dict(self):
        """{"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}; waits for the device."""
        if not self._enabled:
            return {}
        streak = self._initial[1] if self._streak is None else int(self._device.item(self._streak))
        return {"scale": self.get_scale(), **self._options, "_growth_tracker": streak}

    def load_state_dict(self, state_dict):
        """Take over what `state_dict()` returned, here or in PyTorch."""
        if not self._enabled:
            return
        if not state_dict:
            raise RuntimeError("GradScaler: the state is empty; was it saved by a disabled scaler?")
        self._initial = float(state_dict["scale"]), int(state_dict["_growth_tracker"])
        self._options = {name: type(value)(state_dict[name]) for name, value in self._options.items()}
        self._scale = self._streak = None


def _gradients(optimizer):
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


__all__ = ["GradScaler", "autocast", "get_autocast_dtype", "is_autocast_enabled"]

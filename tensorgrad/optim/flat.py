"""Flat storage: the parameters of a group, their gradients and their optimizer state, each in one array.

    data    [ weight  pad | bias  pad | weight ... ]     every parameter's array is a view into `data`
    grad    [   ...       |   ...     |   ...      ]     the engine accumulates gradients here
    state   [   ...       |   ...     |   ...      ]     one array per name, e.g. exp_avg and exp_avg_sq

One update, one norm, one all-reduce per step then go over contiguous memory, in blocks that stay in the cache, without
allocating. Padding keeps every parameter on a 64-byte boundary relative to the start; it is zero and stays zero.
"""

from sys import getrefcount

import numpy as np

from ..engine import wrap
from ..kernels import routines
from ..kernels.reference_update import is_one
from ..nn.utils import block_size

_ALIGN = 64  # bytes
_probe = [object()]
_UNSHARED = getrefcount(_probe[0])  # what getrefcount(some_list[i]) gives for an object that only the list holds


class FlatBuffer:
    """Parameters of one dtype on one device, laid end to end.

    `data`, `grad` and `state[name]` are 1-D arrays in which `params[i]` occupies `spans[i]` = (start, stop); `steps[i]`
    counts its updates. Laying out copies the values: what shared a parameter's memory before no longer does."""

    _shadow = None
    _left_out = None  # (which parameters had a gradient, 0-d array: how many of their updates the device has left out)

    def __init__(self, params, state_names):
        self.params = params
        self.device, self.dtype = params[0].device, params[0].dtype
        self.spans, self.steps = [], [0] * len(params)
        multiple, size = _ALIGN // self.dtype.itemsize, 0
        for p in params:
            self.spans.append((size, size + p.numel()))
            size += -(-p.numel() // multiple) * multiple
        self.block = min(size, block_size(self.device))
        zeros = self.device.xp.zeros
        self.data, self.grad = zeros(size, self.dtype), zeros(size, self.dtype)
        self.state = {name: zeros(size, self.dtype) for name in state_names}
        self.scratch = zeros((2, self.block), self.dtype)
        self._data_views, self._grad_views = self._views(self.data), self._views(self.grad)
        for i in range(len(params)):
            self._adopt(i)

    def view(self, flat, i):
        """Parameter i's part of one of the flat arrays, in its shape."""
        start, stop = self.spans[i]
        return flat[start:stop].reshape(self.params[i].shape)

    def _views(self, flat):
        return [self.view(flat, i) for i in range(len(self.params))]

    def state_of(self, i):
        """name -> Tensor with the shape of `params[i]`: views into the state."""
        return {name: wrap(self.view(flat, i), self.device) for name, flat in self.state.items()}

    def fits(self, i):
        """Can `params[i]`, whose array somebody may have replaced, live here?"""
        p = self.params[i]
        return p.device is self.device and p.dtype == self.dtype and p.array.shape == self._data_views[i].shape

    def _adopt(self, i):
        p, view = self.params[i], self._data_views[i]
        view[...] = p.array
        p.array = view
        self._adopt_grad(i)

    def _adopt_grad(self, i):
        """Bring the gradient of parameter i into `grad`, where the engine may have put it already."""
        p = self.params[i]
        p._grad_buffer = None
        if p.grad is not None:
            if p.grad.array is self._grad_views[i]:
                return
            self._take_back(i)
            self._grad_views[i][...] = p.grad.array
        self.lend(i)

    def _is_held(self, i):
        """Does anybody still hold an earlier gradient of parameter i? It must not change under his hands."""
        return getrefcount(self._grad_views[i]) != _UNSHARED

    def _take_back(self, i):
        """Let nobody else hold the memory for the gradient of parameter i."""
        if self._is_held(i):
            self.grad = self.grad.copy()  # the holder keeps the old memory
            self._grad_views = self._views(self.grad)

    def lend(self, i):
        """Let the engine accumulate the next gradient of parameter i in place, where that is possible."""
        p = self.params[i]
        p._grad_buffer = None
        if self.fits(i) and not self._is_held(i):
            p._grad_buffer = self._grad_views[i]

    def adopt_gradients(self, flags):
        """Let `grad` hold the gradients of the parameters whose flag is set, zeros where there is none yet, and `.grad`
        be views into it. The rest of `grad` is set to zero."""
        for i, p in enumerate(self.params):
            if p.grad is not None:
                self._adopt_grad(i)
            else:
                p._grad_buffer = None
                self._take_back(i)
                self._grad_views[i].fill(0)
                self.lend(i)
        for p, flag, view in zip(self.params, flags, self._grad_views, strict=True):
            if flag and (p.grad is None or p.grad.array is not view):
                p.grad = wrap(view, self.device)

    def gather(self):
        """Take in what was replaced from outside since the last step (`p.data = ...`, `p.grad = ...`) and return the
        runs to update: (first, last, step), parameters first..last-1 that have a gradient and whose number of updates
        becomes `step`. Parameters without gradient are left out, as in PyTorch."""
        runs = []
        for i, p in enumerate(self.params):
            if p.array is not self._data_views[i]:
                self._adopt(i)
            if p.grad is None:
                continue
            self._adopt_grad(i)
            self.steps[i] += 1
            p._bump()
            if runs and runs[-1][1:] == (i, self.steps[i]):
                runs[-1] = (runs[-1][0], i + 1, self.steps[i])
            else:
                runs.append((i, i + 1, self.steps[i]))
        return runs

    def left_out(self, conditional):
        """For a step that the device may leave out (`conditional`): a 0-d float64 array, how many of the updates that
        `steps` counts it has left out so far; the caller adds to it. One number for all parameters that have a
        gradient, so that it is read, which waits, only when those change; and before other steps."""
        given = conditional and [p.grad is not None for p in self.params]
        if self._left_out is not None and self._left_out[0] != given:
            self.settle()
        if not conditional:
            return None
        if self._left_out is None:
            self._left_out = given, self.device.xp.zeros((), np.float64)
        return self._left_out[1]

    def settle(self):
        """Let `steps` count the updates that were made; waits for the device where that could leave some out."""
        self.steps, self._left_out = self.updates(), None

    def updates(self):
        """The numbers of updates that were made; waits likewise."""
        if self._left_out is None:
            return self.steps
        given, count = self._left_out
        count = int(self.device.item(count))
        return [n - count * g for n, g in zip(self.steps, given, strict=True)]

    def run(self, first, last):
        """The memory of parameters first..last-1: (data, grad, *states), 1-D arrays."""
        span = slice(self.spans[first][0], self.spans[last - 1][1])
        return [array[span] for array in (self.data, self.grad, *self.state.values())]

    def scale_gradients(self, first, last, factor):
        """Multiply the gradients of parameters first..last-1 by a number, in place."""
        if not is_one(factor):
            scale = routines(self.device).scale
            for p, (start, stop) in zip(self.params[first:last], self.spans[first:last], strict=True):
                scale(self.device.xp, self.grad[start:stop], factor)  # padding between them must stay zero
                p.grad._bump()

    def shadow(self, first, last):
        """Memory for 16-bit copies of parameters first..last-1 (1-D), or None where products have used none of them.
        An optimizer that fills it calls `keep_shadow`, and saves the pass that would make them anew."""
        used = [p._half[2].dtype for p in self.params[first:last] if p._half is not None]
        if not used or self.dtype.itemsize != 4:
            return None
        if self._shadow is None or self._shadow.dtype != used[0]:
            self._shadow = self.device.xp.zeros(self.data.size, used[0])
            self._shadow_views = self._views(self._shadow)
        return self._shadow[self.spans[first][0] : self.spans[last - 1][1]]

    def keep_shadow(self, first, last):
        """Let products find the copies that were just written."""
        for p, view in zip(self.params[first:last], self._shadow_views[first:last], strict=True):
            p._half = (p.array, p.version()[0], view)

    def blocks(self, first, last):
        """The memory of parameters first..last-1 in pieces: (data, grad, *states, scratch, scratch), 1-D arrays."""
        stop = self.spans[last - 1][1]
        for low in range(self.spans[first][0], stop, self.block):
            high = min(low + self.block, stop)
            arrays = (self.data, self.grad, *self.state.values())
            yield *(array[low:high] for array in arrays), *self.scratch[:, : high - low]


class FlatGroup:
    """The flat buffers of one parameter group, one per dtype and device, kept up to date with the group."""

    def __init__(self):
        self.buffers = []
        self.slots = {}  # parameter -> (its buffer, its number in there)

    def refresh(self, params, state_names, required=()):
        """Lay the parameters out (again) where one began to train, moved or changed its dtype, or where other state is
        needed; what state there is moves along. Frozen parameters that never had a gradient are left where they are,
        unless `required`."""
        wanted = [p for p in params if p.requires_grad or p.grad is not None or p in self.slots or p in required]
        if len(wanted) == len(self.slots) and all(
            list(buffer.state) == list(state_names) and all(map(buffer.fits, range(len(buffer.params))))
            for buffer in self.buffers
        ):
            return
        kinds, old = {}, self.slots
        for p in wanted:
            kinds.setdefault((p.device, p.dtype), []).append(p)
        self.buffers = [FlatBuffer(members, state_names) for members in kinds.values()]
        self.slots = {p: (buffer, i) for buffer in self.buffers for i, p in enumerate(buffer.params)}
        for p, (source, j) in old.items():
            buffer, i = self.slots[p]
            source.settle()
            buffer.steps[i] = source.steps[j]
            before = source.state_of(j)
            for name, target in buffer.state_of(i).items():
                if name in before and before[name].shape == target.shape:
                    target.copy_(before[name])

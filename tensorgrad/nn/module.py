"""Module: a tree of parameters, buffers and child modules, with PyTorch's names and behaviour.

There is no registry: a Parameter, a buffer or a child module is an ordinary attribute of its module, and what it is
follows from its type (buffers: from a list of names). Reading `self.weight` is therefore a plain attribute access, and
definition order is the order of everything that walks the tree.
"""

import threading
from typing import NamedTuple

import numpy as np

from ..creation import as_tensor
from ..device import Device
from ..dtypes import bfloat16_dtype
from ..engine import modes
from ..tensor import RemovableHandle, Tensor
from .parameter import Parameter, drop_grad, zero_grad

_calls = threading.local()  # .stack: the modules being called, while somebody traces


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict` returns: names without a value, and values without a name."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module:
    """Base of all layers and models: define children and parameters in `__init__`, the computation in `forward`."""

    training = True
    _buffers: dict = {}  # name of each buffer -> is it saved in state_dict? (own dict once one is registered)
    _forward_pre_hooks = None  # dicts of hooks, made when the first is registered
    _forward_hooks = None

    def __init__(self):
        pass

    def forward(self, *args, **kwargs):
        """The computation; subclasses define it."""
        raise TypeError(f"{type(self).__name__} defines no forward()")

    # ---- calling ----

    def __call__(self, *args, **kwargs):
        """Run `forward`, and the hooks where there are any."""
        if self._forward_hooks is None and self._forward_pre_hooks is None and modes.module_path is None:
            return self.forward(*args, **kwargs)
        return self._traced_call(args, kwargs)

    def _traced_call(self, args, kwargs):
        path = modes.module_path
        if path is None:
            return self._hooked_call(args, kwargs)
        if not path:
            _calls.stack = []
        path.append(self._name_within(_calls.stack))
        _calls.stack.append(self)
        try:
            return self._hooked_call(args, kwargs)
        finally:
            path.pop()
            _calls.stack.pop()

    def _hooked_call(self, args, kwargs):
        for hook in list((self._forward_pre_hooks or {}).values()):
            changed = hook(self, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        output = self.forward(*args, **kwargs)
        for hook in list((self._forward_hooks or {}).values()):
            changed = hook(self, args, output)
            if changed is not None:
                output = changed
        return output

    def _name_within(self, callers):
        """The name of this module inside the innermost of `callers` that contains it; at the top its class."""
        for caller in reversed(callers):
            for name, module in caller.named_modules():
                if module is self and name:
                    return name
        return type(self).__name__

    def register_forward_pre_hook(self, hook):
        """Call `hook(module, args)` before each forward; a result other than None replaces the arguments."""
        if self._forward_pre_hooks is None:
            self._forward_pre_hooks = {}
        return _add_hook(self._forward_pre_hooks, hook)

    def register_forward_hook(self, hook):
        """Call `hook(module, args, output)` after each forward; a result other than None replaces the output."""
        if self._forward_hooks is None:
            self._forward_hooks = {}
        return _add_hook(self._forward_hooks, hook)

    # ---- registering ----

    def __setattr__(self, name, value):
        old = self.__dict__.get(name)
        if value is not None and old is not None:
            for kind in (Parameter, Module):
                if isinstance(old, kind) and not isinstance(value, kind):
                    raise TypeError(
                        f"cannot assign a {type(value).__name__} to {name!r}, which is a {kind.__name__}: "
                        f"assign a {kind.__name__} or None, or `del` it first"
                    )
        if name in self._buffers and not (value is None or isinstance(value, Tensor)):
            raise TypeError(f"cannot assign a {type(value).__name__} to the buffer {name!r}: assign a Tensor or None")
        object.__setattr__(self, name, value)

    def __delattr__(self, name):
        object.__delattr__(self, name)
        self._buffers.pop(name, None)

    def register_parameter(self, name, param):
        """Add a Parameter (or None: a place for one) under `name`."""
        if not (param is None or isinstance(param, Parameter)):
            raise TypeError(f"register_parameter: {name!r} is a {type(param).__name__}, not a Parameter or None")
        self._register(name, param, Parameter)

    def register_buffer(self, name, tensor, persistent=True):
        """Add a Tensor that is no parameter but belongs to the module: `to()` moves it, and state_dict contains it
        if `persistent`."""
        if not (tensor is None or isinstance(tensor, Tensor)):
            raise TypeError(f"register_buffer: {name!r} is a {type(tensor).__name__}, not a Tensor or None")
        if name not in self._buffers:
            self._register(name, tensor, Tensor)
        if "_buffers" not in self.__dict__:
            self._buffers = {}
        self._buffers[name] = persistent
        setattr(self, name, tensor)

    def add_module(self, name, module):
        """Add a child module (or None) under `name`, which need not be an identifier."""
        if not (module is None or isinstance(module, Module)):
            raise TypeError(f"add_module: {name!r} is a {type(module).__name__}, not a Module or None")
        self._register(name, module, Module)

    register_module = add_module

    def _register(self, name, value, kind):
        if not isinstance(name, str) or not name or "." in name:
            raise KeyError(f"a {kind.__name__}'s name must be a non-empty string without '.', not {name!r}")
        old = self.__dict__.get(name)
        if hasattr(self, name) and not (name in self.__dict__ and (old is None or isinstance(old, kind))):
            raise KeyError(f"{type(self).__name__} already has an attribute {name!r}")
        setattr(self, name, value)

    # ---- walking the tree ----

    def _members(self, kind):
        return [(name, value) for name, value in self.__dict__.items() if isinstance(value, kind)]

    def named_children(self):
        """(name, module) of the direct children, each once."""
        seen = set()
        for name, module in self._members(Module):
            if module not in seen:
                seen.add(module)
                yield name, module

    def children(self):
        """The direct children, each once."""
        for _, module in self.named_children():
            yield module

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        """(dotted name, module) of this module (named `prefix`) and all below it, parents first."""
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            for name, module in self._members(Module):
                yield from module.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def modules(self):
        """This module and all below it, each once."""
        for _, module in self.named_modules():
            yield module

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        """(dotted name, Parameter); a tied parameter appears once, under its first name, if `remove_duplicate`."""
        yield from self._walk(lambda m: m._members(Parameter), prefix, recurse, remove_duplicate)

    def parameters(self, recurse=True):
        """All Parameters, each once."""
        for _, parameter in self.named_parameters(recurse=recurse):
            yield parameter

    def _own_buffers(self, persistent_only=False):
        return [
            (name, getattr(self, name))
            for name, persistent in self._buffers.items()
            if getattr(self, name) is not None and (persistent or not persistent_only)
        ]

    def named_buffers(self, prefix="", recurse=True, remove_duplicate=True):
        """(dotted name, Tensor) of all buffers."""
        yield from self._walk(Module._own_buffers, prefix, recurse, remove_duplicate)

    def buffers(self, recurse=True):
        """All buffers, each once."""
        for _, buffer in self.named_buffers(recurse=recurse):
            yield buffer

    def _walk(self, members, prefix, recurse, remove_duplicate):
        modules = self.named_modules(None, prefix, remove_duplicate) if recurse else [(prefix, self)]
        seen = set()
        for path, module in modules:
            for name, value in members(module):
                if id(value) not in seen:
                    if remove_duplicate:
                        seen.add(id(value))
                    yield f"{path}.{name}" if path else name, value

    def get_submodule(self, target):
        """The module with the dotted name `target` ("" is this one)."""
        module = self
        for name in target.split(".") if target else ():
            module = getattr(module, name, None)
            if not isinstance(module, Module):
                raise AttributeError(f"{type(self).__name__} has no module {target!r} (at {name!r})")
        return module

    def get_parameter(self, target):
        """The Parameter with the dotted name `target`."""
        path, _, name = target.rpartition(".")
        parameter = getattr(self.get_submodule(path), name, None)
        if not isinstance(parameter, Parameter):
            raise AttributeError(f"{type(self).__name__} has no parameter {target!r}")
        return parameter

    # ---- state ----

    def _named_state(self, prefix=""):
        """(dotted name, Tensor) of everything that state_dict holds, in PyTorch's order; tied tensors repeat."""
        for name, value in self._members(Parameter) + self._own_buffers(persistent_only=True):
            yield prefix + name, value
        for name, module in self._members(Module):
            yield from module._named_state(f"{prefix}{name}.")

    def state_dict(self, prefix=""):
        """Dotted name -> Tensor (detached, sharing memory) of all parameters and persistent buffers."""
        return {name: value.detach() for name, value in self._named_state(prefix)}

    def load_state_dict(self, state_dict, strict=True):
        """Copy `state_dict` (name -> Tensor or array) into the parameters and buffers, in place.

        Everything is checked before anything is written. Raises RuntimeError with one message that lists every name
        that is missing, unexpected (both only if `strict`) or has another shape. Returns the missing and the
        unexpected names."""
        own = dict(self._named_state())
        missing = [name for name in own if name not in state_dict]
        unexpected = [name for name in state_dict if name not in own]
        problems = []
        if strict and missing:
            problems.append("missing keys: " + ", ".join(missing))
        if strict and unexpected:
            problems.append("unexpected keys: " + ", ".join(unexpected))
        for name, target in own.items():
            if name in state_dict and tuple(state_dict[name].shape) != tuple(target.shape):
                problems.append(
                    f"size mismatch for {name}: {tuple(state_dict[name].shape)} given, "
                    f"{tuple(target.shape)} in the model"
                )
        if problems:
            raise RuntimeError(
                "\n  ".join([f"state_dict does not fit {type(self).__name__}; nothing was loaded:", *problems])
            )
        for name, target in own.items():
            if name in state_dict:
                target.detach().copy_(as_tensor(state_dict[name]))
        return IncompatibleKeys(missing, unexpected)

    # ---- changing everything at once ----

    def apply(self, fn):
        """Call `fn(module)` on all modules, children first. Returns self."""
        for _, module in self._members(Module):
            module.apply(fn)
        fn(self)
        return self

    def train(self, mode=True):
        """Set training mode (dropout on) in all modules. Returns self."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self):
        """Set evaluation mode (dropout off) in all modules. Returns self."""
        return self.train(False)

    def requires_grad_(self, requires_grad=True):
        """Freeze (False) or unfreeze all parameters. Returns self."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none=True):
        """Drop all gradients, or fill them with zeros."""
        for parameter in self.parameters():
            (drop_grad if set_to_none else zero_grad)(parameter)

    def to(self, *args, **kwargs):
        """Move parameters and buffers to a device and / or a floating dtype, in place: `to("cuda")`,
        `to(tg.float64)`, `to(device, dtype)`, `to(other_tensor)`. Integer buffers keep their dtype. Returns self."""
        device, dtype = _device_and_dtype(*args, **kwargs)
        moved = {}  # tied parameters stay tied

        def move(tensor):
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        for module in self.modules():
            for name, buffer in module._own_buffers():
                if id(buffer) not in moved:
                    moved[id(buffer)] = move(buffer)
                setattr(module, name, moved[id(buffer)])
        for parameter in self.parameters():
            parameter._grad_buffer = None
            parameter.data = move(parameter.data)
            if parameter.grad is not None:
                parameter.grad = move(parameter.grad.detach())
        return self

    def cpu(self):
        """Move to the CPU. Returns self."""
        return self.to("cpu")

    def cuda(self, device=None):
        """Move to the GPU `device` (a number; the first one). Returns self."""
        return self.to("cuda" if device is None else f"cuda:{device}")

    def float(self):
        """Floating tensors become float32. Returns self."""
        return self.to(np.dtype("float32"))

    def double(self):
        """Floating tensors become float64. Returns self."""
        return self.to(np.dtype("float64"))

    def half(self):
        """Floating tensors become float16. Returns self."""
        return self.to(np.dtype("float16"))

    def bfloat16(self):
        """Floating tensors become bfloat16. Returns self."""
        return self.to(dtype=bfloat16_dtype())

    # ---- printing ----

    def extra_repr(self):
        """What the module's line shows between the parentheses; subclasses override it."""
        return ""

    def __repr__(self):
        children = [f"({name}): {module!r}" for name, module in self._members(Module)]
        return format_tree(type(self).__name__, self.extra_repr(), children)


def _add_hook(hooks, hook):
    key = object()
    hooks[key] = hook
    return RemovableHandle(lambda: hooks.pop(key, None))


def format_tree(name, extra, children):
    """`name(extra, children)` the way PyTorch prints modules: one line, or an indented line per part."""
    if not children and "\n" not in extra:
        return f"{name}({extra})"
    lines = extra.splitlines() + [child.replace("\n", "\n  ") for child in children]
    return "\n  ".join([f"{name}(", *lines]) + "\n)"


def _device_and_dtype(*args, device=None, dtype=None):
    for arg in args:
        if isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, (str, Device)):
            device = arg
        elif arg is not None:
            dtype = np.dtype(arg)
    if dtype is not None and dtype.kind in "biuc":
        raise TypeError(f"Module.to: {dtype} is not a floating dtype")
    return device, dtype

"""Modules that hold modules: Sequential, ModuleList, ModuleDict."""

from itertools import groupby
from operator import index as as_index

from .module import Module, format_tree


class _Indexed(Module):
    """Children named "0", "1", ...: what Sequential and ModuleList have in common."""

    def _list(self):
        return [module for _, module in self._members(Module)]

    def __len__(self):
        return len(self._list())

    def __iter__(self):
        return iter(self._list())

    def __getitem__(self, index):
        return type(self)(self._list()[index]) if isinstance(index, slice) else self._list()[index]

    def __setitem__(self, index, module):
        setattr(self, self._key(index), module)

    def __delitem__(self, index):
        modules = self._list()
        del modules[index]
        for name in [name for name, _ in self._members(Module)]:
            delattr(self, name)
        for module in modules:
            self.append(module)

    def _key(self, index):
        size, index = len(self), as_index(index)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} modules")
        return str(index % size)

    def append(self, module):
        """Add a module at the end. Returns self."""
        self.add_module(str(len(self)), module)
        return self

    def extend(self, modules):
        """Add several modules at the end. Returns self."""
        for module in modules:
            self.append(module)
        return self

    def insert(self, index, module):
        """Insert a module before `index`."""
        modules = self._list()
        modules.insert(index, module)
        for i, each in enumerate(modules):
            setattr(self, str(i), each)


class Sequential(_Indexed):
    """Modules applied one after the other: `Sequential(a, b)(x) == b(a(x))`. A dict gives them names."""

    def __init__(self, *modules):
        super().__init__()
        if len(modules) == 1 and isinstance(modules[0], dict):
            for name, module in modules[0].items():
                self.add_module(name, module)
        else:
            self.extend(modules)

    def __getitem__(self, index):
        """A child, or for a slice a Sequential of the children with the names they have here."""
        return Sequential(dict(self._members(Module)[index])) if isinstance(index, slice) else self._list()[index]

    def _key(self, index):  # children may have names of their own
        super()._key(index)
        return self._members(Module)[index][0]

    def forward(self, x):
        for module in self:
            x = module(x)
        return x


class ModuleList(_Indexed):
    """A list of modules; calling it is the owner's business."""

    def __init__(self, modules=()):
        super().__init__()
        self.extend(modules)

    def __repr__(self):
        """Runs of equal children share a line, as in PyTorch: `(0-11): 12 x Block(`."""
        children, first = [], 0
        for text, run in groupby(repr(module) for module in self):
            count = len(list(run))
            children.append(f"({first}): {text}" if count == 1 else f"({first}-{first + count - 1}): {count} x {text}")
            first += count
        return format_tree(type(self).__name__, self.extra_repr(), children)


class ModuleDict(Module):
    """A dict of modules, reached by key or as attributes."""

    def __init__(self, modules=None):
        super().__init__()
        self.update(modules or {})

    def __getitem__(self, key):
        return dict(self._members(Module))[key]

    def __setitem__(self, key, module):
        self.add_module(key, module)

    def __delitem__(self, key):
        delattr(self, key)

    def __len__(self):
        return len(self._members(Module))

    def __iter__(self):
        return iter(self.keys())

    def __contains__(self, key):
        return key in self.keys()

    def keys(self):
        return dict(self._members(Module)).keys()

    def values(self):
        return dict(self._members(Module)).values()

    def items(self):
        return dict(self._members(Module)).items()

    def update(self, modules):
        """Add the modules of a dict or of (key, module) pairs."""
        for key, module in dict(modules).items():
            self[key] = module

    def pop(self, key):
        """Remove a module and return it."""
        module = self[key]
        del self[key]
        return module

    def clear(self):
        """Remove all modules."""
        for key in list(self):
            del self[key]

"""The model's decoding step as a CUDA graph: what its modules compute, recorded once and launched as a whole.

With one token per row a GPU is done with each kernel before Python has launched the next. A graph repeats the same
kernels with the same numbers on the same memory, so whatever changes from token to token is read on the GPU: the ids,
and the positions, from which slots of the cache, mask and angles follow. A graph serves positions below its `reach`, a
power of two, and looks at that many slots of the cache at most; a text that grows longer gets the next graph.

Recording takes the time of three steps and memory of its own, so it is done at the third step in a row of the same rows
and reach, and few graphs are kept. Modules compute where somebody looks (hooks, a profiler), in training mode, under
autocast, and where recording failed, which is told once. TENSORGRAD_CUDA_GRAPH=0 leaves graphs out."""
import math
import os
import warnings
from operator import is_
from weakref import WeakSet

import tensorgrad as tg

STEPS = 3  # in a row, the last of which is recorded
SHORTEST = 64  # reach of the smallest graph
KEPT = 8  # graphs of a cache

_refused = WeakSet()  # models whose step could not be recorded


def graphed_step(model, idx, step):
    """Logits (B, V) after one new token per row, idx (B, 1), by a CUDA graph; None where the modules are to compute."""
    off = os.environ.get("TENSORGRAD_CUDA_GRAPH", "1") == "0"
    if off or model in _refused or tg.is_grad_enabled() or tg.is_autocast_enabled(idx.device.type):
        return None
    cache = step.cache
    if cache.graphs is None or cache.graphs.model is not model:
        cache.graphs = Graphs(model)
    return cache.graphs.logits(idx, step)


class Graphs:
    """The graphs of a model's step with one cache."""

    def __init__(self, model):
        self.model, self.made, self.snapshot = model, {}, None
        self.key, self.times = None, 0                                         # of the last step; how often in a row
        self.starts, self.positions = None, None                               # of the next tokens, for host and GPU

    def logits(self, idx, step):
        """See graphed_step."""
        if self.snapshot is not None and not self.snapshot.holds():
            self.made, self.snapshot, self.key = {}, None, None
        reach = max(SHORTEST, 1 << max(step.starts).bit_length())
        key = step.first, step.rows, reach, tg.get_float32_matmul_precision()
        self.times = self.times + 1 if key == self.key else 1
        self.key = key
        graph = self.made.pop(key, None)
        if graph is None and self.times < STEPS:
            return None
        positions = self.positions                                             # (B, 1), there already
        if self.starts != step.starts:
            positions = tg.tensor([[start] for start in step.starts], device=idx.device)
        graph = graph or self._record(idx, positions, step, reach)
        if graph is None:
            return None
        self.made[key] = graph                                                 # the last used stands last
        if len(self.made) > KEPT:
            del self.made[next(iter(self.made))]
        run, _ = graph
        logits, self.positions = run(idx, positions)
        self.starts = [start + 1 for start in step.starts]
        step.finish()
        return logits.clone()                                                  # the graph's own are overwritten

    def _record(self, idx, positions, step, reach):
        """(the function of ids and positions that launches the graph, what has to stay in memory), or None."""
        model, places = self.model, Places(step.cache, step.first, step.rows, reach)
        if self.snapshot is None:
            modules = list(model.modules())
            if any(m.training or m._forward_hooks is not None or m._forward_pre_hooks is not None for m in modules):
                return None
            self.snapshot = Snapshot(modules)

        def decode(ids, positions):
            x = model.hidden(ids, places.at(positions))                        # (B, 1, C)
            return model.lm_head(x[:, -1]), positions + 1

        deterministic = tg.are_deterministic_algorithms_enabled()
        tg.use_deterministic_algorithms(True)                                  # of products: none is chosen by time
        try:
            return tg.cuda.graphed(decode, idx, positions), places             # runs it: same values to the same slots
        except Exception as error:
            _refused.add(model)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"decoding goes on without a CUDA graph, which cannot be recorded: {reason}", stacklevel=2)
            return None
        finally:
            tg.use_deterministic_algorithms(deterministic)


class Places:
    """What modules ask of a Step, for one token per row, whose positions are numbers of the GPU below `reach`."""

    fresh = padded = False

    def __init__(self, cache, first, rows, reach):
        keys, seen = cache.layers[0].keys, min(reach, cache.length)            # (rows of the cache, nkv, length, hs)
        nkv, device = keys.size(1), keys.device
        self.layers, self.length, self.last_position = cache.layers, cache.length, reach - 1
        self.seen = slice(first, first + rows), slice(None), slice(seen)
        self.slots = tg.arange(seen, device=device)                            # (S,)
        self.zeros = tg.zeros(rows, 1, 1, seen, device=device)
        self.heads = tg.arange(first * nkv, (first + rows) * nkv, device=device).reshape(rows, nkv) * cache.length

    def at(self, positions):
        """Stand at positions (B, 1)."""
        self.positions, self.layer, self.tables = positions, -1, {}
        hidden = self.slots > positions.reshape(-1, 1, 1, 1)                   # (B, 1, 1, S); none in a ring gone round
        self.mask = self.zeros.masked_fill(hidden, -math.inf).to(self.layers[0].keys.dtype)
        self.lines = (self.heads + positions % self.length).reshape(-1).array  # (B * nkv,)
        return self

    def rows_of(self, table):
        """Rows of a table (positions, n) for the new tokens, (B, 1, n); taken once for all layers."""
        if id(table) not in self.tables:
            rows = table.array.take(self.positions.array, axis=0)
            self.tables[id(table)] = table, tg.as_tensor(rows, device=table.device)
        return self.tables[id(table)][1]

    def at_positions(self, table):
        """The same for heads: (B, 1, 1, n)."""
        return self.rows_of(table).unsqueeze(1)

    def attended(self, k, v):
        """See Step.attended: k and v (B, nkv, 1, hs) -> (B, nkv, S, hs), S the same at every step."""
        self.layer += 1
        layer = self.layers[self.layer]
        for tensor, new in ((layer.keys, k), (layer.values, v)):
            lines = tensor.array.reshape(-1, tensor.size(-1))                  # (rows * nkv * length, hs), a view
            lines[self.lines] = new.array.reshape(-1, tensor.size(-1))
        return tuple(tg.as_tensor(tensor.array[self.seen], device=k.device) for tensor in (layer.keys, layer.values))


class Snapshot:
    """What a graph has in it: the attributes of modules, and the arrays of their tensors."""

    def __init__(self, modules):
        self.attributes = [(vars(module), tuple(vars(module).values())) for module in modules]
        self.arrays = [(value, value.array) for _, values in self.attributes for value in values
                       if isinstance(value, tg.Tensor)]

    def holds(self):
        """Is everything as it was?"""
        for now, then in self.attributes:  # a hundred modules or two, at every step
            if len(now) != len(then) or not (all(map(is_, now.values(), then)) or all(map(_same, now.values(), then))):
                return False
        return all(tensor.array is array for tensor, array in self.arrays)


def _same(a, b):
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, (bool, int, float, str)) and a == b

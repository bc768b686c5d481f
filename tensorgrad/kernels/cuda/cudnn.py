"""cuDNN's fused attention (extra `cudnn`), used where it is there and takes the shape: 16 bits, no mask, no dropout.

Queries, keys and values are read where they lie in the packed projection, the gradients are written side by side as one
packed array, and no scores are kept, only one number per query. What it refuses, attention.py does; a failure is told
once. TENSORGRAD_CUDNN=0 leaves it out.

Each length is planned for itself, which takes longer than a prompt or a decoding step is worth: only lengths that are
multiples of 64 come here, as those of training are."""

import os
import warnings

import numpy as np

LENGTHS = 64  # multiples of this
_states = {}  # (array module, GPU) -> Cudnn, or None where it cannot be used


def cudnn_for(xp):
    """The Cudnn of the current GPU, or None."""
    key = xp, xp.cuda.Device().id
    if key not in _states:
        _states[key] = _open(xp)
    return _states[key]


def _open(xp):
    if xp.__name__ != "cupy" or os.environ.get("TENSORGRAD_CUDNN", "1") == "0":
        return None
    try:
        import cudnn
    except ImportError:
        return None
    try:
        if int(xp.cuda.Device().compute_capability) < 80:
            return None
        return Cudnn(xp, cudnn, cudnn.create_handle())
    except Exception as error:
        warnings.warn(f"cuDNN is installed but cannot be used; attention runs without it: {_line(error)}", stacklevel=2)
        return None


def _line(error):
    return str(error).strip().split("\n")[0][:200]


def usable(q, k, v):
    """Are these arrays of a kind that fused attention takes?"""
    half = q.dtype.itemsize == 2 and q.dtype.kind in "fV"
    fits = q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    repeats = not q.shape[2] % LENGTHS and not k.shape[2] % LENGTHS
    return half and fits and repeats and all(x.strides[-1] == x.itemsize and not x.data.ptr % 16 for x in (q, k, v))


def forward_graph(cudnn, q, k, v, out, dtype, causal, scale, **options):
    """Attention as a graph of cuDNN; q, k, v, out are (sizes, strides in elements) of (B, H, T, d)."""
    g = _graph(cudnn, dtype, options)
    tensors = [_tensor(g, name, n, x) for n, (name, x) in enumerate((("q", q), ("k", k), ("v", v)), 1)]
    o, stats = g.sdpa(
        name="sdpa",
        q=tensors[0],
        k=tensors[1],
        v=tensors[2],
        generate_stats=True,
        attn_scale=scale,
        use_causal_mask=causal,
    )
    _output(o, 4, out)
    _output(stats, 5, _stats(q), cudnn.data_type.FLOAT)
    return g


def backward_graph(cudnn, q, k, v, out, gradients, dtype, causal, scale, **options):
    """Its gradient; `gradients`: sizes and strides of dq, dk, dv."""
    g = _graph(cudnn, dtype, options)
    named = (("q", q), ("k", k), ("v", v), ("o", out))
    tensors = [_tensor(g, name, n, x) for n, (name, x) in enumerate(named, 1)]
    stats = _tensor(g, "stats", 5, _stats(q), cudnn.data_type.FLOAT)
    d_out = _tensor(g, "dO", 6, out)
    found = g.sdpa_backward(
        name="sdpa_backward",
        q=tensors[0],
        k=tensors[1],
        v=tensors[2],
        o=tensors[3],
        dO=d_out,
        stats=stats,
        attn_scale=scale,
        use_causal_mask=causal,
    )
    for uid, (tensor, layout) in enumerate(zip(found, gradients, strict=True), 7):
        _output(tensor, uid, layout)
    return g


def _graph(cudnn, dtype, options):
    kind = cudnn.data_type.BFLOAT16 if dtype == "bfloat16" else cudnn.data_type.HALF
    single = cudnn.data_type.FLOAT
    return cudnn.pygraph(io_data_type=kind, intermediate_data_type=single, compute_data_type=single, **options)


def _tensor(g, name, uid, layout, dtype=None):
    sizes, strides = layout
    options = {} if dtype is None else {"data_type": dtype}
    return g.tensor(name=name, dim=list(sizes), stride=list(strides), uid=uid, **options)


def _output(tensor, uid, layout, dtype=None):
    sizes, strides = layout
    tensor.set_output(True).set_dim(list(sizes)).set_stride(list(strides)).set_uid(uid)
    if dtype is not None:
        tensor.set_data_type(dtype)


def _stats(q):
    batch, heads, queries, _ = q[0]
    return (batch, heads, queries, 1), (heads * queries, queries, 1, 1)


def layout(x):
    """(sizes, strides in elements) of an array."""
    return tuple(x.shape), tuple(s // x.itemsize for s in x.strides)


class Cudnn:
    """Fused attention on one GPU; graphs are planned once per shape and kept."""

    def __init__(self, xp, cudnn, handle):
        self.xp, self.cudnn, self.handle = xp, cudnn, handle
        self.plans, self.warned = {}, False

    def attention(self, q, k, v, causal, scale):
        """(out (B, H, T, d), whose heads lie side by side, and what backward needs), or None where cuDNN refuses."""
        xp = self.xp
        batch, heads, queries, dim = q.shape
        out = xp.empty((batch, queries, heads, dim), q.dtype).transpose(0, 2, 1, 3)
        arguments = (*map(layout, (q, k, v, out)), q.dtype.name, causal, scale)
        stats = xp.empty((batch, heads, queries, 1), np.float32)
        done = self._run(forward_graph, arguments, (q, k, v, out, stats))
        return (out, (out, stats)) if done else None

    def backward(self, q, k, v, kept, causal, scale, g):
        """(dq, dk, dv), or None where cuDNN refuses: parts of one packed array where their lengths allow."""
        xp, (out, stats) = self.xp, kept
        if layout(g) != layout(out):
            copy = xp.empty((out.shape[0], out.shape[2], out.shape[1], out.shape[3]), out.dtype).transpose(0, 2, 1, 3)
            copy[...] = g
            g = copy
        gradients = _packed(xp, q, k, v)
        arguments = (*map(layout, (q, k, v, out)), tuple(map(layout, gradients)), q.dtype.name, causal, scale)
        return gradients if self._run(backward_graph, arguments, (q, k, v, out, stats, g, *gradients)) else None

    def _run(self, make, arguments, arrays):
        """Carry out the graph make(arguments) on `arrays`, its tensors 1, 2, ...; False where cuDNN refuses."""
        key = make.__name__, arguments
        if key not in self.plans:
            self.plans[key] = self._unless_refused(key, self._plan, make, arguments)
        if self.plans[key] is None:
            return False
        g, size = self.plans[key]
        workspace = self.xp.empty(size, np.uint8)
        self.cudnn.set_stream(self.handle, self.xp.cuda.get_current_stream().ptr)
        pointers = {uid: x.data.ptr for uid, x in enumerate(arrays, 1)}
        self._unless_refused(key, g.execute, pointers, workspace.data.ptr, handle=self.handle)
        return self.plans[key] is not None

    def _plan(self, make, arguments):
        """(the graph, bytes of memory that it needs to run)."""
        g = make(self.cudnn, *arguments, handle=self.handle)
        g.validate()
        g.build_operation_graph()
        g.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        g.check_support()
        g.build_plans()
        return g, max(g.get_workspace_size(), 1)

    def _unless_refused(self, key, function, *arguments, **options):
        """function(...); where it fails, which is told once, this plan is not tried again."""
        try:
            return function(*arguments, **options)
        except Exception as error:
            self.plans[key] = None
            if not self.warned:
                self.warned = True
                warnings.warn(f"cuDNN refuses this attention, which runs without it: {_line(error)}", stacklevel=5)


def _packed(xp, q, k, v):
    """Empty dq, dk, dv; where lengths are equal as one array (B, T, all heads, d), as the projection's gradient is."""
    if q.shape[2] != k.shape[2]:
        return tuple(
            xp.empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype).transpose(0, 2, 1, 3) for x in (q, k, v)
        )
    batch, _, length, dim = q.shape
    heads = [x.shape[1] for x in (q, k, v)]
    whole = xp.empty((batch, length, sum(heads), dim), q.dtype).transpose(0, 2, 1, 3)
    ends = [sum(heads[: i + 1]) for i in range(3)]
    return tuple(whole[:, end - n : end] for n, end in zip(heads, ends, strict=True))

"""Every fused routine against its floor: what copying as many bytes takes, or a product of as many operations.

The routines are called through the public functions that PyTorch has under the same names, so one text measures both;
what PyTorch (or an earlier revision) does not have is composed of what it has.
A copy reads one half of the bytes that the routine must move and writes the other, in arrays of that size, so that what
fits the cache is compared with copies in the cache. A routine that reads more than it writes can beat
its floor a little. The product is the first linear layer's of the feed-forward.
"""
import math
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from statistics import median
from typing import NamedTuple

import numpy as np

from .runner import Contender, contenders, middle, print_table, take_turns, times_before, times_faster
from .sizes import SIZES

SAMPLES = 20  # per routine and process


class Cost(NamedTuple):
    """What a routine cannot avoid: bytes read and written once each, floating-point operations in products; and how
    many bytes of memory it touches, fewer than `moved` where it works in place (None: as many)."""

    moved: int
    operations: int = 0
    memory: int | None = None


def costs(size):
    """{routine: Cost} at the size of a model, float32."""
    rows, c, v = size.tokens, size.width, size.vocab
    stream, hidden, logits = 4 * rows * c, 4 * rows * 4 * c, 4 * rows * v      # bytes of (B*T, C), (B*T, 4C), (B*T, V)
    weights = 4 * 4 * c * c                                                    # (4C, C)
    product = 2 * rows * c * 4 * c
    half_square = 2 * size.batch * size.block**2 * c // 2                      # one attention product, causal
    parameters = 4 * sum(math.prod(shape) for shape in size.parameter_shapes())
    matrices = [shape for shape in size.parameter_shapes()[2:] if len(shape) == 2]
    small = [(min(shape), max(shape)) for shape in matrices]
    newton_schulz = sum(5 * (4 * r * r * n + 2 * r**3) for r, n in small)      # five steps of three products each
    return {
        "linear": Cost(stream + weights + hidden, product),
        "linear backward": Cost(hidden + 2 * weights + 2 * stream, 2 * product),
        "layer_norm": Cost(2 * stream),
        "layer_norm backward": Cost(3 * stream),
        "layer_norm of a sum": Cost(4 * stream),  # reads both summands, writes norm and sum
        "layer_norm of a sum backward": Cost(4 * stream),
        "rms_norm": Cost(2 * stream),
        "rms_norm backward": Cost(3 * stream),
        "gelu": Cost(2 * hidden),
        "gelu backward": Cost(3 * hidden),
        "gelu tanh": Cost(2 * hidden),
        "gelu tanh backward": Cost(3 * hidden),
        "silu": Cost(2 * hidden),
        "silu backward": Cost(3 * hidden),
        "swiglu": Cost(3 * hidden // 2),  # halves of one (B*T, 4C)
        "swiglu backward": Cost(5 * hidden // 2),
        "relu2": Cost(2 * hidden),
        "relu2 backward": Cost(3 * hidden),
        "rotary": Cost(4 * stream),  # queries and keys
        "rotary backward": Cost(4 * stream),
        "attention": Cost(4 * stream, 2 * half_square),
        "attention backward": Cost(7 * stream, 4 * half_square),
        "attention dropout": Cost(4 * stream, 2 * half_square),
        "attention dropout backward": Cost(7 * stream, 4 * half_square),
        "softmax": Cost(2 * logits),
        "softmax backward": Cost(3 * logits),
        "log_softmax": Cost(2 * logits),
        "log_softmax backward": Cost(3 * logits),
        "cross_entropy": Cost(logits),
        "cross_entropy backward": Cost(2 * logits),
        "dropout": Cost(2 * stream),
        "dropout backward": Cost(2 * stream),
        "embedding backward": Cost(stream + 4 * v * c),
        "adamw": Cost(7 * parameters, memory=4 * parameters),  # reads p, g, m, v, writes p, m, v
        "muon": Cost(5 * 4 * sum(r * n for r, n in small), newton_schulz),  # the matrices of the blocks; p, g, m
        "clip": Cost(3 * parameters, memory=parameters),  # reads twice, writes once
    }

def report(options):
    """Measure and print a table per size; the results as (rows, skipped)."""
    rows, skipped_at = [], {}
    for name in options.size:
        chosen, skipped = contenders(options)
        spec = {"size": name, "steps": options.steps}
        [floor_runs] = take_turns([Contender("floors", required=True)], "floors", options, skipped, **spec).values()
        results = take_turns(chosen, "ops", options, skipped, **spec)
        found = []
        for routine in costs(SIZES[name]):
            floor = min(run[routine] for run in floor_runs)
            for contender in results:
                ms = middle(results[contender], routine)
                found.append({"size": name, "routine": routine, "contender": contender.name, "ms": ms,
                              "floor_ms": floor, "ms_over_floor": ms / floor,
                              "speed_vs_torch": times_faster(results, contender, routine),
                              "speed_vs_before": times_before(results, contender, routine)})
        _print(name, found, options)
        rows += found
        skipped_at |= {f"{who} at {name}": reason for who, reason in skipped.items()}
    return rows, skipped_at


def _print(size, rows, options):
    head, table = [f"ops {size}", "floor ms"], {}
    for contender in dict.fromkeys(row["contender"] for row in rows):
        head += [contender, "x floor", "torch/it"] + ([f"{options.against}/it"] if options.against else [])
    for row in rows:
        line = table.setdefault(row["routine"], [row["routine"], row["floor_ms"]])
        line += [row["ms"], row["ms_over_floor"], row["speed_vs_torch"]]
        line += [row["speed_vs_before"]] if options.against else []
    print_table(head, table.values())


# ---- in the measuring process ----------------------------------------------------------------------------------------


def timed(run, samples, prepare=None, least=False):
    """Median (or least) milliseconds of run(prepare()), of which only `run` counts; two calls warm up."""
    times = []
    for i in range(samples + 2):
        arguments = prepare() if prepare is not None else ()
        started = time.perf_counter()
        kept = run(*arguments)
        if i > 1:
            times.append(time.perf_counter() - started)
        del kept
    return 1e3 * (min(times) if least else median(times))


def measure(spec):
    """{routine: milliseconds} of one library in this process."""
    size, samples = SIZES[spec["size"]], spec["steps"] or SAMPLES
    library = import_module("tensorgrad" if spec["mode"] == "ours" else "torch")
    if spec["mode"] == "eager":
        library.set_num_threads(spec["threads"])
    rng = np.random.default_rng(0)
    result = {}
    for name, function, inputs in _functions(library, size, rng):
        def forward(function=function, inputs=inputs):
            return function(*inputs)

        shapes = [tuple(out.shape) for out in several(forward())]
        gradients = [library.from_numpy(rng.standard_normal(shape, np.float32)) for shape in shapes]
        trained = [x for x in inputs if x.requires_grad]

        def prepare(forward=forward, trained=trained, gradients=gradients):
            return several(forward()), trained, gradients

        if name != "embedding":  # a copy of rows: nothing to win
            result[name] = timed(forward, samples)
        result[f"{name} backward"] = timed(library.autograd.grad, samples, prepare)
    return {**result, **_updates(library, size, rng, samples)}


def several(outputs):
    """The outputs of a function as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _functions(library, size, rng):
    """(name, function, its Tensors) for what has a forward and a backward routine."""
    F, rows, c = library.nn.functional, size.tokens, size.width

    def real(*shape):
        return library.from_numpy(rng.standard_normal(shape, np.float32)).requires_grad_()

    def ids(*shape):
        return library.from_numpy(rng.integers(0, size.vocab, shape))

    def either(name, formula):
        return getattr(F, name, formula)

    def turned(x, cos, sin):
        low, high = x.chunk(2, dim=-1)
        return x * cos + library.cat([-high, low], dim=-1) * sin

    def attention(q, k, v, p=0.0):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)

    heads = (size.batch, size.heads, size.block, c // size.heads)
    tables = (real(*heads[2:]).detach() for _ in range(2))
    gated = either("swiglu", lambda x: F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1])
    sum_norm = either("add_layer_norm", lambda x, r, shape, w: (F.layer_norm(x + r, shape, w), x + r))
    return [
        ("linear", F.linear, (real(rows, c), real(4 * c, c))),
        ("layer_norm", lambda x, w: F.layer_norm(x, (c,), w), (real(rows, c), real(c))),
        ("layer_norm of a sum", lambda x, r, w: sum_norm(x, r, (c,), w), (real(rows, c), real(rows, c), real(c))),
        ("rms_norm", lambda x, w: F.rms_norm(x, (c,), w), (real(rows, c), real(c))),
        ("gelu", F.gelu, (real(rows, 4 * c),)),
        ("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), (real(rows, 4 * c),)),
        ("silu", F.silu, (real(rows, 4 * c),)),
        ("swiglu", gated, (real(rows, 4 * c),)),
        ("relu2", either("relu2", lambda x: F.relu(x).square()), (real(rows, 4 * c),)),
        ("rotary", either("rotary", lambda q, k, cos, sin: (turned(q, cos, sin), turned(k, cos, sin))),
         (real(*heads), real(*heads), *tables)),
        ("attention", attention, (real(*heads), real(*heads), real(*heads))),
        ("attention dropout", lambda *qkv: attention(*qkv, p=0.2), (real(*heads), real(*heads), real(*heads))),
        ("softmax", lambda x: F.softmax(x, dim=-1), (real(rows, size.vocab),)),
        ("log_softmax", lambda x: F.log_softmax(x, dim=-1), (real(rows, size.vocab),)),
        ("dropout", lambda x: F.dropout(x, 0.2), (real(rows, c),)),
        ("cross_entropy", F.cross_entropy, (real(rows, size.vocab), ids(rows))),
        ("embedding", F.embedding, (ids(rows), real(size.vocab, c))),
    ]


def _updates(library, size, rng, samples):
    """The optimizers and clipping over the parameters of the model, gradients where backward leaves them."""
    def trained(make, shapes):
        """(optimizer, its parameters, a function that gives them gradients), after a first step."""
        parameters, factors = (
            [library.from_numpy(rng.standard_normal(shape, np.float32)) for shape in shapes] for _ in range(2)
        )
        parameters = [library.nn.Parameter(p) for p in parameters]
        optimizer = make(parameters, lr=1e-3)

        def backward():
            optimizer.zero_grad()
            for p, factor in zip(parameters, factors, strict=True):
                (p * factor).sum().backward()
            return ()

        backward()
        optimizer.step()
        return optimizer, parameters, backward

    shapes = size.parameter_shapes()
    adamw, parameters, backward = trained(library.optim.AdamW, shapes)
    muon, _, muon_backward = trained(library.optim.Muon, [shape for shape in shapes[2:] if len(shape) == 2])
    clip = library.nn.utils.clip_grad_norm_
    return {"adamw": timed(adamw.step, samples, backward), "muon": timed(muon.step, samples, muon_backward),
            "clip": timed(lambda: clip(parameters, 1.0), samples, backward)}


def floors(spec):
    """{routine: milliseconds} that the machine needs for the bytes or for the products, whichever is more."""
    size, threads, samples = SIZES[spec["size"]], spec["threads"], spec["steps"] or SAMPLES
    with ThreadPoolExecutor(threads) as pool:
        a, b = np.ones((size.tokens, size.width), np.float32), np.ones((size.width, 4 * size.width), np.float32)
        out = np.empty((size.tokens, 4 * size.width), np.float32)
        ms = _spread(pool, threads, len(a), lambda part: np.matmul(a[part], b, out=out[part]), samples)
        per_operation = ms / (2 * a.size * b.shape[1])
        return {name: max(_copy(pool, threads, cost, samples), cost.operations * per_operation)
                for name, cost in costs(size).items()}


def _copy(pool, threads, cost, samples):
    """Milliseconds of copying that moves as many bytes within as much memory."""
    memory = cost.memory or cost.moved
    source, target = np.ones(memory // 2, np.uint8), np.ones(memory // 2, np.uint8)
    ms = _spread(pool, threads, source.size, lambda part: np.copyto(target[part], source[part]), samples)
    return ms * cost.moved / memory


def _spread(pool, threads, n, function, samples):
    """The least milliseconds of function(all of range(n)), in one thread or in parts over the pool."""
    edges = [n * i // threads for i in range(threads + 1)]
    parts = [slice(i, j) for i, j in zip(edges, edges[1:], strict=False)]
    alone = timed(lambda: function(slice(0, n)), samples, least=True)
    return min(alone, timed(lambda: list(pool.map(function, parts)), samples, least=True))

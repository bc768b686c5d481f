"""profile: where the time and the memory of a block go, by operation."""

import time
from collections import defaultdict

from ..engine import OpHook
from .hooks import op_hook


class profile(OpHook):
    """with profile() as p: ...; print(p.table()). Per operation and direction: calls, seconds (of the op alone, waiting
    for the device), bytes of results. `p.rows` holds the same as dicts."""

    def __init__(self):
        self._totals = defaultdict(lambda: [0, 0.0, 0])
        self._starts = []
        self._inner = [0.0]  # time spent in operations inside the one that runs

    def __enter__(self):
        self._context = op_hook(self)
        self._context.__enter__()
        return self

    def __exit__(self, *error):
        self._context.__exit__(*error)

    def before_forward(self, op, arrays):
        self._start()

    def after_forward(self, op, arrays, outputs):
        self._stop(op, "forward", sum(t.array.nbytes for t in outputs))

    def before_backward(self, op, gradients):
        self._start()

    def after_backward(self, op, gradients, input_gradients):
        self._stop(op, "backward", sum(g.array.nbytes for g in input_gradients if g is not None))

    def _start(self):
        self._starts.append(time.perf_counter())
        self._inner.append(0.0)

    def _stop(self, op, direction, size):
        op.device.synchronize()
        elapsed = time.perf_counter() - self._starts.pop()
        own = elapsed - self._inner.pop()
        self._inner[-1] += elapsed
        total = self._totals[op.name, direction]
        total[0] += 1
        total[1] += own
        total[2] += size

    @property
    def rows(self):
        """Dicts op, direction, calls, seconds, bytes; slowest first."""
        rows = [
            {"op": op, "direction": direction, "calls": n, "seconds": s, "bytes": b}
            for (op, direction), (n, s, b) in self._totals.items()
        ]
        return sorted(rows, key=lambda r: -r["seconds"])

    def table(self, limit=30):
        """The rows as text."""
        rows = self.rows
        total = sum(r["seconds"] for r in rows) or 1.0
        lines = [f"{'op':24} {'direction':9} {'calls':>7} {'ms':>10} {'share':>6} {'MB':>9}"]
        lines += [
            f"{r['op']:24} {r['direction']:9} {r['calls']:7d} {r['seconds'] * 1e3:10.3f} "
            f"{r['seconds'] / total:6.1%} {r['bytes'] / 1e6:9.2f}"
            for r in rows[:limit]
        ]
        return "\n".join([*lines, f"{'total':34} {sum(r['calls'] for r in rows):7d} {total * 1e3:10.3f}"])

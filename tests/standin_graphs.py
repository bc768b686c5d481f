"""CUDA graphs on the stand-in: a graph computes the recorded function again, from the numbers that the host had when it
was recorded, as a GPU would; recording itself leaves no trace in memory, and CuPy's own products refuse it."""

from __future__ import annotations

import contextlib

import standin

from tensorgrad import cuda_graph


class Machine:
    """What records and replays for the rest of the test. `arrays()` gives memory that recording must leave alone;
    `keep()` notes numbers of the host that a step may read, and returns a function that puts them back.

    graphs: all that were recorded; copies: what came from the host; host_copies: what did so during a recording."""

    def __init__(self, monkeypatch, arrays=lambda: (), keep=lambda: lambda: None):
        self.arrays, self.keep = arrays, keep
        self.graphs, self.copies, self.host_copies, self.capturing = [], [], [], None
        machine = self

        class Stream(standin._Stream):
            def begin_capture(self):
                machine.capturing = Graph(machine)

            def end_capture(self):
                graph, machine.capturing = machine.capturing, None
                for array, before in graph.memory:
                    array[...] = before
                return graph

        def asarray(a, *rest, original=standin.asarray, **options):
            if not isinstance(a, standin.ndarray):
                self.copies.append(a)
                if self.capturing:
                    self.host_copies.append(a)
            return original(a, *rest, **options)

        def matmul(*arguments, original=standin.matmul):
            if self.capturing:
                raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
            return original(*arguments)

        def recorded(name, function, inputs, record=cuda_graph._record):
            again = []

            def remembered(*fixed):
                again[:] = [lambda: function(*fixed)]
                return function(*fixed)

            launch, outputs, kept = record(name, remembered, inputs)
            kept[-1].again, kept[-1].outputs = again[0], outputs
            self.graphs.append(kept[-1])
            return launch, outputs, kept

        monkeypatch.setattr(standin, "asarray", asarray)
        monkeypatch.setattr(standin, "matmul", matmul)
        monkeypatch.setattr(cuda_graph, "_record", recorded)
        for name, value in dict(Stream=Stream, MemoryPool=lambda: type("Pool", (), {"malloc": None}),
                                using_allocator=lambda malloc: contextlib.nullcontext()).items():
            monkeypatch.setattr(standin.cuda, name, value, raising=False)
        monkeypatch.setenv("TENSORGRAD_CUDA_GRAPH", "1")
        monkeypatch.setenv("TENSORGRAD_CUBLASLT", "0")
        monkeypatch.setattr(cuda_graph, "capturing", lambda change: None)


class Graph:
    """`launches`: how often it ran."""

    def __init__(self, machine):
        self.machine, self.launches = machine, 0
        self.put_back, self.memory = machine.keep(), [(a, a.copy()) for a in machine.arrays()]

    def launch(self):
        now = self.machine.keep()
        self.put_back()
        outputs, found = (out if isinstance(out, tuple) else (out,) for out in (self.outputs, self.again()))
        for mine, new in zip(outputs, found, strict=True):
            mine.array[...] = new.array
        now()
        self.launches += 1

"""The one thread pool of the package. Workers wait on locks, never spin; every parallel routine splits its rows here.

Size: TENSORGRAD_THREADS, else the number of processors this process may use. NumPy's BLAS is limited to one thread when
the pool starts (blas.py), because its own threads spin and collapse as soon as anything else wants a core.
"""

import os
import threading


def thread_count():
    """Threads to use: TENSORGRAD_THREADS, else the size of the affinity mask."""
    given = os.environ.get("TENSORGRAD_THREADS", "")
    if given:
        if not (given.isascii() and given.isdigit()) or int(given) < 1:
            raise ValueError(f"TENSORGRAD_THREADS must be a whole number of at least 1, not {given!r}")
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker(threading.Thread):
    """Waits for a task, runs it, says that it is done."""

    def __init__(self):
        super().__init__(daemon=True, name="tensorgrad-worker")
        self.start_lock, self.done_lock = threading.Lock(), threading.Lock()
        self.start_lock.acquire()
        self.done_lock.acquire()
        self.task, self.error = None, None
        self.start()

    def run(self):
        while True:
            self.start_lock.acquire()
            function, args = self.task
            try:
                function(*args)
            except BaseException as error:  # handed to the thread that asked
                self.error = error
            self.task = function = args = None
            self.done_lock.release()


class Pool:
    """`run(tasks)` runs (function, args) pairs at the same time, the last one in the calling thread."""

    def __init__(self, threads):
        self.threads = threads
        self._workers = []
        self._busy = threading.Lock()

    def run(self, tasks):
        # a task that asks for the pool itself, or a second thread, does its work alone
        if len(tasks) == 1 or self.threads == 1 or not self._busy.acquire(blocking=False):
            for function, args in tasks:
                function(*args)
            return
        try:
            while len(self._workers) < len(tasks) - 1:
                self._workers.append(_Worker())
            used = self._workers[: len(tasks) - 1]
            for worker, task in zip(used, tasks, strict=False):
                worker.task = task
                worker.start_lock.release()
            try:
                function, args = tasks[-1]
                function(*args)
            finally:
                error = self._wait(used)
            if error is not None:
                raise error
        finally:
            self._busy.release()

    @staticmethod
    def _wait(workers):
        """Wait for all of them, also where Ctrl-C comes in between; the first error, or None."""
        error = None
        for worker in workers:
            while True:
                try:
                    worker.done_lock.acquire()
                    break
                except BaseException as interrupt:  # raised again when no worker is left in the middle of a task
                    error = interrupt
            error, worker.error = error or worker.error, None
        return error

    def parts(self, n, grain=1):
        """Into how many parts `split` divides range(n)."""
        return max(1, min(self.threads, n // max(grain, 1)))

    def split(self, function, n, *args, grain=1, align=1):
        """function(start, stop, *args) over parts of range(n): at most one per thread and per `grain` elements, each
        (but for the last) a multiple of `align` long."""
        parts = self.parts(n, grain)
        if parts == 1:
            function(0, n, *args)
            return
        edges = [min(n, -(-n * i // parts // align) * align) for i in range(parts)] + [n]
        self.run([(function, (a, b, *args)) for a, b in zip(edges, edges[1:], strict=False) if a < b])


_pool = None
_pid = None


def pool():
    """The process's pool; made at first use, and again after a fork (threads do not survive one)."""
    global _pool, _pid
    if _pool is None or _pid != os.getpid():
        from .blas import limit_threads
        from .memory import keep_freed_memory

        limit_threads()
        keep_freed_memory()
        _pool, _pid = Pool(thread_count()), os.getpid()
    return _pool

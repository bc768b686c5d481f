"""The one thread pool of the package. Workers wait, never spin; every parallel routine splits its rows here.

Size: TENSORGRAD_THREADS, else the number of processors this process may use, or its share of them where several train
together. NumPy's BLAS is limited to one thread when the pool starts (blas.py), because its own threads spin and
collapse as soon as anything else wants a core.
"""

import os
import threading
from queue import SimpleQueue
from weakref import ref


def thread_count():
    """Threads to use: TENSORGRAD_THREADS, else this process's share of the processors, else the size of the affinity
    mask."""
    given = os.environ.get("TENSORGRAD_THREADS", "")
    if given:
        if not (given.isascii() and given.isdigit()) or int(given) < 1:
            raise ValueError(f"TENSORGRAD_THREADS must be a whole number of at least 1, not {given!r}")
        return int(given)
    if _share is not None:
        return _share
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Task:
    """function(*args), run once by whoever is first to: a worker, or the thread that waits for it.

    Ctrl-C raises KeyboardInterrupt in the main thread between any two steps, also right after a lock was taken. So
    what has happened is read from `runner` and `finished`, which change once, and never from who holds the lock."""

    __slots__ = ("call", "_runners", "done", "finished", "error")

    def __init__(self, function, args):
        self.call, self.error, self.finished = (function, args), None, False
        self._runners, self.done = {}, threading.Lock()
        self.done.acquire()

    @property
    def runner(self):
        return self._runners.get(0)

    def run(self, runner):
        if self._runners.setdefault(0, runner) is not runner:
            return
        try:
            function, args = self.call
            function(*args)
        except BaseException as error:  # handed to the thread that asked
            self.error = error
        self.call = function = args = None
        self.finished = True
        self.done.release()


class _Worker(threading.Thread):
    """Runs tasks from a queue."""

    def __init__(self, queue):
        super().__init__(daemon=True, name="tensorgrad-worker")
        self._queue = queue
        self.start()

    def run(self):
        while True:
            self._queue.get().run(self)


class _Call:
    """One call of Pool.run."""


class Pool:
    """`run(tasks)` runs (function, args) pairs at the same time, the last one in the calling thread."""

    def __init__(self, threads):
        self.threads = threads
        self._workers, self._queue = [], SimpleQueue()
        self._user = None  # weak reference to the call of `run` that uses the workers

    def run(self, tasks):
        # a task that asks for the pool itself, or a second thread, does its work alone
        if len(tasks) == 1 or self.threads == 1 or (self._user is not None and self._user() is not None):
            for function, args in tasks:
                function(*args)
            return
        call = _Call()
        user = ref(call)
        try:
            self._user = user  # where Ctrl-C comes even before the last line here, it dies with the call
            while len(self._workers) < len(tasks) - 1:
                self._workers.append(_Worker(self._queue))
            handed = [_Task(*task) for task in tasks[:-1]]
            try:
                for task in handed:
                    self._queue.put(task)
                function, args = tasks[-1]
                function(*args)
            finally:
                error = self._wait(handed)
            if error is not None:
                raise error
        finally:
            if self._user is user:
                self._user = None

    @staticmethod
    def _wait(tasks):
        """Wait for all tasks, also where Ctrl-C comes in between; one that no worker has begun yet is run here. Returns
        the first error, or None."""
        error, left, me = None, tasks[::-1], object()
        while left:
            try:
                while left:
                    task = left[-1]
                    task.run(me)
                    if not task.finished:
                        task.done.acquire()
                    if task.finished:
                        error = error or task.error
                        left.pop()
            except BaseException as interrupt:  # raised again when no worker is left in the middle of a task
                error = interrupt
                if left and left[-1].runner is me:
                    left.pop()  # interrupted here, so that nobody will finish it
        return error

    def parts(self, n, grain=1):
        """Into how many parts `split` divides range(n)."""
        return max(1, min(self.threads, n // max(grain, 1)))

    def split(self, function, n, *args, grain=1, lead=0, align=1):
        """function(start, stop, *args) over parts of range(n): at most one per thread and per `grain` elements, each
        (but for the last) a multiple of `align` long. The last is the calling thread's, and `lead` elements longer:
        what it does while the others wake up. Where they finish first, it need not sleep and be woken itself."""
        parts = self.parts(n, grain)
        if parts == 1:
            function(0, n, *args)
            return
        shared = max(0, n - lead)
        edges = [min(n, -(-shared * i // parts // align) * align) for i in range(parts)] + [n]
        self.run([(function, (a, b, *args)) for a, b in zip(edges, edges[1:], strict=False) if a < b])


_pool = None
_share = None


def share_processors(threads):
    """Compute with so many threads from here on, because other processes use the rest of the processors;
    TENSORGRAD_THREADS wins. Returns the number in force."""
    global _share
    _share = threads
    if _pool is not None:
        _pool.threads = thread_count()
    return thread_count()


def pool():
    """The process's pool; made at first use, and again in the child of a fork."""
    global _pool
    if _pool is None:
        from .blas import limit_threads
        from .memory import keep_freed_memory

        limit_threads()
        keep_freed_memory()
        _pool = Pool(thread_count())
    return _pool


def _forget():
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # threads do not survive a fork

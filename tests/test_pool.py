"""The thread pool: every index once, errors, nested and concurrent use, interrupts, forks, its size."""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgrad.kernels.pool import Pool, thread_count

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pool():
    return Pool(3)


def python(code, **environment):
    """Run code in a process of its own: (return code, output, errors)."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    return done.returncode, done.stdout, done.stderr


@given(n=st.integers(0, 5000), grain=st.integers(0, 700), lead=st.sampled_from([0, 0, 3, 90, 6000]),
       align=st.integers(1, 130), threads=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_split_covers_every_index_once(n, grain, lead, align, threads):
    pool, spans = Pool(threads), []
    pool.run = lambda tasks: [function(*args) for function, args in tasks]  # what it would do, one after the other
    pool.split(lambda start, stop, extra: spans.append((start, stop, extra)), n, "extra", grain=grain, lead=lead,
               align=align)
    covered = Counter(i for start, stop, _ in spans for i in range(start, stop))
    assert covered == Counter(range(n)) and len(spans) <= threads
    assert all(extra == "extra" and start % align == 0 for start, _, extra in spans)
    if align == 1 and len(spans) > 1:
        lengths = [stop - start for start, stop, _ in spans]
        if not lead:
            assert min(lengths) >= grain
        elif lead <= n:
            assert lead - 1 <= lengths[-1] - max(lengths[:-1]) <= lead + 1


def test_split_runs_at_the_same_time(pool):
    """Three parts that wait for each other: with fewer threads at work, the barrier would break."""
    barrier = threading.Barrier(3, timeout=20)
    pool.split(lambda start, stop: barrier.wait(), 3)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_exceptions_come_out_and_the_pool_goes_on(pool, failing):
    """Whether a worker or the calling thread fails; the other tasks are finished first."""
    for _ in range(3):
        done = []

        def task(i, done=done):
            if i == failing:
                raise KeyError(f"task {i}")
            time.sleep(0.01)
            done.append(i)

        with pytest.raises(KeyError, match=f"task {failing}"):
            pool.run([(task, (i,)) for i in range(3)])
        assert sorted(done) == [i for i in range(3) if i != failing]
        done.clear()
        pool.run([(done.append, (i,)) for i in range(3)])
        assert sorted(done) == [0, 1, 2]


def test_several_exceptions_leave_nothing_behind(pool):
    def fail():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        pool.run([(fail, ())] * 3)
    pool.run([(len, ("a",))] * 3)


def test_nested_use_runs_in_the_thread_that_asks(pool):
    seen = []

    def inner(start, stop):
        seen.append((threading.get_ident(), stop - start))

    barrier = threading.Barrier(3, timeout=20)

    def outer(start, stop):
        barrier.wait()
        pool.split(inner, 30)

    pool.split(outer, 3)
    counts = Counter()
    for ident, n in seen:
        counts[ident] += n
    assert list(counts.values()) == [30, 30, 30]  # each of the three threads did all of its own


def test_several_threads_at_once(pool):
    """Each gets its own sums right, whether the pool was free or not."""
    results, errors = {}, []

    def use(number):
        try:
            for _ in range(200):
                parts = []
                pool.split(lambda start, stop, parts=parts: parts.append(sum(range(start, stop))), 1000 + number)
                assert sum(parts) == sum(range(1000 + number))
            results[number] = True
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and len(results) == 6


def test_tasks_are_not_kept(pool):
    """What a worker has run does not live on in it."""
    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    pool.run([(lambda t: None, (thing,))] * 3)
    del thing
    deadline = time.monotonic() + 5
    while gone() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone() is None


INTERRUPT = """
import faulthandler, signal, sys, time
from tensorgrad.kernels.pool import Pool
faulthandler.dump_traceback_later(20, exit=True)  # a pool that hangs is a failure, not a wait
pool, finished = Pool(2), []

def slow(seconds):
    time.sleep(seconds)
    finished.append(seconds)

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    pool.run([(slow, (0.6,)), (slow, (0.0,))])
    sys.exit("no KeyboardInterrupt")
except KeyboardInterrupt:
    pass
for wait in (0.1, 0.7, 0.1):
    finished.clear()
    pool.run([(slow, (wait,)), (slow, (0.0,))])
    assert wait in finished, "the pool came back before its worker had done"
    time.sleep(0.5)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer on this system")
def test_ctrl_c_while_waiting_leaves_a_pool_that_works():
    code, _, errors = python(INTERRUPT)
    assert code == 0 and not errors, errors


INTERRUPTS = """
import faulthandler, random, signal
from tensorgrad.kernels.pool import Pool
faulthandler.dump_traceback_later(30, exit=True)
pool, random = Pool(3), random.Random(0)

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
for round in range(3000):
    finished = []
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(5e-6, 2e-4))
        while True:
            finished.clear()
            pool.run([(finished.append, (i,)) for i in range(3)])
    except KeyboardInterrupt:
        pass
    finished = []
    pool.run([(finished.append, (i,)) for i in range(3)])
    assert sorted(finished) == [0, 1, 2], finished
    assert pool._user is None or pool._user() is None
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer on this system")
def test_ctrl_c_at_any_moment_leaves_a_pool_that_works():
    code, _, errors = python(INTERRUPTS)
    assert code == 0 and not errors, errors


FORK = """
import os, sys
import numpy as np
from tensorgrad.kernels.pool import pool
from tensorgrad.kernels import threaded
x = np.random.default_rng(0).standard_normal((1000, 400))
want = threaded.softmax(np, x, 1)
parent = pool()
assert parent._workers, "the parent's pool was not used"
child = os.fork()
if child == 0:
    import faulthandler
    faulthandler.dump_traceback_later(20, exit=True)
    same = np.array_equal(threaded.softmax(np, x, 1), want)
    own = pool() is not parent and pool()._workers
    os._exit(0 if same and own else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert pool() is parent
sys.exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_a_pool_of_its_own():
    code, _, errors = python(FORK, TENSORGRAD_THREADS="2")
    assert code == 0, errors


def test_size(monkeypatch):
    monkeypatch.delenv("TENSORGRAD_THREADS", raising=False)
    assert thread_count() >= 1
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8})
        assert thread_count() == 3
    for given_value, want in (("", thread_count()), ("1", 1), ("7", 7)):
        monkeypatch.setenv("TENSORGRAD_THREADS", given_value)
        assert thread_count() == want


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", " ", "2 3", "²"])
def test_a_size_that_is_none(value, monkeypatch):
    monkeypatch.setenv("TENSORGRAD_THREADS", value)
    with pytest.raises(ValueError, match="TENSORGRAD_THREADS must be a whole number of at least 1, not"):
        thread_count()

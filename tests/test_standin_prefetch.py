"""tg.cuda.Prefetcher on the stand-in: what its streams wait for, and when memory may be used again."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import standin
from standin_device import gpu  # noqa: F401
from tiny_run import tiny_config, tiny_trainer

import tensorgrad as tg


class Event:
    def __init__(self, block=False, disable_timing=False):
        self.behind = set()


class Stream:
    """Knows which pieces of work come before whatever is queued on it next."""

    current = None

    def __init__(self, non_blocking=False):
        self.before, self.non_blocking = set(), non_blocking

    def __enter__(self):
        self.outer, Stream.current = Stream.current, self

    def __exit__(self, *error):
        Stream.current = self.outer

    def record(self, event=None):
        event = event or Event()
        event.behind |= self.before
        return event

    def wait_event(self, event):
        self.before |= event.behind


def recorded(monkeypatch):
    """The main stream, and a dict: number of a copied array -> what its copy comes behind."""
    main, copies = Stream(), {}
    Stream.current = main

    def asarray(a, *rest, original=standin.asarray, **options):
        if isinstance(a, np.ndarray) and a.ndim:
            name = f"copy {int(a.flat[0])}"
            copies[int(a.flat[0])] = set(Stream.current.before)
            assert Stream.current is not main and Stream.current.non_blocking
            Stream.current.before.add(name)
        return original(a, *rest, **options)

    for owner, name, value in ((standin.cuda, "Stream", Stream), (standin.cuda, "Event", Event),
                               (standin.cuda, "get_current_stream", lambda: Stream.current),
                               (standin, "asarray", asarray)):
        monkeypatch.setattr(owner, name, value)
    return main, copies


def test_copies_overlap_and_nothing_is_overwritten_too_early(gpu, monkeypatch):  # noqa: F811
    main, copies = recorded(monkeypatch)
    prefetch, arrays = tg.cuda.Prefetcher("cuda"), []
    for i in range(5):
        main.before.add(f"step {i - 1}")  # uses what the call before this one has returned
        x, y = prefetch(np.full((2, 3), i), np.full(4, i + 100))
        assert {f"copy {i}", f"copy {i + 100}"} <= main.before, "what follows waits for the copies"
        assert f"step {i - 1}" not in copies[i], "the copy does not wait for the step that is being computed"
        assert i < 2 or f"step {i - 2}" in copies[i], "whose memory the copy may use is done with"
        arrays.append(weakref.ref(x.array))
        assert x.device.type == "cuda" and x.tolist() == np.full((2, 3), i).tolist() and len(y) == 4
        del x, y
        gc.collect()
        assert [a() is not None for a in arrays[-3:]] == [False, False, True][-len(arrays):]
        assert arrays[-1]() is not None, "kept over the next call"


def test_memory_is_kept_while_the_next_is_copied(gpu, monkeypatch):  # noqa: F811
    prefetch = tg.cuda.Prefetcher("cuda")
    first = weakref.ref(prefetch(np.ones(3))[0].array)
    seen = []
    monkeypatch.setattr(standin, "asarray", lambda a, f=standin.asarray: (seen.append(first() is not None), f(a))[1])
    prefetch(np.ones(3))
    gc.collect()
    assert seen == [True] and first() is None


def test_the_trainer_s_batches_come_this_way(tmp_path, gpu, monkeypatch):  # noqa: F811
    trainer = tiny_trainer(tiny_config(tmp_path, device="cuda", gradient_accumulation_steps=2))
    _, copies = recorded(monkeypatch)
    trainer._prefetch = tg.cuda.Prefetcher("cuda")
    state = trainer.batches.state_dict()
    batches, parts, tokens, _ = trainer._load()
    trainer.batches.load_state_dict(state)
    assert copies and parts == [2, 2] and tokens == sum(y.numel() for _, y in batches)
    for x, y in batches:
        for got, want in zip((x, y), trainer.batches.next(), strict=True):
            np.testing.assert_array_equal(got.cpu().numpy(), want)

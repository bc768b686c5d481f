"""Windows: what they hold, that random ones resume exactly, and that sequential ones predict each token once."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.errors import UserError
from gpt.text import IGNORE_INDEX, Corpus, RandomWindows, SequentialWindows, prepare

no_deadline = settings(deadline=None)  # the machine may be busy


def test_random_windows_are_windows():
    tokens = np.arange(1000, dtype=np.uint16) + 64_000
    x, y = RandomWindows(tokens, block_size=8, batch_size=5, seed=1).next()
    assert x.shape == y.shape == (5, 8) and x.dtype == y.dtype == np.int64
    assert x.flags.c_contiguous and y.flags.c_contiguous and not np.shares_memory(x, y)
    assert (y == x + 1).all() and (np.diff(x) == 1).all()


def test_every_start_is_equally_likely():
    tokens, block_size, draws = np.arange(20), 4, 16_000
    x, y = RandomWindows(tokens, block_size, draws, seed=3).next()
    counts = np.bincount(x[:, 0])
    assert len(counts) == 16 == len(tokens) - block_size and y.max() == 19  # starts 0 .. 15: the last token is a target
    chi2 = ((counts - 1000) ** 2 / 1000).sum()  # 15 degrees of freedom
    assert chi2 < 37.7  # exceeded by chance once in 1,000 seeds


def test_shortest_text():
    x, y = RandomWindows(np.arange(5), 4, 3, seed=0).next()
    assert x.tolist() == [[0, 1, 2, 3]] * 3 and y.tolist() == [[1, 2, 3, 4]] * 3
    with pytest.raises(UserError, match="shorter than a block"):
        RandomWindows(np.arange(4), 4, 3, seed=0)


def test_seeds_and_steps_differ():
    tokens = np.arange(10_000)
    batches = [RandomWindows(tokens, 4, 16, seed) for seed in (0, 1, -1, 2**40)]
    starts = [tuple(batch.next()[0][:, 0]) for batch in batches for _ in range(50)]
    assert len(set(starts)) == 200


def test_the_order_is_pinned():
    """A stored run resumes on the same batches only if this never changes."""
    batches = RandomWindows(np.arange(100_000), 8, 4, seed=1337)
    assert batches.next()[0][:, 0].tolist() == [71813, 91954, 96407, 98432]
    assert batches.next()[0][:, 0].tolist() == [85205, 32428, 63619, 94284]


@no_deadline
@given(st.integers(-(2**63), 2**64), st.integers(0, 20), st.integers(1, 5))
def test_resume_is_exact(seed, steps, batch_size):
    tokens = np.random.default_rng(0).integers(0, 50_000, 5000).astype(np.uint16)
    straight = RandomWindows(tokens, 16, batch_size, seed)
    for _ in range(steps):
        straight.next()
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = RandomWindows(tokens, 16, batch_size, seed=999)
    resumed.next()
    resumed.load_state_dict(state)
    for _ in range(3):
        for ours, theirs in zip(resumed.next(), straight.next(), strict=True):
            assert np.array_equal(ours, theirs)
    assert resumed.state_dict() == straight.state_dict() == {"seed": seed, "step": steps + 3}


def test_numpys_global_generator_plays_no_part():
    tokens = np.arange(1000)
    np.random.seed(0)
    first = RandomWindows(tokens, 4, 8, seed=5).next()[0]
    np.random.seed(1)
    before = np.random.get_state()[2]
    assert np.array_equal(RandomWindows(tokens, 4, 8, seed=5).next()[0], first)
    assert np.random.get_state()[2] == before


def test_windows_over_a_mapped_file(monkeypatch, tmp_path):
    text = "abcdefghij" * 30
    dataset = prepare(Corpus(text, "x", ""), "char", tmp_path)
    x, y = RandomWindows(dataset.train, 8, 4, seed=0).next()
    assert type(x) is type(y) is np.ndarray
    for row, target in zip(x, y, strict=True):
        assert dataset.tokenizer.decode(row) in text
        assert dataset.tokenizer.decode(target)[:-1] == dataset.tokenizer.decode(row)[1:]
    batches = list(SequentialWindows(dataset.val, 8, 3))
    assert dataset.tokenizer.decode(np.concatenate([x.reshape(-1) for x, _ in batches])[:30]) == text[:30]


@st.composite
def shapes(draw):
    block_size = draw(st.integers(1, 12))
    return draw(st.integers(0, 100)), block_size, draw(st.integers(1, 4)), draw(st.none() | st.integers(1, block_size))


@no_deadline
@given(shapes())
def test_each_token_but_the_first_is_predicted_once(shape):
    n, block_size, batch_size, stride = shape
    tokens = np.arange(n, dtype=np.uint32) + 70_000  # all different, so a target tells its position
    windows = SequentialWindows(tokens, block_size, batch_size, stride)
    batches = list(windows)
    assert len(batches) == len(windows)
    predicted = []
    for x, y in batches:
        assert x.shape == y.shape and x.shape[1] == block_size and 1 <= x.shape[0] <= batch_size
        assert x.dtype == y.dtype == np.int64 and x.flags.c_contiguous and y.flags.c_contiguous
        counted = y != IGNORE_INDEX
        assert counted.any(axis=1).all()  # no window without a target
        assert (y[counted] == x[counted] + 1).all()
        assert np.isin(x, tokens).all()  # padding is a valid id
        predicted += y[counted].tolist()
    assert predicted == tokens[1:].tolist()
    assert all(len(x) == batch_size for x, _ in batches[:-1])


@no_deadline
@given(shapes())
def test_overlap_gives_context(shape):
    n, block_size, batch_size, stride = shape
    stride = stride or block_size
    for x, y in SequentialWindows(np.arange(n), block_size, batch_size, stride):
        for start, row in zip(x[:, 0], y, strict=True):
            columns = np.flatnonzero(row != IGNORE_INDEX)
            assert start % stride == 0
            assert columns[0] == (0 if start == 0 else block_size - stride)
            assert (np.diff(columns) == 1).all()  # one run: only the head and the tail are left out


def test_a_text_shorter_than_a_window():
    ((x, y),) = SequentialWindows(np.array([7, 8, 9]), 5, 4)
    assert x.tolist() == [[7, 8, 9, 9, 9]] and y.tolist() == [[8, 9, -100, -100, -100]]
    assert list(SequentialWindows(np.array([7]), 5, 4)) == list(SequentialWindows(np.array([], int), 5, 4)) == []


def test_iterates_again():
    windows = SequentialWindows(np.arange(50), 8, 3)
    assert all(np.array_equal(a, b) for p, q in zip(windows, windows, strict=True) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(
    ("limit", "starts"), [(1, [0]), (3, [0, 30, 60]), (4, [0, 20, 50, 70]), (99, range(0, 100, 10)), (0, [])]
)
def test_limit_spreads_evenly(limit, starts):
    windows = SequentialWindows(np.arange(101), 10, 2, limit=limit)  # 10 windows
    assert [start for x, _ in windows for start in x[:, 0]] == list(starts)
    assert len(windows) == -(-len(starts) // 2)


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_impossible_stride(stride):
    with pytest.raises(UserError, match="stride is .* from 1 to block_size, 8"):
        SequentialWindows(np.arange(50), 8, 2, stride)

"""Batches of windows over a split: random ones for training, all of them in order for evaluation.

In a window that starts at s, inputs are the tokens s .. s + T - 1 and targets the ones after each, s + 1 .. s + T.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import UserError
from .token_files import check_length

IGNORE_INDEX = -100  # the target that cross-entropy leaves out, as in PyTorch


class RandomWindows:
    """Training batches: starts uniform in [0, tokens - block_size), with replacement, as in nanoGPT.

    The starts of batch number `step` are a function of (seed, step) alone: Philox, a counter-based generator (Salmon et
    al. 2011), keyed with the seed (modulo 2^64) and counting from step * 2^192. So the state is two integers, and a
    resumed run continues bit for bit. Raises UserError when the tokens are fewer than block_size + 1.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int):
        check_length(tokens, block_size)
        # a plain array on the mapped file: numpy's memmap class makes every indexing slower
        plain = np.asarray(tokens)
        self._windows = np.lib.stride_tricks.sliding_window_view(plain, block_size + 1)  # (tokens - T, T + 1), no copy
        self._batch_size = batch_size
        self._seed = seed
        self._step = 0

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, each (batch_size, block_size) int64."""
        generator = np.random.Generator(np.random.Philox(key=self._seed % 2**64, counter=self._step << 192))
        starts = generator.integers(len(self._windows), size=self._batch_size)
        self._step += 1
        windows = self._windows[starts]  # (B, T + 1), a copy
        return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        """{"seed", "step"}: which batch comes next."""
        return {"seed": self._seed, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seed, self._step = int(state["seed"]), int(state["step"])


class SequentialWindows:
    """Evaluation batches: windows at 0, stride, 2 * stride, ... that predict every token but the first exactly once.

    With stride < block_size (default: equal) windows overlap, and each but the first counts only its last `stride`
    targets, so that every one of them has more than block_size - stride tokens before it; the other targets are
    IGNORE_INDEX. The last window may reach past the end: there too, and its inputs repeat the last token.

    `limit` keeps that many windows, spread evenly over the split. len() is the number of batches; the last batch may
    have fewer rows than batch_size. Raises UserError for a stride outside 1 .. block_size.
    """

    def __init__(
        self, tokens: np.ndarray, block_size: int, batch_size: int, stride: int | None = None, limit: int | None = None
    ):
        stride = block_size if stride is None else stride
        if not 1 <= stride <= block_size:
            raise UserError(f"stride is {stride}; it must be from 1 to block_size, {block_size}, to reach every token")
        self._tokens = np.asarray(tokens)
        self._block_size, self._batch_size, self._stride = block_size, batch_size, stride
        targets = len(tokens) - 1
        after_first = max(0, -(-(targets - block_size) // stride))  # rounded up
        windows = 1 + after_first if targets > 0 else 0
        kept = windows if limit is None else min(limit, windows)
        self._starts = np.arange(kept) * windows // max(kept, 1) * stride

    def __len__(self) -> int:
        return -(-len(self._starts) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs and targets, each (rows, block_size) int64, rows <= batch_size."""
        for first in range(0, len(self._starts), self._batch_size):
            starts = self._starts[first : first + self._batch_size, None]  # (B, 1)
            positions = starts + np.arange(self._block_size + 1)  # (B, T + 1)
            windows = self._tokens[np.minimum(positions, len(self._tokens) - 1)].astype(np.int64)
            inputs, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
            new = positions[:, 1:] > starts + self._block_size - self._stride  # the last `stride` of each window
            inside = positions[:, 1:] < len(self._tokens)
            targets[~(inside & (new | (starts == 0)))] = IGNORE_INDEX
            yield inputs, targets

"""Training of a byte-pair encoding."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from operator import methodcaller

import regex


def train_ranks(texts: Iterable[str], size: int, pattern: str) -> dict[bytes, int]:
    """{token: rank} of the 256 bytes and up to size - 256 merges: each merges the pair of neighbours that is most
    frequent within the pieces into which `pattern` cuts the texts, of equally frequent pairs the one of lower ranks.

    The ranks are those of Karpathy's rustbpe. The pairs wait in a heap with the counts they had when they were pushed;
    a merge changes counts of pairs it touches, and a pair that comes up with an old count goes back with its new one.
    """
    cut = regex.compile(pattern).finditer
    pieces = Counter(match for text in texts for match in map(methodcaller("group"), cut(text)))
    counts = list(pieces.values())
    words = [list(piece.encode(errors="replace")) for piece in pieces]
    tokens = [bytes([b]) for b in range(256)]
    pair_counts: Counter[tuple[int, int]] = Counter()
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # the words that hold, or once held, a pair
    for n, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[n]
            where[pair].add(n)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < size:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changes: Counter[tuple[int, int]] = Counter()
        for n in where.pop(pair):
            _merge(words[n], pair, new, counts[n], changes)
            for neighbours in pairwise(words[n]):
                if new in neighbours:
                    where[neighbours].add(n)
        for changed, change in changes.items():
            pair_counts[changed] += change
            if change > 0:
                heapq.heappush(heap, (-pair_counts[changed], changed))
        del pair_counts[pair]
    return {token: rank for rank, token in enumerate(tokens)}


def _merge(word: list[int], pair: tuple[int, int], new: int, count: int, changes: Counter[tuple[int, int]]) -> None:
    """Replace every `pair` in `word`, from the left, by `new`, and add what that does to the counts to `changes`."""
    first, second = pair
    at = 0
    while first in word[at:-1]:
        at = word.index(first, at)
        if word[at + 1] == second:
            if at > 0:
                changes[word[at - 1], first] -= count
                changes[word[at - 1], new] += count
            if at + 2 < len(word):
                changes[second, word[at + 2]] -= count
                changes[new, word[at + 2]] += count
            word[at : at + 2] = [new]
        at += 1

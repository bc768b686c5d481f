"""Byte-pair merges, the two ways in which they are written: as pairs in order, and as ranks of the merged tokens."""

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise

Pair = tuple[bytes, bytes]


@cache
def byte_alphabet() -> tuple[str, ...]:
    """GPT-2's printable character for each of the 256 bytes: itself where Latin-1 prints it, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return tuple(chr(b if b in printable else next(others)) for b in range(256))


@cache
def _bytes_of() -> dict[str, int]:
    return {c: b for b, c in enumerate(byte_alphabet())}


def printable(token: bytes) -> str:
    """`token` in GPT-2's alphabet."""
    return token.decode("latin-1").translate(byte_alphabet())


def from_printable(text: str) -> bytes:
    """The bytes that `text` spells in GPT-2's alphabet; raises KeyError for a character that is not of it."""
    table = _bytes_of()
    return bytes([table[c] for c in text])


def find_merge(token: bytes, ranks: Mapping[bytes, int]) -> Pair | None:
    """The two tokens whose merge makes `token`, or None where no merge does: what merging its bytes without `token`
    itself comes to, the lowest rank first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    own = ranks[token]
    while len(parts) > 2:
        rank, at = min((ranks.get(a + b, own), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank >= own:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 and all(part in ranks for part in parts) else None


def find_merges(tokens: Iterable[bytes]) -> dict[bytes, Pair | None]:
    """`find_merge` for every token of more than one byte; `tokens` come in the order of their ranks."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return {token: find_merge(token, ranks) for token in ranks if len(token) > 1}

"""Plain files of byte-pair vocabularies: tiktoken's ranks, GPT-2's vocab.json with merges.txt."""

import base64
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ...errors import UserError
from .bpe import END_OF_TEXT, BPETokenizer
from .hugging_face import rank_merges
from .merges import printable
from .patterns import GPT2


def read_tiktoken(
    data: bytes, pattern: str = GPT2, special_tokens: Mapping[str, int] | None = None, name: str = "bpe"
) -> BPETokenizer:
    """The vocabulary of a tiktoken file: lines of a token in base64 and its rank, which is its id.

    The file holds neither the pattern nor the special tokens. Raises UserError naming a line that is none.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            if not token or token in ranks:
                raise ValueError("empty or there twice")
            ranks[token] = int(rank)
        except ValueError as error:
            raise UserError(f"line {number} is no token in base64 with its rank ({error})") from error
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    return BPETokenizer(ranks, pattern, special_tokens=special_tokens, name=name)


def write_tiktoken(tokenizer: BPETokenizer) -> bytes:
    """The content of a tiktoken file. Raises UserError where the ids are not in the order of merging."""
    ids = [i for token, i in tokenizer.ranks.items() if len(token) > 1]
    if not all(a < b for a, b in pairwise(ids)):
        raise UserError(f"the ids of {tokenizer.name} are not in the order of its merges, as a tiktoken file needs"
                        " them; write a tokenizer.json")
    by_id = sorted(tokenizer.ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in by_id)


def read_gpt2(vocab: bytes, merges: bytes) -> BPETokenizer:
    """The vocabulary of GPT-2's vocab.json (also encoder.json) and merges.txt (also vocab.bpe)."""
    tokens: dict[str, Any] = dict(json.loads(vocab))
    special = {name: tokens.pop(name) for name in (END_OF_TEXT,) if name in tokens}
    lines = merges.decode("utf-8").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    ranks, unmerged = rank_merges(tokens, pairs)
    return BPETokenizer(ranks, GPT2, unmerged=unmerged, special_tokens=special)


def write_gpt2(tokenizer: BPETokenizer) -> dict[str, bytes]:
    """{"vocab.json": ..., "merges.txt": ...}. The files hold no pattern: readers take GPT-2's, so that another one, and
    tokens that no merge makes, raise UserError."""
    pairs = tokenizer.merges
    if tokenizer.pattern != GPT2 or tokenizer.normalizer or None in pairs.values():
        raise UserError(f"{tokenizer.name} does not cut text as GPT-2 does, as vocab.json and merges.txt imply;"
                        " write a tokenizer.json")
    vocab = {printable(token): i for token, i in tokenizer.ranks.items()}
    vocab |= {printable(piece): i for i, piece in tokenizer.unmerged.items()}
    vocab |= dict(tokenizer.added_tokens) | dict(tokenizer.special_tokens)
    merges = "".join(f"{printable(a)} {printable(b)}\n" for a, b in pairs.values())
    vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
    text = json.dumps(vocab, ensure_ascii=False)
    return {"vocab.json": text.encode(), "merges.txt": f"#version: 0.2\n{merges}".encode()}

"""Byte-level byte-pair encoding: vocabularies trained here, read from files, or published with tiktoken.

tiktoken merges; what surrounds it (ids in any order, special tokens, files) is here.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import regex

from ...errors import UserError
from .base import Tokenizer, joined_surrogates
from .bpe_training import train_ranks
from .hugging_face import MAX_ID, read_bpe, write_bpe
from .merges import Pair, find_merges
from .patterns import GPT2, PATTERNS, covering, pattern_named

ENCODINGS = ("gpt2", "cl100k_base", "o200k_base")  # the tiktoken encodings that can be asked for by name
END_OF_TEXT = "<|endoftext|>"


class BPETokenizer(Tokenizer):
    """Byte-level BPE: any text has ids, and they spell it byte for byte.

    ranks:           {token: id} in the order of merging; the ids may be any
    pattern:         how text is cut before merging: a name of patterns.PATTERNS or a regular expression
    special_tokens:  {name: id} of ids that stand for no text
    added_tokens:    {text: id} of texts that are one token wherever they occur
    unmerged:        {id: bytes} of ids that no text has, but that mean something when decoded
    normalizer:      the Unicode form that text is brought to first ("NFC"), or None
    config:          roles and chat template, as `Tokenizer.configure` takes them

    A byte that `ranks` lacks (SmolLM2's vocabulary has no control characters) leaves no id, as with Hugging Face.
    Raises UserError for ids that are no ids or occur twice, and for a pattern that is none.
    """

    kind = "bpe"

    def __init__(
        self, ranks: Mapping[bytes, int], pattern: str = GPT2, *, special_tokens: Mapping[str, int] | None = None,
        added_tokens: Mapping[str, int] | None = None, unmerged: Mapping[int, bytes] | None = None,
        normalizer: str | None = None, name: str = "bpe", config: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self.name, self.pattern, self.normalizer = name, pattern_named(pattern), normalizer
        self.ranks, self.unmerged = dict(ranks), dict(unmerged or {})
        self.special_tokens, self.added_tokens = dict(special_tokens or {}), dict(added_tokens or {})
        for token in (*self.special_tokens, *self.added_tokens):
            if not (token and isinstance(token, str)):
                raise UserError(f"the name of a token is {token!r}; it must be text")
        ids = [*self.ranks.values(), *self.unmerged, *self.special_tokens.values(), *self.added_tokens.values()]
        if not self.ranks:
            raise UserError("a BPE vocabulary must hold at least one token")
        if wrong := next((i for i in ids if type(i) is not int or not 0 <= i < MAX_ID), None):
            raise UserError(f"a token has the id {wrong!r}; ids are integers from 0 to {MAX_ID - 1:,}")
        if len(set(ids)) < len(ids):
            twice = next(i for n, i in enumerate(sorted(ids)) if sorted(ids)[n + 1] == i)
            raise UserError(f"two tokens have the id {twice}")
        self.vocab_size = max(ids) + 1
        self.configure({"eos_token": self._end_of_text()} | dict(config or {}))
        self._encoding, self._id_of_rank = self._merger()

    def _end_of_text(self) -> str | None:
        return END_OF_TEXT if END_OF_TEXT in self.special_tokens else None

    def _merger(self):
        """(tiktoken.Encoding, ids of its ranks or None where the ranks are the ids)."""
        import tiktoken  # here: whoever works with characters does not wait for it

        single = [bytes([b]) for b in range(256)]
        merged = [i for token, i in self.ranks.items() if len(token) > 1]
        if all(byte in self.ranks for byte in single) and all(a < b for a, b in zip(merged, merged[1:], strict=False)):
            ranks, ids = self.ranks, None
        else:  # ranks of our own; -1 is no id
            order = dict.fromkeys([*single, *self.ranks])
            ranks = {token: rank for rank, token in enumerate(order)}
            ids = np.array([self.ranks.get(token, -1) for token in order], np.int64)
        pattern = covering(self.pattern)
        try:
            return tiktoken.Encoding(self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}), ids
        except ValueError as error:
            raise UserError(f"the pattern {self.pattern!r} is no regular expression: {error}") from error

    @classmethod
    def train(
        cls, texts: str | Iterable[str], vocab_size: int, pattern: str = GPT2,
        special_tokens: Iterable[str] = (END_OF_TEXT,),
    ) -> "BPETokenizer":  # fmt: skip
        """A vocabulary of `vocab_size` ids from text: the 256 bytes, the merges for which that leaves room, and special
        tokens last.

        Text that offers fewer merges gives a smaller vocabulary. Raises UserError for a size that leaves no room.
        """
        special = list(dict.fromkeys(special_tokens))
        if vocab_size < 256 + len(special):
            raise UserError(f"a BPE vocabulary of {vocab_size} ids is too small: the bytes and the special tokens are "
                            f"{256 + len(special)}")
        texts = [texts] if isinstance(texts, str) else texts
        ranks = train_ranks(texts, vocab_size - len(special), pattern_named(pattern))
        return cls(ranks, pattern, special_tokens={name: len(ranks) + n for n, name in enumerate(special)})

    def _encode_ordinary(self, text: str) -> np.ndarray:
        try:
            if self.normalizer:
                text = unicodedata.normalize(self.normalizer, text)
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self._encode_ordinary(joined_surrogates(text))
        except ValueError:  # tiktoken's regular expressions give up on runs of about a million spaces
            ids = self._encode_pieces(text)
        if self._id_of_rank is None:
            return ids
        ids = self._id_of_rank[ids]
        return ids[ids >= 0].astype(np.uint32)

    def _encode_pieces(self, text: str) -> np.ndarray:
        """The ranks of `text`, cut by Python's slower and more patient regular expressions."""
        try:
            cut = regex.compile(covering(self.pattern))
        except regex.error as error:
            raise UserError(f"the pattern {self.pattern!r} is no regular expression: {error}") from error
        pieces = [self._whole.encode_to_numpy(match.group(), disallowed_special=()) for match in cut.finditer(text)]
        return np.concatenate(pieces)

    @cached_property
    def _whole(self):
        """A tiktoken.Encoding that takes its text for one piece."""
        import tiktoken

        ranks = self._encoding._mergeable_ranks  # tiktoken has no public way to them; the name is as old as the class
        return tiktoken.Encoding("whole", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})

    @cached_property
    def pieces(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size  # an id may be unused; an untrained model may still draw it
        for token, i in self.ranks.items():
            pieces[i] = token
        for i, piece in self.unmerged.items():
            pieces[i] = piece
        for name, i in [*self.special_tokens.items(), *self.added_tokens.items()]:
            pieces[i] = name.encode(errors="replace")
        return pieces

    @cached_property
    def merges(self) -> dict[bytes, Pair | None]:
        """{token: the two tokens whose merge makes it} of all tokens longer than a byte, in the order of merging; None
        where no merge makes it, so that only a piece of text that is exactly the token becomes it."""
        return find_merges(self.ranks)

    def hugging_face_json(self) -> dict[str, Any]:
        return write_bpe(self)

    to_json = hugging_face_json

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> "BPETokenizer":
        return cls(**read_bpe(description))


class TiktokenTokenizer(BPETokenizer):
    """A published byte-pair encoding: gpt2 (50,257 ids), cl100k_base (100,277) or o200k_base (200,019).

    tiktoken downloads the vocabulary on first use and keeps it in TIKTOKEN_CACHE_DIR. Encodes any text.
    """

    kind = "tiktoken"

    def __init__(self, name: str):
        if name not in ENCODINGS:
            raise UserError(f"no tiktoken encoding {name!r}; there are {', '.join(ENCODINGS)}")
        import tiktoken

        try:
            self._published = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors), or a wrong file
            raise UserError(
                f"cannot get the vocabulary of {name} ({type(error).__name__}): connect once, or set TIKTOKEN_CACHE_DIR"
                " to a folder with tiktoken's files, or use --tokenizer char, which needs none"
            ) from error
        ranks, special = self._published._mergeable_ranks, self._published._special_tokens
        pattern = next(pattern for start, pattern in PATTERNS.items() if name.startswith(start))
        in_order = dict(sorted(ranks.items(), key=lambda item: item[1]))
        super().__init__(in_order, pattern, special_tokens=special, name=name)

    def _merger(self):
        return self._published, None

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name}

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> "TiktokenTokenizer":
        return cls(description["name"])

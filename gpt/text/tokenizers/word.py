"""One id per word and per punctuation mark."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import regex

from ...errors import UserError
from .base import Tokenizer
from .hugging_face import document

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
WORD = r"\n|[\p{L}\p{M}\p{N}_]+(?:['’\-][\p{L}\p{M}\p{N}_]+)*|[^\p{L}\p{M}\p{N}_\s]"
CLEANING = (  # (pattern, replacement), in this order: typographic marks to plain ones, the rest of the symbols away
    ("[‘’]", "'"), ("[“”]", '"'), ("[–—]", "-"), ("…", "..."), (r"[^\p{L}\p{M}\p{N}_\s.,!?;:'\"()\-]+|\s+", " "),
)  # fmt: skip
NO_SPACE_BEFORE = frozenset(".,!?;:)]}%’”…\n")
NO_SPACE_AFTER = frozenset("([{‘“\n")


class WordTokenizer(Tokenizer):
    """One id per word, punctuation mark and line end; <pad> 0, <unk> 1, <bos> 2, <eos> 3, then words by frequency.

    words:      the vocabulary, without the special tokens
    lowercase:  text is lowercased first
    clean:      typographic marks become plain ones, other symbols are dropped, white space and line ends are one space

    Words that are not in the vocabulary become <unk>. Decoding sets spaces as in print, not as they were.
    """

    kind = name = "word"

    def __init__(self, words: Sequence[str], lowercase: bool = True, clean: bool = True):
        if not all(isinstance(word, str) and regex.fullmatch(WORD, word) for word in words):
            raise UserError("a word vocabulary must hold words, punctuation marks and line ends")
        if len(set(words)) < len(words):
            raise UserError("a word vocabulary holds a word twice")
        if type(lowercase) is not bool or type(clean) is not bool:
            raise UserError("lowercase and clean are true or false")
        self.words, self.lowercase, self.clean = list(words), lowercase, clean
        self.special_tokens = {name: i for i, name in enumerate(SPECIAL)}
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = range(4)
        self.eot_id = self.eos_id
        self.vocab_size = len(SPECIAL) + len(words)
        self._ids = {word: i for i, word in enumerate(words, len(SPECIAL))}

    @classmethod
    def build_vocabulary(
        cls, texts: str | Iterable[str], vocab_size: int = 10_000, min_frequency: int = 2, lowercase: bool = True,
        clean: bool = True,
    ) -> "WordTokenizer":  # fmt: skip
        """The most frequent words of `texts`, at most `vocab_size` ids with the special tokens, each word at least
        `min_frequency` times; words of equal frequency in alphabetical order. Raises UserError where none is left."""
        if vocab_size <= len(SPECIAL):
            raise UserError(f"a word vocabulary of {vocab_size} ids has no room for words beside {', '.join(SPECIAL)}")
        texts = [texts] if isinstance(texts, str) else texts
        split = cls([], lowercase, clean).split
        counts = Counter(word for text in texts for word in split(text))
        frequent = sorted((-count, word) for word, count in counts.items() if count >= min_frequency)
        if not frequent:
            raise UserError(f"no word occurs {min_frequency} times; give more text with --data")
        return cls([word for _, word in frequent[: vocab_size - len(SPECIAL)]], lowercase, clean)

    def split(self, text: str) -> list[str]:
        """The words, marks and line ends of `text`, after cleaning and lowercasing."""
        if self.clean:
            for pattern, replacement in CLEANING:
                text = regex.sub(pattern, replacement, text)
        if self.lowercase:
            text = text.replace("Σ", "σ").lower()  # whatever follows it: one letter, one lower case
        return regex.findall(WORD, text)

    def _encode_ordinary(self, text: str) -> np.ndarray:
        return np.array([self._ids.get(word, self.unk_id) for word in self.split(text)], np.uint32)

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every id where it follows a word: with the space before it."""
        words = [*SPECIAL, *self.words]
        return [(word if word in NO_SPACE_BEFORE else f" {word}").encode(errors="replace") for word in words]

    @cached_property
    def _openers(self) -> frozenset[int]:
        return frozenset(i for word, i in self._ids.items() if word in NO_SPACE_AFTER)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        ids = self._known(ids)
        spaced = [i not in self._openers for i in ids[:-1]]
        pieces = [self.pieces[i] if space else self.pieces[i].removeprefix(b" ")
                  for i, space in zip(ids, [False, *spaced], strict=False)]
        return b"".join(pieces)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "words": self.words, "lowercase": self.lowercase, "clean": self.clean}

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> "WordTokenizer":
        return cls(description["words"], description["lowercase"], description["clean"])

    def hugging_face_json(self) -> dict[str, Any]:
        steps = [{"type": "Replace", "pattern": {"Regex": pattern}, "content": replacement}
                 for pattern, replacement in (CLEANING if self.clean else ())]
        steps += [{"type": "Lowercase"}] if self.lowercase else []
        return document(
            {"type": "WordLevel", "vocab": self.special_tokens | self._ids, "unk_token": "<unk>"},
            added_tokens=[(name, i, True) for name, i in self.special_tokens.items()],
            normalizer={"type": "Sequence", "normalizers": steps},
            pre_tokenizer={"type": "Split", "pattern": {"Regex": WORD}, "behavior": "Removed", "invert": True},
            decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
        )  # fmt: skip

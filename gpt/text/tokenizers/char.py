"""One id per character."""

from functools import cached_property
from typing import Any

import numpy as np

from ...errors import UserError
from .base import Tokenizer
from .hugging_face import document


class CharTokenizer(Tokenizer):
    """One id per character, ids in code point order: nanoGPT's shakespeare_char vocabulary."""

    kind = name = "char"

    def __init__(self, characters: str):
        if not characters or len(set(characters)) != len(characters):
            raise UserError("a character vocabulary must hold at least one character, and none twice")
        self.characters = characters
        self.vocab_size = len(characters)
        codes = _code_points(characters)
        self._ids = np.full(codes.max() + 1, self.vocab_size, np.uint32)  # id of every code point; vocab_size = unknown
        self._ids[codes] = np.arange(self.vocab_size)

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        """The vocabulary of all characters that occur in `text`."""
        if not text:
            raise UserError("cannot make a character vocabulary from empty text; give a text with --data")
        return cls("".join(sorted(set(text))))

    def _encode_ordinary(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = np.take(self._ids, codes, mode="clip")
        unknown = (ids == self.vocab_size) | (codes >= len(self._ids))
        if unknown.any():
            raise UserError(self._unknown_message(sorted(set(map(chr, codes[unknown].tolist())))))
        return ids

    def _unknown_message(self, characters: list[str]) -> str:
        named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in characters[:10])
        more = f" and {len(characters) - 10} more" if len(characters) > 10 else ""
        return (
            f"the character vocabulary of {self.vocab_size} lacks {named}{more}: leave them out, or train on text that"
            " has them, or use --tokenizer gpt2, which encodes any text"
        )

    @cached_property
    def pieces(self) -> list[bytes]:
        return [c.encode(errors="surrogatepass") for c in self.characters]

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters}

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> "CharTokenizer":
        return cls(description["characters"])

    def hugging_face_json(self) -> dict[str, Any]:
        vocab = {c: i for i, c in enumerate(self.characters)}
        return document(
            {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},  # absent: an unknown character is an error
            pre_tokenizer={"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
            decoder={"type": "Fuse"},
        )


def _code_points(text: str) -> np.ndarray:
    """Unicode code points, shape (characters,), uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")

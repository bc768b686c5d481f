"""Text to token ids and back: characters, and the published byte-pair encodings through tiktoken.

A tokenizer lives in `tokenizer.json`, beside the tokens and beside the model that was trained on them:
``{"kind": "char", "characters": "..."}`` or ``{"kind": "tiktoken", "name": "gpt2"}``. A further kind is one more
subclass of Tokenizer and one more row in KINDS.
"""

import difflib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import UserError
from .files import write_files

FILE_NAME = "tokenizer.json"
ENCODINGS = ("gpt2", "cl100k_base", "o200k_base")  # the tiktoken encodings that can be asked for by name


class Tokenizer(ABC):
    """What every tokenizer offers."""

    kind: ClassVar[str]  # the class's name in tokenizer.json
    name: str  # for people and folder names
    vocab_size: int  # ids are 0 .. vocab_size - 1
    eot_id: int | None = None  # the id that ends a text; None where the vocabulary has none
    special_ids: frozenset[int] = frozenset()  # ids that stand for no text

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text`, shape (tokens,), an unsigned integer dtype: `encode` for whole corpora."""

    @property
    @abstractmethod
    def pieces(self) -> Sequence[bytes]:
        """UTF-8 bytes of every id, length vocab_size; an id without meaning has none."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Everything `from_json` needs to make this tokenizer again, `kind` included."""

    @classmethod
    @abstractmethod
    def from_json(cls, description: dict[str, Any]) -> "Tokenizer": ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. The name of a special token within `text` is ordinary text."""
        return self.encode_array(text).tolist()

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """UTF-8 bytes of `ids`; they may end within a character (a stream holds such an end back)."""
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise UserError(f"token id {outside[0]} is outside the {self.name} vocabulary (0 .. {self.vocab_size - 1})")
        pieces = self.pieces
        return b"".join([pieces[i] for i in ids.tolist()])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; bytes that are no valid UTF-8 become U+FFFD. Raises UserError for an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes of every id, (vocab_size,) int64: the unit of bits per byte. Special ids count 0."""
        return np.array([0 if i in self.special_ids else len(piece) for i, piece in enumerate(self.pieces)], np.int64)

    def fingerprint(self) -> str:
        """SHA-256 of the description: two tokenizers with the same one give the same ids."""
        return hashlib.sha256(self.dump()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the description as JSON to `path`, a file, or a folder in which it becomes tokenizer.json."""
        write_files({_file_at(path): self.dump()})

    def dump(self) -> bytes:
        """The content of tokenizer.json."""
        return (json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n").encode()


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

    def encode_array(self, text: str) -> np.ndarray:
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
        return [c.encode() for c in self.characters]

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters}

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> "CharTokenizer":
        return cls(description["characters"])


class TiktokenTokenizer(Tokenizer):
    """A published byte-pair encoding: gpt2 (50,257 ids), cl100k_base (100,277) or o200k_base (200,019).

    tiktoken downloads the vocabulary on first use and keeps it in TIKTOKEN_CACHE_DIR. Encodes any text.
    """

    kind = "tiktoken"

    def __init__(self, name: str):
        if name not in ENCODINGS:
            raise UserError(f"no tiktoken encoding {name!r}; there are {', '.join(ENCODINGS)}")
        import tiktoken  # here: whoever works with characters does not wait for it

        try:
            self._encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors), or a wrong file
            raise UserError(
                f"cannot get the vocabulary of {name} ({type(error).__name__}): connect once, or set TIKTOKEN_CACHE_DIR"
                " to a folder with tiktoken's files, or use --tokenizer char, which needs none"
            ) from error
        self.name = name
        self.vocab_size = self._encoding.n_vocab
        self.eot_id = self._encoding.eot_token
        self.special_ids = frozenset(map(self._encoding.encode_single_token, self._encoding.special_tokens_set))

    def encode_array(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # halves of surrogate pairs, as in a mistyped prompt: join pairs, replace the rest
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._encoding.encode_to_numpy(whole, disallowed_special=())

    @cached_property
    def pieces(self) -> list[bytes]:
        def piece(i: int) -> bytes:
            try:
                return self._encoding.decode_single_token_bytes(i)
            except KeyError:  # cl100k_base and o200k_base leave some ids unused; an untrained model may still draw one
                return b""

        return [piece(i) for i in range(self.vocab_size)]

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name}

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> "TiktokenTokenizer":
        return cls(description["name"])


KINDS: dict[str, type[Tokenizer]] = {cls.kind: cls for cls in (CharTokenizer, TiktokenTokenizer)}


def get_tokenizer(name: str, text: str | None = None) -> Tokenizer:
    """The tokenizer that `--tokenizer` names: "char" (its vocabulary taken from `text`), a tiktoken encoding, or the
    path of a tokenizer.json or of a folder that holds one (a prepared data set, a run)."""
    if name == "char":
        return CharTokenizer.train(text or "")
    if name in ENCODINGS:
        return TiktokenTokenizer(name)
    if os.path.exists(name):
        return load_tokenizer(name)
    names = ("char", *ENCODINGS)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"no tokenizer {name!r}; {hint}There are {', '.join(names)}, or the path of a {FILE_NAME}")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer written by `Tokenizer.save`; `path` is the file or the folder that holds tokenizer.json.

    Raises UserError when the file is missing, is no JSON, or describes no tokenizer of ours.
    """
    file = _file_at(path)
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        cls = KINDS[description["kind"]]
        return cls.from_json(description)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kinds = " or ".join(KINDS)
        raise UserError(f"{file} describes no tokenizer of kind {kinds}; make it again from its text") from error


def _file_at(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def _code_points(text: str) -> np.ndarray:
    """Unicode code points, shape (characters,), uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")

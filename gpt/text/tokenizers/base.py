"""What every tokenizer offers: text to ids and back, special tokens, a description in JSON."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from ...errors import UserError
from ..files import write_files

FILE_NAME = "tokenizer.json"
ROLES = ("bos", "eos", "pad", "unk")
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")  # what published vocabularies put between documents
QUOTE = "\ufdd0"  # a noncharacter of Unicode: before the name of a special token it says that this is text after all


class Tokenizer(ABC):
    """Text to token ids and back.

    Ids are 0 .. vocab_size - 1. The roles that some ids play are attributes, None where nobody plays them: `bos_id`,
    `eos_id` (ends a text or a turn), `pad_id`, `unk_id`, and `eot_id` (stands between documents in training data).
    `adds_bos` says that the model expects bos_id before every text; `encode` leaves that to its caller.
    """

    kind: ClassVar[str]  # the class's name in tokenizer.json
    name: str  # for people and folder names
    vocab_size: int
    special_tokens: Mapping[str, int] = {}  # name: id, of the ids that stand for no text
    added_tokens: Mapping[str, int] = {}  # text: id, of texts that are one token wherever they occur
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    eot_id: int | None = None
    adds_bos: bool = False
    chat_template: str | None = None  # Jinja source, as published with the vocabulary; rendered elsewhere

    @abstractmethod
    def _encode_ordinary(self, text: str) -> np.ndarray:
        """Ids of `text` without special or added tokens, shape (tokens,), an unsigned integer dtype."""

    @property
    @abstractmethod
    def pieces(self) -> Sequence[bytes]:
        """UTF-8 bytes of every id, length vocab_size; an id without meaning has none."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Everything `from_json` needs to make this tokenizer again."""

    @classmethod
    @abstractmethod
    def from_json(cls, description: dict[str, Any]) -> "Tokenizer": ...

    @abstractmethod
    def hugging_face_json(self) -> dict[str, Any]:
        """The tokenizer.json with which Hugging Face's `tokenizers` gives the same ids."""

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that stand for no text."""
        return frozenset(self.special_tokens.values())

    def encode_array(self, text: str, special: str | Collection[str] = ()) -> np.ndarray:
        """Token ids of `text`, shape (tokens,), an unsigned integer dtype: `encode` for whole corpora."""
        found = [np.array([part], np.uint32) if isinstance(part, int) else self._encode_ordinary(part)
                 for part in self._segments(text, special)]
        return np.concatenate(found) if len(found) > 1 else found[0] if found else np.empty(0, np.uint32)

    def _segments(self, text: str, special: str | Collection[str]) -> list[str | int]:
        """`text` cut at special and added tokens: ordinary texts, none of them empty, and the ids between them."""
        allowed = self._allowed(special)
        names = self.added_tokens.keys() | allowed
        if not names:
            return [text] if text else []
        ids = dict(self.added_tokens) | dict(self.special_tokens)
        pattern = "|".join((f"(?<!{QUOTE})" if name in allowed else "") + re.escape(name)
                           for name in sorted(names, key=lambda name: (-len(name), name)))  # the longest first
        parts = re.split(f"({pattern})", text)  # text, name, text, ..., name, text
        if allowed:
            parts[::2] = [part.replace(QUOTE, "") for part in parts[::2]]
        return [ids[part] if i % 2 else part for i, part in enumerate(parts) if part]

    def quote(self, text: str) -> str:
        """`text` for use within a larger one in which special tokens are allowed: none is found in it, nor one that
        only begins in it, whatever follows."""
        text = text.replace(QUOTE, "")
        end = text.rstrip()  # whoever puts texts together may strip them
        if any(end.endswith(name[:n]) for name in self.special_tokens for n in range(1, len(name))):
            text = end[:-1] + QUOTE + text[len(end) - 1:]
        names = "|".join(map(re.escape, self.special_tokens))
        return re.sub(f"(?={names})", QUOTE, text) if names else text

    def _allowed(self, special: str | Collection[str]) -> set[str]:
        if special == "all":
            return set(self.special_tokens)
        names = {special} - {""} if isinstance(special, str) else set(special)
        if unknown := sorted(names - self.special_tokens.keys()):
            raise UserError(f"the {self.name} vocabulary has no special token {unknown[0]!r}; it has "
                            f"{', '.join(list(self.special_tokens)[:10]) or 'none'}")
        return names

    def encode(self, text: str, special: str | Collection[str] = ()) -> list[int]:
        """Token ids of `text`. The name of a special token within `text` is ordinary text, unless it is among
        `special`: names, or "all". Raises UserError for a name that is no special token."""
        return self.encode_array(text, special).tolist()

    def encode_batch(self, texts: Iterable[str], special: str | Collection[str] = ()) -> list[list[int]]:
        """`encode` of every text."""
        return [self.encode(text, special) for text in texts]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """UTF-8 bytes of `ids`; they may end within a character (StreamDecoder holds such an end back)."""
        ids = self._known(ids)
        pieces = self.pieces
        return b"".join([pieces[i] for i in ids])

    def _known(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise UserError(f"token id {outside[0]} is outside the {self.name} vocabulary (0 .. {self.vocab_size - 1})")
        return ids.tolist()

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no valid UTF-8 become U+FFFD. With `skip_special` special ids leave no trace.
        Raises UserError for an unknown id."""
        if skip_special:
            special = self.special_ids
            ids = [i for i in self._known(ids) if i not in special]
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes of every id, (vocab_size,) int64: the unit of bits per byte. Special ids count 0."""
        special = self.special_ids
        return np.array([0 if i in special else len(piece) for i, piece in enumerate(self.pieces)], np.int64)

    def configure(self, config: Mapping[str, Any]) -> Self:
        """Take the roles from what Hugging Face keeps in tokenizer_config.json: bos_token, eos_token, pad_token and
        unk_token (a name, or a dict with its "content"), add_bos_token, chat_template. Other keys are not looked at.

        Raises UserError for values of another type; a role whose token is not in the vocabulary stays empty.
        """
        names = dict(self.added_tokens) | dict(self.special_tokens)
        for role in ROLES:
            token = config.get(f"{role}_token")
            token = token.get("content") if isinstance(token, Mapping) else token
            if token is not None and not isinstance(token, str):
                raise UserError(f"{role}_token is {token!r}; it must be the name of a token")
            setattr(self, f"{role}_id", names.get(token))
        template = config.get("chat_template")
        if isinstance(template, list):  # several, each with a name
            template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
        if template is not None and not isinstance(template, str):
            raise UserError(f"chat_template is a {type(template).__name__}; it must be text")
        self.chat_template = template
        self.adds_bos = self.bos_id is not None and config.get("add_bos_token") is True
        self.eot_id = next((names[name] for name in ENDS_OF_TEXT if name in names), self.eos_id)
        self.eos_id = self.eot_id if self.eos_id is None else self.eos_id
        return self

    def config(self) -> dict[str, Any]:
        """The roles in the words of tokenizer_config.json: `configure` reads them back."""
        names = {i: name for name, i in (dict(self.added_tokens) | dict(self.special_tokens)).items()}
        roles = {f"{role}_token": names.get(getattr(self, f"{role}_id")) for role in ROLES}
        roles |= {"add_bos_token": self.adds_bos or None, "chat_template": self.chat_template}
        return {key: value for key, value in roles.items() if value is not None}

    def fingerprint(self) -> str:
        """SHA-256 of the description: two tokenizers with the same one give the same ids."""
        return hashlib.sha256(self.dump()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the description as JSON to `path`, a file, or a folder in which it becomes tokenizer.json."""
        write_files({file_at(path): self.dump()})

    def dump(self) -> bytes:
        """The content of tokenizer.json."""
        return (json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n").encode()


def file_at(path: str | Path) -> Path:
    """`path`, or the tokenizer.json in it where it is a folder."""
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def joined_surrogates(text: str) -> str:
    """`text` as valid Unicode: halves of surrogate pairs, as in a mistyped prompt, are joined, or become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

"""SentencePiece's byte-pair encoding with byte fallback: the vocabularies of Llama 2, TinyLlama, Mistral 7B.

Other than byte-level BPE it merges characters, a space is the character U+2581, a character that the vocabulary lacks
becomes its bytes, and what merges first is said by scores, higher first.
"""

import heapq
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import regex

from ...errors import UserError
from .base import Tokenizer, joined_surrogates
from .hugging_face import MAX_ID, OURS, document

SPACE = "\u2581"
BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]
PREFIXES = ("always", "first", "never")
CACHED = 1 << 16  # words whose ids are remembered


class SentencePieceTokenizer(Tokenizer):
    """Merges characters by score.

    tokens:          {token: id} of the texts that merges make, spaces as U+2581
    scores:          {id: score} of these; of two merges that are possible the one of the higher score comes first
    byte_ids:        the ids of the 256 bytes, or none of them where unknown characters become unk_id
    special_tokens:  {name: id} of ids that stand for no text
    added_tokens:    {text: id} of texts that are one token wherever they occur
    prefix:          where a space is put before text: "always" (after special tokens, too), "first" (at the start of a
                     text that does not start with one, as transformers does without its legacy mode), "never"
    config:          roles and chat template, as `Tokenizer.configure` takes them
    """

    kind = "sentencepiece"

    def __init__(
        self, tokens: Mapping[str, int], scores: Mapping[int, float], byte_ids: Sequence[int] = (),
        special_tokens: Mapping[str, int] | None = None, added_tokens: Mapping[str, int] | None = None,
        prefix: str = "always", name: str = "sentencepiece", config: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self.tokens, self.scores, self.byte_ids = dict(tokens), dict(scores), list(byte_ids)
        self.special_tokens, self.added_tokens = dict(special_tokens or {}), dict(added_tokens or {})
        self.prefix, self.name = prefix, name
        ids = [*self.tokens.values(), *self.byte_ids, *self.special_tokens.values(), *self.added_tokens.values()]
        if wrong := next((i for i in ids if type(i) is not int or not 0 <= i < MAX_ID), None):
            raise UserError(f"a token has the id {wrong!r}; ids are integers from 0 to {MAX_ID - 1:,}")
        if not ids or len(set(ids)) < len(ids):
            raise UserError("two tokens have the same id" if ids else "a vocabulary must hold at least one token")
        for token in (*self.tokens, *self.special_tokens, *self.added_tokens):
            if not (token and isinstance(token, str)):
                raise UserError(f"the name of a token is {token!r}; it must be text")
        if not all(type(self.scores.get(i)) in (int, float) for i in self.tokens.values()):
            raise UserError("a token has no score")
        if prefix not in PREFIXES or len(self.byte_ids) not in (0, 256) or not isinstance(name, str):
            raise UserError(f"prefix is one of {', '.join(PREFIXES)}, bytes are 256 or none, the name is text")
        self.vocab_size = max(ids) + 1
        self.configure(config or {})
        if not self.byte_ids and self.unk_id is None:
            raise UserError("a vocabulary without bytes needs an unk_token")
        # no merge reaches over the space between two words, unless a token does
        inner = any(regex.search(f"[^{SPACE}]{SPACE}", token) for token in self.tokens)
        self._cut = regex.compile(r"[\s\S]+" if inner else f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+")
        self._words: dict[str, list[int]] = {}

    def encode_array(self, text: str, special: str | Collection[str] = ()) -> np.ndarray:
        ids: list[int] = []
        for n, segment in enumerate(self._segments(joined_surrogates(text), special)):
            if isinstance(segment, int):
                ids.append(segment)
                continue
            first = self.prefix == "first" and n == 0 and segment[0] not in (" ", SPACE)
            space = " " if self.prefix == "always" or first else ""
            for word in self._cut.findall((space + segment).replace(" ", SPACE)):
                if word not in self._words and len(self._words) < CACHED:
                    self._words[word] = self._merge(word)
                ids += self._words[word] if word in self._words else self._merge(word)
        return np.array(ids, np.uint32)

    def _encode_ordinary(self, text: str) -> np.ndarray:
        return self.encode_array(text)

    def _merge(self, word: str) -> list[int]:
        """Ids of a word. Neighbours are linked by index; a merged part takes the place of its left half, and entries of
        the heap that speak of parts that have changed since are passed over."""
        parts: list[str] = list(word)
        left, right = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
        heap: list[tuple[float, int, int, str]] = []

        def consider(a: int, b: int) -> None:
            if a >= 0 and b < len(parts) and (merged := self.tokens.get(parts[a] + parts[b])) is not None:
                heapq.heappush(heap, (-self.scores[merged], a, b, parts[a] + parts[b]))

        for i in range(len(parts) - 1):
            consider(i, i + 1)
        while heap:
            _, a, b, merged = heapq.heappop(heap)
            if not parts[a] or not parts[b] or right[a] != b or parts[a] + parts[b] != merged:
                continue
            parts[a], parts[b] = merged, ""
            right[a] = right[b]
            if right[a] < len(parts):
                left[right[a]] = a
            consider(left[a], a)
            consider(a, right[a])
        return [i for part in parts if part for i in self._ids_of(part)]

    def _ids_of(self, part: str) -> list[int]:
        if part in self.tokens:
            return [self.tokens[part]]
        return [self.byte_ids[b] for b in part.encode()] if self.byte_ids else [self.unk_id]

    @cached_property
    def pieces(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size
        for token, i in self.tokens.items():
            pieces[i] = token.replace(SPACE, " ").encode(errors="replace")
        for byte, i in enumerate(self.byte_ids):
            pieces[i] = bytes([byte])
        for name, i in [*self.special_tokens.items(), *self.added_tokens.items()]:
            pieces[i] = name.encode(errors="replace")
        return pieces

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The space that `prefix` puts before text is taken away again."""
        ids = self._known(ids)
        names = self.special_ids | set(self.added_tokens.values())
        out = []
        for n, i in enumerate(ids):
            starts = n == 0 if self.prefix == "first" else self.prefix == "always" and (n == 0 or ids[n - 1] in names)
            out.append(self.pieces[i].removeprefix(b" ") if starts else self.pieces[i])
        return b"".join(out)

    def to_json(self) -> dict[str, Any]:
        tokens = [[token, i, self.scores[i]] for token, i in sorted(self.tokens.items(), key=lambda item: item[1])]
        return {"kind": self.kind, "name": self.name, "tokens": tokens, "byte_ids": self.byte_ids,
                "special_tokens": self.special_tokens, "added_tokens": self.added_tokens, "prefix": self.prefix,
                "config": self.config()}  # fmt: skip

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> "SentencePieceTokenizer":
        values = {key: value for key, value in description.items() if key not in ("kind", "tokens")}
        rows = description["tokens"]
        return cls({token: i for token, i, _ in rows}, {i: score for _, i, score in rows}, **values)

    def hugging_face_json(self) -> dict[str, Any]:
        by_score = sorted(self.tokens.items(), key=lambda item: (-self.scores[item[1]], item[1]))
        merges = [[token[:n], token[n:]] for token, _ in by_score for n in range(1, len(token))
                  if token[:n] in self.tokens and token[n:] in self.tokens]
        vocab = self.tokens | dict(zip(BYTE_NAMES, self.byte_ids, strict=False))
        names = [(name, i, True) for name, i in self.special_tokens.items()]
        names += [(name, i, False) for name, i in self.added_tokens.items()]
        unknown = next((name for name, i, _ in names if i == self.unk_id), None)
        model = {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": bool(self.byte_ids),
                 "ignore_merges": False, "vocab": vocab | self.special_tokens | self.added_tokens, "merges": merges,
                 OURS: {"config": self.config()}}  # fmt: skip
        bos = next(((name, i) for name, i, _ in names if i == self.bos_id), None) if self.adds_bos else None
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        before = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}}
        if self.prefix != "always":
            before = {"pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": self.prefix,
                                        "split": False}}  # fmt: skip
        undo = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": int(self.prefix != "never"), "stop": 0}]
        decoder = {"type": "Sequence", "decoders": undo}
        return document(model, added_tokens=names, bos=bos, decoder=decoder, **before)


def read_sentencepiece(description: Mapping[str, Any]) -> SentencePieceTokenizer:
    """The tokenizer of a Hugging Face tokenizer.json with byte fallback; raises ValueError with the reason where it
    does more than we do."""
    model = description["model"]
    special, added = {}, {}
    for token in description.get("added_tokens") or []:
        (special if token.get("special") else added)[token["content"]] = token["id"]
    vocab = {token: i for token, i in model["vocab"].items() if token not in special and token not in added}
    if missing := next((name for name in BYTE_NAMES if name not in vocab), None):
        raise ValueError(f"it has byte_fallback, but no token {missing}")
    byte_ids = [vocab.pop(name) for name in BYTE_NAMES]
    order: dict[str, int] = {}  # of the first merge that makes a token: of all the one that counts
    for n, merge in enumerate(model["merges"]):
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        order.setdefault(a + b, n)
    if never := next((token for token in vocab if len(token) > 1 and token not in order), None):
        raise ValueError(f"its token {never!r} is made by no merge")
    scores = {i: -order.get(token, len(model["merges"])) for token, i in vocab.items()}
    config = dict((model.get(OURS) or {}).get("config") or {}) | {"unk_token": model.get("unk_token")}
    return SentencePieceTokenizer(vocab, scores, byte_ids, special, added, _prefix(description), config=config)


def _prefix(description: Mapping[str, Any]) -> str:
    before, normalizer = description.get("pre_tokenizer"), description.get("normalizer")
    if before and before.get("type") == "Metaspace" and before.get("split") is False and normalizer is None:
        if (prefix := before.get("prepend_scheme")) in ("first", "never"):
            return prefix
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    kinds = [step.get("type") for step in steps]
    if before is None and kinds in (["Prepend", "Replace"], ["Replace"]) and steps[-1].get("content") == SPACE:
        return "always" if len(kinds) == 2 else "never"
    raise ValueError(f"its normalizer {kinds} and pre-tokenizer are not those of Llama 2")

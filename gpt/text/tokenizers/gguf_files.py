"""The vocabulary inside a GGUF file, the format of llama.cpp: its metadata, as a dict of plain Python values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..gguf_metadata import read_metadata
from .base import Tokenizer
from .bpe import END_OF_TEXT, BPETokenizer
from .char import CharTokenizer
from .hugging_face import rank_merges
from .merges import from_printable, printable
from .patterns import CL100K, GGUF_NAMES, GPT2
from .sentencepiece import BYTE_NAMES, SentencePieceTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
ROLE_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}
PREFIX = "tokenizer.ggml."


def read_gguf(path: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file: byte pairs, SentencePiece, or the characters that `to_gguf` wrote. Raises UserError
    for damage."""
    path = Path(path)
    data = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    metadata, _, _ = read_metadata(path, data.view(np.ndarray))
    try:
        return _as_characters(metadata) or from_gguf(metadata)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: its tokenizer cannot be read ({type(error).__name__}: {error})") from None


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the "tokenizer." entries of a GGUF file describe.

    Raises UserError for a model other than byte-level BPE and for a pattern that we do not know, ValueError, TypeError
    or KeyError for damage.
    """
    model, pre = metadata[f"{PREFIX}model"], metadata.get(f"{PREFIX}pre", "gpt-2")
    if model not in ("gpt2", "llama"):
        raise UserError(f"its vocabulary is of the kind {model!r}; we read gpt2 (bytes) and llama (SentencePiece)")
    if model == "gpt2" and pre not in GGUF_NAMES:
        raise UserError(f"its pre-tokenizer {pre!r} is none of {', '.join(GGUF_NAMES)}")
    tokens = metadata[f"{PREFIX}tokens"]
    types = metadata.get(f"{PREFIX}token_type", [NORMAL] * len(tokens))
    merges = [tuple(merge.split(" ")) for merge in metadata.get(f"{PREFIX}merges", [])]
    if len(types) != len(tokens):
        raise ValueError(f"it has {len(tokens)} tokens, but {len(types)} token types")
    kinds: dict[int, dict[str, int]] = {kind: {} for kind in (NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE)}
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kinds[CONTROL if kind == UNKNOWN else kind].setdefault(token, i) != i:
            raise ValueError(f"its token {token!r} has two ids")
    config = {f"{role}_token": _at(tokens, metadata.get(PREFIX + key)) for role, key in ROLE_KEYS.items()}
    config["chat_template"] = metadata.get("tokenizer.chat_template")
    if model == "llama":
        scores = dict(enumerate(map(float, metadata[f"{PREFIX}scores"])))
        byte_ids = [kinds[BYTE][name] for name in BYTE_NAMES] if kinds[BYTE] else []
        prefix = "always" if metadata.get(f"{PREFIX}add_space_prefix", True) else "never"
        config["add_bos_token"] = metadata.get(f"{PREFIX}add_bos_token", True)
        return SentencePieceTokenizer(kinds[NORMAL], scores, byte_ids, kinds[CONTROL], kinds[USER_DEFINED], prefix,
                                      name="gguf", config=config)
    ranks, unmerged = rank_merges(kinds[NORMAL], merges, ignore_merges=GGUF_NAMES[pre] == CL100K)
    config["add_bos_token"] = metadata.get(f"{PREFIX}add_bos_token", GGUF_NAMES[pre] == CL100K)
    return BPETokenizer(ranks, GGUF_NAMES[pre], unmerged=unmerged, special_tokens=kinds[CONTROL],
                        added_tokens=kinds[USER_DEFINED], config=config, name="gguf")


def _at(tokens: list[str], i: int | None) -> str | None:
    return tokens[i] if i is not None and 0 <= i < len(tokens) else None


def to_gguf(tokenizer: Tokenizer, vocab_size: int | None = None) -> dict[str, Any]:
    """The "tokenizer." entries for a GGUF file: strings, integers, booleans and lists of strings or integers.

    vocab_size: rows of the model's embedding where they are more than the tokenizer's; such ids become unused tokens.
    A vocabulary without an end of text gets one as its last id (llama.cpp takes a token for it in any case): the model
    needs a row for it, so len(result["tokenizer.ggml.tokens"]) rows in all.
    Raises UserError for what llama.cpp has no name for.
    """
    model, pre, merges, extra = "gpt2", "default", [], {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        model, vocabulary = "llama", {i: (token, NORMAL) for token, i in tokenizer.tokens.items()}
        vocabulary |= {i: (name, BYTE) for name, i in zip(BYTE_NAMES, tokenizer.byte_ids, strict=False)}
        extra = {"add_space_prefix": tokenizer.prefix != "never"}
    elif isinstance(tokenizer, CharTokenizer):
        vocabulary, merges, pre = _characters(tokenizer)
    elif isinstance(tokenizer, BPETokenizer):
        pre = next((name for name, pattern in GGUF_NAMES.items() if pattern == tokenizer.pattern), None)
        pairs = tokenizer.merges
        if pre is None:
            raise UserError(f"llama.cpp does not know the pattern of {tokenizer.name}; train with gpt2's or cl100k's")
        if None in pairs.values() and tokenizer.pattern != CL100K:
            raise UserError(f"{tokenizer.name} has tokens that no merge makes, which llama.cpp would never use")
        vocabulary = {i: (printable(token), NORMAL) for token, i in tokenizer.ranks.items()}
        vocabulary |= {i: (printable(piece), NORMAL) for i, piece in tokenizer.unmerged.items()}
        merges = [f"{printable(a)} {printable(b)}" for a, b in filter(None, pairs.values())]
    else:
        raise UserError(f"llama.cpp has no tokenizer of the kind {tokenizer.kind}; use --tokenizer bpe, char or gpt2")
    vocabulary |= {i: (name, CONTROL) for name, i in tokenizer.special_tokens.items()}
    vocabulary |= {i: (name, USER_DEFINED) for name, i in tokenizer.added_tokens.items()}
    size, eos = tokenizer.vocab_size, tokenizer.eos_id
    if eos is None:
        eos, size = size, size + 1
        vocabulary[eos] = (END_OF_TEXT, CONTROL)
    rows = [vocabulary.get(i, (f"[unused{i}]", UNUSED)) for i in range(max(size, vocab_size or 0))]
    roles = {"bos": tokenizer.bos_id, "eos": eos, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    roles["bos"] = eos if roles["bos"] is None else roles["bos"]
    if model == "llama":
        extra["scores"] = [float(tokenizer.scores.get(i, 0)) for i in range(len(rows))]
    metadata = {"model": model, "pre": pre, "tokens": [token for token, _ in rows],
                "token_type": [kind for _, kind in rows], "merges": merges, "add_bos_token": tokenizer.adds_bos} | extra
    metadata |= {ROLE_KEYS[role]: i for role, i in roles.items() if i is not None}
    entries = {PREFIX + key: value for key, value in metadata.items()}
    return entries | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})


def _characters(tokenizer: CharTokenizer) -> tuple[dict[int, tuple[str, int]], list[str], str]:
    """Characters as byte pairs: the bytes of each are merged from the left, and nothing else is. A byte that starts a
    character never continues one, so no merge reaches across two."""
    vocabulary = {i: (printable(piece), NORMAL) for i, piece in enumerate(tokenizer.pieces)}
    pairs = {(piece[:n], piece[n : n + 1]) for piece in tokenizer.pieces for n in range(1, len(piece))}
    merges = [f"{printable(a)} {printable(b)}" for a, b in sorted(pairs, key=lambda pair: (len(pair[0]), pair))]
    return vocabulary, merges, next(name for name, pattern in GGUF_NAMES.items() if pattern == GPT2)


def _as_characters(metadata: Mapping[str, Any]) -> CharTokenizer | None:
    """The CharTokenizer of a vocabulary in which every token for text is one character; None for another."""
    tokens, kinds = metadata[f"{PREFIX}tokens"], metadata.get(f"{PREFIX}token_type", ())
    count = sum(kind == NORMAL for kind in kinds)
    try:
        characters = [from_printable(token).decode("utf-8") for token in tokens[:count]]
    except (KeyError, UnicodeDecodeError):
        return None
    fits = characters and len(tokens) == len(kinds) and all(len(c) == 1 for c in characters)
    return CharTokenizer("".join(characters)) if fits else None

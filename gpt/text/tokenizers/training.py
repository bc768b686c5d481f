"""A tokenizer from a corpus, measured on the part of it that was held out: what scripts/train_tokenizer.py does."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError
from ..corpora import load_text
from .base import Tokenizer
from .bpe import END_OF_TEXT, BPETokenizer
from .char import CharTokenizer
from .word import WordTokenizer


@dataclass
class TokenizerConfig:
    """Which tokenizer to train, and on what. Raises UserError for impossible values."""

    data: str = "pydocs"
    """"pydocs" (documentation on this machine, no download), "shakespeare", or the path of a text file or folder."""
    kind: Literal["bpe", "word", "char"] = "bpe"
    """Byte pairs, words, or characters."""
    vocab_size: int = 4096
    """Number of ids, special tokens included; characters are as many as there are."""
    pattern: Literal["gpt2", "cl100k", "qwen2", "smollm", "o200k"] = "gpt2"
    """bpe: how text is cut before bytes are merged; llama.cpp knows all of these but o200k."""
    special_tokens: str = END_OF_TEXT
    """bpe: names of special tokens, separated by commas; they get the last ids."""
    min_frequency: int = 2
    """word: how often a word must occur."""
    lowercase: bool = True
    """word: take upper case for lower case."""
    clean: bool = True
    """word: drop symbols, make one space of white space and line ends."""
    val_fraction: float = 0.1
    """Share of the characters, from the end, on which bytes per token are measured; 0 trains on everything."""
    out_dir: str = "out/tokenizer"
    """Folder for tokenizer.json."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction is {self.val_fraction}; it must be at least 0 and below 1")


def train_tokenizer(config: TokenizerConfig, say: Callable[[str], Any] = print) -> Tokenizer:
    """Train, measure and save the tokenizer of `config`; `say` prints each line of the report."""
    corpus = load_text(config.data)
    say(f"text       {corpus.description}; {corpus.size:,} bytes, sha256 {corpus.sha256}")
    cut = int(len(corpus.text) * (1 - config.val_fraction))  # in characters, as for training
    started = time.perf_counter()
    tokenizer = _train(config, corpus.text[:cut], corpus.text)
    seconds = time.perf_counter() - started
    say(f"tokenizer  {tokenizer.name}, {tokenizer.vocab_size:,} ids, trained in {seconds:.1f} s")
    if tokenizer.vocab_size < config.vocab_size and config.kind != "char":
        say(f"           the text offers no more than these, {config.vocab_size:,} were asked for")
    for name, text in (("train", corpus.text[:cut]), ("held out", corpus.text[cut:])):
        ids = tokenizer.encode_array(text)
        if len(ids):
            unknown = f", {(ids == tokenizer.unk_id).mean():.2%} unknown" if tokenizer.unk_id is not None else ""
            say(f"{name:<10} {len(ids):,} tokens, {len(text.encode()) / len(ids):.3f} bytes per token{unknown}")
    folder = Path(config.out_dir)
    tokenizer.save(folder / "tokenizer.json")
    say(f"folder     {folder}")
    return tokenizer


def _train(config: TokenizerConfig, seen: str, whole: str) -> Tokenizer:
    if config.kind == "char":
        return CharTokenizer.train(whole)  # a character that it does not know is an error, so it must see them all
    if config.kind == "word":
        return WordTokenizer.build_vocabulary(
            seen, config.vocab_size, config.min_frequency, config.lowercase, config.clean
        )
    special = [name.strip() for name in config.special_tokens.split(",") if name.strip()]
    return BPETokenizer.train(seen, config.vocab_size, config.pattern, special)

"""Which tokenizer a name or a file means."""

import difflib
import json
import os
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ...errors import UserError
from .base import FILE_NAME, Tokenizer
from .bpe import ENCODINGS, BPETokenizer, TiktokenTokenizer
from .char import CharTokenizer
from .gguf_files import read_gguf
from .patterns import GPT2, PATTERNS
from .rank_files import read_gpt2, read_tiktoken
from .sentencepiece import SentencePieceTokenizer, read_sentencepiece
from .word import SPECIAL, WordTokenizer

KINDS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (CharTokenizer, WordTokenizer, TiktokenTokenizer, SentencePieceTokenizer)
}
TRAINED = ("char", "word", "bpe")
BPE_SIZE, WORD_SIZE = 4096, 10_000  # ids of "bpe" and "word" without a number
MAX_BYTES = 1 << 28  # of a file; published ones stay below 40 MB
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def get_tokenizer(name: str, text: str | None = None) -> Tokenizer:
    """The tokenizer that `--tokenizer` names.

    "char"         the characters of `text`
    "word:10000"   its most frequent words, lowercased and cleaned, that many ids; "word" alone means 10,000
    "bpe:4096"     byte pairs trained on it with GPT-2's pattern, that many ids; "bpe" alone means 4,096
    "gpt2"         or another encoding of tiktoken's
    a path         what `load_tokenizer` reads: a prepared data set, a run, a file
    """
    kind, _, size = name.partition(":")
    if kind in TRAINED and (not size or (kind != "char" and size.isascii() and size.isdigit())):
        if kind == "char":
            return CharTokenizer.train(text or "")
        if not text:
            raise UserError(f"cannot make a {kind} vocabulary from empty text; give a text with --data")
        if kind == "word":
            return WordTokenizer.build_vocabulary(text, int(size or WORD_SIZE))
        return BPETokenizer.train(text, int(size or BPE_SIZE))
    if name in ENCODINGS:
        return TiktokenTokenizer(name)
    if os.path.exists(name):
        return load_tokenizer(name)
    names = ("char", "word", "bpe", "bpe:4096", *ENCODINGS)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"no tokenizer {name!r}; {hint}There are {', '.join(names)}, or the path of a {FILE_NAME}")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer: our own tokenizer.json or Hugging Face's, GPT-2's vocab.json beside its merges.txt, a tiktoken
    rank file (named *.tiktoken or tokenizer.model), the vocabulary of a GGUF file, or a folder that holds one of these.

    Raises UserError when the file is missing, damaged, or describes a tokenizer that we cannot be.
    """
    file = _main_file(Path(path))
    try:
        return _reader(file)(file)
    except UserError as error:
        raise error if str(error).startswith(str(file)) else UserError(f"{file}: {error}") from error
    except OSError as error:
        named = error.filename or file
        raise UserError(f"cannot read the tokenizer {named}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise UserError(f"{file} is no tokenizer that we can read: {' '.join(reason.split())[:300]}") from error


def _main_file(path: Path) -> Path:
    """The file that decides, where `path` is a folder."""
    if path.is_dir():
        names = (FILE_NAME, "vocab.json", "tokenizer.model", *sorted(p.name for p in path.glob("*.tiktoken")))
        return next((path / name for name in names if (path / name).is_file()), path / FILE_NAME)
    return path


def _reader(file: Path) -> Callable[[Path], Tokenizer]:
    if file.suffix == ".gguf":
        return read_gguf
    if file.suffix == ".tiktoken" or file.name == "tokenizer.model":
        return _from_ranks
    if file.name in ("vocab.json", "encoder.json"):
        return _from_gpt2
    return _from_json


def _read(file: Path) -> bytes:
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    return file.read_bytes()


def _from_json(file: Path) -> Tokenizer:
    description = json.loads(_read(file))
    if "kind" in description:
        return KINDS[description["kind"]].from_json(description)
    if description["model"].get("type") == "WordLevel":
        return _from_word_level(description)
    pieces = description["model"].get("byte_fallback") is True
    return _with_config((read_sentencepiece if pieces else BPETokenizer.from_json)(description), file)


def _from_word_level(description: dict[str, Any]) -> Tokenizer:
    """The CharTokenizer or WordTokenizer that Hugging Face's `description` was made of: the one that would be written
    as this again. Raises ValueError for another vocabulary of words, which cuts text in its own way."""
    vocab = description["model"]["vocab"]
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError("the ids of its words are not 0, 1, 2, ...")
    words = sorted(vocab, key=vocab.get)
    makers = [lambda: CharTokenizer("".join(words))]
    makers += [partial(WordTokenizer, words[len(SPECIAL):], *how) for how in product((True, False), repeat=2)]
    for make in makers:
        try:
            ours = (tokenizer := make()).hugging_face_json()
        except UserError:
            continue
        if all(description.get(part) == ours[part] for part in ("normalizer", "pre_tokenizer")) and (
                vocab == ours["model"]["vocab"]):
            return tokenizer
    raise ValueError("its words are cut out of a text in another way than here; only what was written here is read")


def _from_gpt2(file: Path) -> Tokenizer:
    merges = file.with_name("merges.txt" if file.name == "vocab.json" else "vocab.bpe")
    return _with_config(read_gpt2(_read(file), _read(merges)), file)


def _from_ranks(file: Path) -> Tokenizer:
    data = _read(file)
    if b"\0" in data[:4096]:
        raise ValueError("it is a SentencePiece model; give the tokenizer.json that comes with it")
    pattern = next((PATTERNS[name] for name in PATTERNS if file.stem.startswith(name)), GPT2)
    return read_tiktoken(data, PATTERNS["llama3"] if file.name == "tokenizer.model" else pattern, name=file.stem)


def _with_config(tokenizer: Tokenizer, file: Path) -> Tokenizer:
    """`tokenizer` with the roles and the chat template from the files beside it."""
    config: dict[str, Any] = {}
    if (beside := file.with_name(CONFIG)).is_file():
        config = json.loads(_read(beside))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} is no JSON object")
    if (beside := file.with_name(TEMPLATE)).is_file():
        config["chat_template"] = _read(beside).decode("utf-8")
    return tokenizer.configure(tokenizer.config() | config) if config else tokenizer

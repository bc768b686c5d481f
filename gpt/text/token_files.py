"""A prepared data set: a folder with the tokens of a text, ready to be mapped into memory.

    train.bin, val.bin   token ids without a header: little-endian uint16, or uint32 for more than 65,536 different ids
    tokenizer.json       the tokenizer that made them
    meta.json            what they are and what they were made from; written last
"""

import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .corpora import Corpus, load_text
from .files import cache_folder, write_files
from .tokenizers import FILE_NAME, Tokenizer, get_tokenizer, load_tokenizer

META = "meta.json"
SPLITS = ("train", "val")
AGAIN = "prepare it again with scripts/prepare.py"


@dataclass(frozen=True)
class TokenDataset:
    """An opened folder: `train` and `val` are token ids, (tokens,) uint16 or uint32, read-only, mapped from disk.

    `meta` is meta.json: version, text_sha256, tokenizer_sha256, val_fraction, text (its name), description, text_bytes,
    tokenizer (its name), vocab_size, dtype, splits {train, val: {tokens, bytes (of the UTF-8 text), crc32}}.
    """

    folder: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray


def prepare(
    data: str | Path | Corpus = "pydocs",
    tokenizer: str | Tokenizer = "char",
    out_dir: str | Path | None = None,
    val_fraction: float = 0.1,
) -> TokenDataset:
    """Tokenize a text into a folder and open it. Where the folder already holds exactly this, it is only opened.

    data:          what `load_text` takes, or a Corpus
    tokenizer:     what `get_tokenizer` takes, or a Tokenizer
    out_dir:       the folder; default: one in the cache, named after text and tokenizer
    val_fraction:  the share of characters, taken from the end as in nanoGPT, that becomes val; 0 <= val_fraction < 1

    Raises UserError for unusable data, an unknown tokenizer, and a folder that cannot be written.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}; it is the share held out for validation: at least 0, below 1")
    corpus = data if isinstance(data, Corpus) else load_text(data)
    if isinstance(tokenizer, str):
        tokenizer = get_tokenizer(tokenizer, corpus.text)
    made_from = {
        "version": 1,
        "text_sha256": corpus.sha256,
        "tokenizer_sha256": tokenizer.fingerprint(),
        "val_fraction": val_fraction,
    }
    if out_dir is None:
        name = re.sub(r"[^\w.-]+", "-", f"{corpus.name}-{tokenizer.name}")
        folder = cache_folder() / "datasets" / f"{name}-{zlib.crc32(json.dumps(made_from).encode()):08x}"
    else:
        folder = Path(os.path.expanduser(out_dir))
        if (folder / FILE_NAME).exists() and not (folder / META).exists():  # a run, say: its tokenizer must survive
            raise UserError(f"{folder} holds a {FILE_NAME} that belongs to something else; choose another --out_dir")
    try:
        dataset = open_dataset(folder)
        if made_from.items() <= dataset.meta.items():
            return dataset
    except UserError:
        pass  # absent, or damaged: made anew
    _write(folder, corpus, tokenizer, made_from)
    return open_dataset(folder)


def open_dataset(folder: str | Path) -> TokenDataset:
    """Open a prepared folder, checking the token files against their description.

    Raises UserError when a file is missing, the description is damaged, or sizes, dtype, checksum or ids contradict it.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        vocab_size, dtype = int(meta["vocab_size"]), np.dtype(str(meta["dtype"]))
        splits = [(int(meta["splits"][name]["tokens"]), int(meta["splits"][name]["crc32"])) for name in SPLITS]
        tokenizer_sha256 = meta["tokenizer_sha256"]
    except OSError as error:
        raise UserError(f"no prepared data in {folder}: {META}: {error.strerror or error}; {AGAIN}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / META} is damaged ({type(error).__name__}: {error}); {AGAIN}") from error
    if dtype != token_dtype(vocab_size):
        raise UserError(f"{folder / META} says {dtype} for {vocab_size:,} ids, not {token_dtype(vocab_size)}; {AGAIN}")
    tokenizer = load_tokenizer(folder / FILE_NAME)
    if tokenizer.fingerprint() != tokenizer_sha256 or tokenizer.vocab_size != vocab_size:
        raise UserError(f"{folder / FILE_NAME} is not the tokenizer of these tokens; {AGAIN}")
    train, val = (_map(folder / f"{name}.bin", *split, vocab_size) for name, split in zip(SPLITS, splits, strict=True))
    return TokenDataset(folder, meta, tokenizer, train, val)


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 for up to 65,536 ids, else uint32; little-endian, as the files are."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def check_length(tokens: np.ndarray, block_size: int, split: str = "train") -> None:
    """Raise UserError unless `tokens` holds at least one block and the token after it."""
    if len(tokens) < block_size + 1:
        smaller = f", or --block_size {len(tokens) - 1} or less" if len(tokens) > 1 else ""
        raise UserError(
            f"the {split} text is shorter than a block: it has {len(tokens)} tokens, and block_size {block_size} needs"
            f" {block_size + 1}; give more text{smaller}"
        )


def _map(path: Path, tokens: int, crc32: int, vocab_size: int) -> np.ndarray:
    """The token file as an array on the mapped file, (tokens,), once it agrees with its description."""
    dtype = token_dtype(vocab_size)
    try:
        size = path.stat().st_size
        if size != tokens * dtype.itemsize:
            expected = f"{tokens} tokens of {dtype} are {tokens * dtype.itemsize}"
            raise UserError(f"{path} has {size} bytes, but {expected}: cut short or mixed up; {AGAIN}")
        array = np.memmap(path, dtype, mode="r") if tokens else np.empty(0, dtype)  # an empty file cannot be mapped
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; {AGAIN}") from error
    if zlib.crc32(array) != crc32:
        raise UserError(f"{path} has changed since it was made (its checksum differs); {AGAIN}")
    if tokens and array.max() >= vocab_size:
        raise UserError(f"{path} holds id {array.max()}, but the vocabulary ends at {vocab_size - 1}; {AGAIN}")
    return array


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer, made_from: dict[str, Any]) -> None:
    cut = int(len(corpus.text) * (1 - made_from["val_fraction"]))  # in characters, as in nanoGPT
    dtype = token_dtype(tokenizer.vocab_size)
    files: dict[Path, bytes] = {}
    splits = {}
    for name, text in zip(SPLITS, (corpus.text[:cut], corpus.text[cut:]), strict=True):
        ids = tokenizer.encode_array(text).astype(dtype)
        files[folder / f"{name}.bin"] = ids.tobytes()
        splits[name] = {"tokens": len(ids), "bytes": len(text.encode()), "crc32": zlib.crc32(ids)}
    meta = made_from | {
        "text": corpus.name,
        "description": corpus.description,
        "text_bytes": corpus.size,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "splits": splits,
    }
    files[folder / FILE_NAME] = tokenizer.dump()
    files[folder / META] = (json.dumps(meta, indent=1) + "\n").encode()
    write_files(files)

"""From text to batches: corpora, tokenizers, memory-mapped token files, windows over them.

    dataset = prepare("shakespeare", "char")                     # text -> train.bin, val.bin, meta.json, tokenizer.json
    batches = RandomWindows(dataset.train, block_size=64, batch_size=12, seed=1337)
    x, y = batches.next()                                        # (12, 64) int64 each, y is x moved by one token
"""

from .batches import IGNORE_INDEX, RandomWindows, SequentialWindows
from .corpora import BUILT_IN, Corpus, load_text
from .token_files import TokenDataset, check_length, open_dataset, prepare
from .tokenizers import (
    BPETokenizer,
    CharTokenizer,
    StreamDecoder,
    TiktokenTokenizer,
    Tokenizer,
    WordTokenizer,
    get_tokenizer,
    load_tokenizer,
)

__all__ = [
    "BPETokenizer",
    "BUILT_IN",
    "CharTokenizer",
    "Corpus",
    "IGNORE_INDEX",
    "RandomWindows",
    "SequentialWindows",
    "StreamDecoder",
    "TiktokenTokenizer",
    "TokenDataset",
    "Tokenizer",
    "WordTokenizer",
    "check_length",
    "get_tokenizer",
    "load_text",
    "load_tokenizer",
    "open_dataset",
    "prepare",
]

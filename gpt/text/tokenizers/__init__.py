"""Text to token ids and back.

    char.py word.py           one id per character, per word
    bpe.py bpe_training.py    byte pairs: trained here, from files, or published with tiktoken
    sentencepiece.py          Llama 2's pieces: characters merged by score
    hugging_face.py rank_files.py gguf_files.py    the files of others
    streaming.py              text while it is being generated

A tokenizer lives in `tokenizer.json`, beside the tokens and beside the model that was trained on them. `load.py` finds
out which one a name or a file means.
"""

from .base import FILE_NAME, Tokenizer
from .bpe import ENCODINGS, BPETokenizer, TiktokenTokenizer
from .char import CharTokenizer
from .gguf_files import from_gguf, read_gguf, to_gguf
from .hugging_face import hugging_face_files
from .load import get_tokenizer, load_tokenizer
from .patterns import PATTERNS
from .rank_files import read_gpt2, read_tiktoken, write_gpt2, write_tiktoken
from .sentencepiece import SentencePieceTokenizer
from .streaming import StreamDecoder
from .word import WordTokenizer

__all__ = [
    "BPETokenizer",
    "CharTokenizer",
    "ENCODINGS",
    "FILE_NAME",
    "PATTERNS",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "TiktokenTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "from_gguf",
    "get_tokenizer",
    "hugging_face_files",
    "load_tokenizer",
    "read_gguf",
    "read_gpt2",
    "read_tiktoken",
    "to_gguf",
    "write_gpt2",
    "write_tiktoken",
]

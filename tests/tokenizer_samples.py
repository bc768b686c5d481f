"""Text on which tokenizers have to agree, and the vocabularies that the tests share."""

import random
from functools import cache

from gpt.text.tokenizers import BPETokenizer

FRAGMENTS = (
    "hello world", "naïve café", " e\u0301\u0302 ", "a\u0308 A\u030a", "你好，世界", "日本語テキスト", "हिन्दी", "عربى",
    "\r\n", "\r\n\r\n", "\t", "   ", "  \n  \n", "\u00a0", "\u2028", "\u200b", "😀👩‍🚀", "🇫🇷", "\U0010ffff", "ﬁ",
    "don't I'LL we'VE 'ſ", "12345", "3.14", "٣٤٥", "Ⅻ²½", "def f(x):\n    return x", "!!!???", "_a_b", "ǅ ǆ", "ΣΊΣΥΦΟΣ",
    "<|endoftext|>", "\x00\x1f\x7f\x85", "ĠtheĊ", "“quoted” — and…", "(in [the] middle)",
)  # fmt: skip


@cache
def mixed(size: int = 1_000_000) -> str:
    """Pseudo-random text of about `size` bytes: emoji, CRLF, CJK, combining marks, digits, spaces of all kinds."""
    rng, parts = random.Random(0), []
    while size > 0:
        parts.append(rng.choice(FRAGMENTS) + rng.choice(("", "", " ", "  ", "\n", "'s")))
        size -= len(parts[-1].encode())
    return "".join(parts)


@cache
def made_up_words(count: int = 40_000) -> str:
    """`count` words of random letters: enough different pairs for a large vocabulary."""
    rng = random.Random(1)
    return " ".join("".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(count))


@cache
def trained(pattern: str = "gpt2", size: int = 1000) -> BPETokenizer:
    """A vocabulary of `size` ids trained on a part of `mixed()`, with two special tokens."""
    return BPETokenizer.train(mixed(100_000), size, pattern, ["<|endoftext|>", "<|im_start|>"])

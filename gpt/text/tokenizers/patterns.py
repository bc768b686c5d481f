"""The regular expressions that cut text into pieces before byte pairs are merged; merges never cross a cut.

Each is written so that Python's `regex`, tiktoken and Hugging Face's `tokenizers` read it alike: no possessive
quantifiers, which the last reads differently.
"""

from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"  # each digit alone
CL100K = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN2 = CL100K.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

PATTERNS = {"gpt2": GPT2, "cl100k": CL100K, "llama3": CL100K, "qwen2": QWEN2, "smollm": SMOLLM, "o200k": O200K}

# llama.cpp knows patterns by name only (tokenizer.ggml.pre); the first name of each is the one written. O200K is not
# here: under its name, gpt-4o, llama.cpp cuts combining marks and letters without case in another way.
GGUF_NAMES = {
    "gpt-2": GPT2, "phi-2": GPT2, "mpt": GPT2, "olmo": GPT2, "llama-bpe": CL100K, "llama3": CL100K, "llama-v3": CL100K,
    "dbrx": CL100K, "smaug-bpe": CL100K, "qwen2": QWEN2, "stablelm2": QWEN2, "smollm": SMOLLM, "starcoder": SMOLLM,
    "refact": SMOLLM, "command-r": SMOLLM,
}  # fmt: skip


def pattern_named(name: str) -> str:
    """The pattern called `name` ("gpt2", "cl100k", ...); anything else is taken for a pattern itself."""
    return PATTERNS.get(name, name)


def covering(pattern: str) -> str:
    """`pattern` with one more choice, for what it would pass over: such runs of text are pieces too."""
    return pattern if pattern in PATTERNS.values() else rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def to_pre_tokenizer(pattern: str) -> dict[str, Any]:
    """The `pre_tokenizer` of a Hugging Face tokenizer.json that cuts as `pattern` does."""
    if pattern == GPT2:
        return _byte_level(True)
    digits = {"type": "Digits", "individual_digits": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = [digits, _byte_level(True)] if pattern == SMOLLM else [split, _byte_level(False)]
    return {"type": "Sequence", "pretokenizers": steps}


def from_pre_tokenizer(step: Any) -> str:
    """The pattern of a `pre_tokenizer`; raises ValueError, saying what it is, for one that no single pattern can do."""
    steps = step["pretokenizers"] if isinstance(step, dict) and step.get("type") == "Sequence" else [step]
    kinds = [s.get("type") if isinstance(s, dict) else None for s in steps]
    if kinds[-1:] != ["ByteLevel"]:
        raise ValueError(f"its pre-tokenizer {kinds} is not byte-level")
    if steps[-1].get("add_prefix_space", True):
        raise ValueError("its pre-tokenizer adds a space before the text")
    own_pattern = steps[-1].get("use_regex", True)
    if own_pattern and kinds == ["ByteLevel"]:
        return GPT2
    if own_pattern and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return SMOLLM
    if not own_pattern and kinds == ["Split", "ByteLevel"]:
        behavior, invert = steps[0]["behavior"], steps[0].get("invert", False)
        pattern = steps[0]["pattern"].get("Regex")
        if isinstance(pattern, str) and (behavior, invert) in (("Isolated", False), ("Removed", True)):
            return pattern
    raise ValueError(f"its pre-tokenizer {kinds} is none of ByteLevel, Digits + ByteLevel, Split + ByteLevel")

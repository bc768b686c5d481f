"""The model: what it is (config), what it computes (gpt, attention, ffn, norms, positions)."""
from .cache import KVCache, next_logits
from .config import GPTConfig
from .gpt import GPT, Block

__all__ = ["GPT", "Block", "GPTConfig", "KVCache", "next_logits"]

"""The model: what it is (config), what it computes (gpt, attention, ffn, norms, positions)."""
from .config import GPTConfig
from .gpt import GPT, Block

__all__ = ["GPT", "Block", "GPTConfig"]

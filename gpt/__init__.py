"""A GPT written in tensorgrad operations: model, text, training, inference, interop, serving."""
from .model import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]

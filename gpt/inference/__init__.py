"""Using a trained model: continue texts, one or many at once, by drawing or by beam search.

    [text] = generate(model, "Once upon", tokenizer, max_new_tokens=50, temperature=0.8, seed=1)
    for piece in stream(model, "Once upon", tokenizer): print(piece.text, end="", flush=True)
"""
from .decoder import Decoder, Piece, Writing
from .generate import generate, stream
from .processors import Choice, Sampling
from .sample import SampleConfig, sample
from .text import TextStream

__all__ = ["Choice", "Decoder", "Piece", "SampleConfig", "Sampling", "TextStream", "Writing", "generate", "sample",
           "stream"]

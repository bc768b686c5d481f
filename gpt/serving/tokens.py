"""Tokens beside the text they make: what a client that asks for log-probabilities is told."""
from collections import deque
from dataclasses import dataclass

from ..text.tokenizers.streaming import StreamDecoder

LEAST = -9999.0  # what OpenAI's API says for log-probabilities that are too low to matter


@dataclass(frozen=True)
class Told:
    """One token: id, text, UTF-8 bytes, log-probability (None for the first of a text, which nothing precedes), place
    in the text in characters, and the likeliest tokens in its place, [(id, text, bytes, log-probability)]."""

    id: int
    text: str
    bytes: bytes
    logprob: float | None
    offset: int
    top: tuple


class Speller:
    """The texts of tokens that stand one after the other; `after` are the ids before the first."""

    def __init__(self, tokenizer, after=()):
        self.tokenizer = tokenizer
        self._special = {number: name for name, number in tokenizer.special_tokens.items()}
        self._before = [token for token in after if self.has_text(token)][-1:]
        self._stream = StreamDecoder(tokenizer, self._before)
        self.characters = 0  # how many the tokens so far have completed

    def has_text(self, token):
        return token < self.tokenizer.vocab_size and token not in self._special

    def tell(self, choice):
        """The Told of the next token."""
        top = tuple((token, *self._spell(token), _finite(logprob)) for token, logprob in choice.top)
        logprob = None if choice.logprob is None else _finite(choice.logprob)
        told = Told(choice.id, *self._spell(choice.id), logprob, self.characters, top)
        if self.has_text(choice.id):
            self.characters += len(self._stream.feed(choice.id))
            self._before = [choice.id]
        return told

    def _spell(self, token):
        """(text, bytes) of a token in this place; bytes that are no whole characters are spelled out."""
        if not self.has_text(token):
            name = self._special.get(token, f"<|{token}|>")
            return name, name.encode()
        decode = self.tokenizer.decode_bytes
        piece = decode([*self._before, token])[len(decode(self._before)):]
        try:
            return piece.decode(), piece
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece), piece


class Track:
    """The tokens of one text, let go as their text becomes certain, so that both come together.

    `stop_ids`: an id of these ends the text and is not part of it."""

    def __init__(self, tokenizer, prompt, stop_ids):
        self._speller, self._stop_ids = Speller(tokenizer, prompt), set(stop_ids)
        self._held, self._shown = deque(), 0

    def begin_at(self, characters):
        """The text stands after so many others."""
        self._speller.characters = self._shown = characters

    def take(self, event):
        """The list of Told that goes with the text of an Event."""
        self._shown += len(event.text)
        by_id = event.finish_reason == "stop" and event.choice.id in self._stop_ids
        if event.choice is not None and not by_id:
            self._held.append(self._speller.tell(event.choice))
        everything = by_id or event.finish_reason == "length"
        told = []
        while self._held and (everything or self._held[0].offset < self._shown):
            told.append(self._held.popleft())
        return told


def _finite(logprob):
    return logprob if logprob >= LEAST else LEAST  # NaN is neither

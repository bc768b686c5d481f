"""Tokens as text while they come: whole characters only, and nothing of a stop text."""
from ..text.tokenizers.streaming import StreamDecoder


class TextStream:
    """Turns token ids into text piece by piece; `after` are the ids before the first, which are not shown.

    Holds back bytes that are not yet a whole character, and the end of the text while it may be the beginning of a text
    in `stop`. After a stop text was met `stopped` is True and nothing more comes."""

    def __init__(self, tokenizer, stop=(), after=()):
        self.stop, self.stopped = tuple(stop), False
        self._vocab_size, self._special = tokenizer.vocab_size, tokenizer.special_ids
        self._decoder = StreamDecoder(tokenizer, [token for token in after if self._has_text(token)])
        self._held = ""

    def push(self, token) -> str:
        """The text that is certain after one more token id; ids of a padded vocabulary and special ones have none."""
        return self._release(self._decoder.feed(token)) if not self.stopped and self._has_text(token) else ""

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.finish())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _has_text(self, token):
        return token < self._vocab_size and token not in self._special

    def _release(self, new):
        self._held += new
        places = [place for place in (self._held.find(stop) for stop in self.stop) if place >= 0]
        if places:
            self.stopped, text, self._held = True, self._held[:min(places)], ""
            return text
        keep = max((overlap(self._held, stop) for stop in self.stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def overlap(text, stop):
    """Length of the longest proper beginning of `stop` with which `text` ends."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

"""Text that appears while it is being generated."""

import codecs
from collections.abc import Sequence

from .base import Tokenizer


class StreamDecoder:
    """Decode ids one by one: the texts that `feed` gives, joined, are what `decode` gives for all ids at once.

        stream = StreamDecoder(tokenizer, after=prompt_ids)
        for i in ids:
            print(stream.feed(i), end="", flush=True)
        print(stream.finish())

    A character that several tokens spell comes whole with the last of them. `after` are the ids that stand before the
    stream and are not to be shown: some vocabularies need them to know whether a word begins the text.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._before = list(after)[-1:]

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes, perhaps none. Raises UserError for an unknown id."""
        known = len(self._tokenizer.decode_bytes(self._before))
        piece = self._tokenizer.decode_bytes([*self._before, token_id])[known:]
        self._before = [token_id]
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is left of a character that never became whole, as U+FFFD; the stream is then empty."""
        return self._utf8.decode(b"", final=True)

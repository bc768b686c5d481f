"""The decoder: several texts written at once, one token each per step; texts come and go at any time.

    decoder = Decoder(model, tokenizer, rows=8)
    decoder.add([Writing(prompt_ids, Sampling(max_new_tokens=50, seed=1)), ...])   # prefill, all prompts together
    while decoder.active:
        for piece in decoder.step():                                              # one token of each text
            print(piece.writing, piece.text)

What a text becomes does not depend on its company: it has its own random numbers, and rows of the cache do not mix.
"""
from dataclasses import dataclass

import tensorgrad as tg

from ..errors import UserError
from ..model.cache import KVCache, next_logits
from .processors import Choice, Sampler, Sampling, check_bias
from .text import TextStream


class Writing:
    """A text being written: what was asked and what has come of it.

    prompt, ids: token ids given and written (a stop id is the last of them); text: what was written so far, without the
    prompt and what is held back; choices: a Choice per id; finish_reason: None while it goes on, then "stop" (a stop id
    or text), "length" (max_new_tokens) or "cancelled"; score: beam search's, else None. `number`: which of several
    samples of a seed it is (see Sampler)."""

    def __init__(self, prompt, settings=None, number=0):
        if not len(prompt):
            raise UserError("a prompt needs at least one token")
        self.prompt, self.settings, self.number = list(prompt), settings or Sampling(), number
        self.ids, self.choices, self.text, self.finish_reason, self.score = [], [], "", None, None
        self.sampler = Sampler(self.settings, self.prompt, number)


@dataclass(frozen=True)
class Piece:
    """One step of a text: the token, and the text that is certain now (it may lag behind the tokens)."""

    writing: Writing
    choice: Choice
    text: str
    finish_reason: str | None


class Decoder:
    """Writes up to `rows` texts at once with one model, each up to `length` tokens (None: block_size).

    Without a tokenizer only ids come, and stop texts are refused. `active` are the texts that are being written, in the
    order of their rows. With `reuse`, a prompt that begins like the text that was last in its row (a chat that goes on)
    is read from where the two part."""

    def __init__(self, model, tokenizer=None, rows=8, length=None, reuse=False):
        self.model, self.tokenizer, self.reuse = model, tokenizer, reuse
        self.cache = KVCache(model, rows, length)
        self.active, self._texts, self._streams = [], [], []
        self._left = [[] for _ in range(rows)]  # the text that a free row of the cache still holds

    @property
    def free(self):
        """Number of texts that can be added."""
        return self.cache.rows - len(self.active)

    def add(self, writings) -> list[Piece]:
        """Read the prompts and write the first token of each. Texts with the same prompt share the reading. Returns
        their pieces. Raises UserError where there is no room; nothing has changed then."""
        writings = list(writings)
        for writing in writings:
            self._check(writing)
        if len(writings) > self.free:
            raise UserError(f"{len(writings)} texts for {self.free} free rows of the decoder")
        pieces = []
        for writing in [w for w in writings if w.settings.max_new_tokens == 0]:
            writing.finish_reason = "length"
        writings = [w for w in writings if w.finish_reason is None]
        if not writings:
            return pieces
        prompts = {}
        for writing in writings:
            prompts.setdefault(tuple(writing.prompt[-self.model.config.block_size:]), []).append(writing)
        first = len(self.active)
        for row, prompt in enumerate(prompts, first):
            self.cache.truncate(row, common(self._left[row], prompt[:-1]) if self.reuse else 0)
        try:
            logits = next_logits(self.model, [list(prompt) for prompt in prompts], self.cache, first)  # (n, V)
            logits = logits.to("cpu")
        except BaseException:
            for row in range(first, self.cache.rows):
                self.cache.truncate(row)
            raise
        rows = [(row, prompt, group[0]) for row, (prompt, group) in enumerate(prompts.items())]
        rows += [(row, prompt, writing) for row, prompt, _ in rows for writing in prompts[prompt][1:]]
        for row, (source, prompt, writing) in enumerate(rows):
            self.cache.copy_row(first + source, first + row)
            self.active.append(writing)
            self._texts.append(list(prompt))
            self._streams.append(self._stream(writing))
        return self._choose(first, [logits[source] for source, _, _ in rows])

    def read_ahead(self, prompt, most) -> bool:
        """Read up to `most` tokens of a prompt before it is added, so that long ones need not hold up the active texts:
        call it between steps until it gives True, then `add` reads the rest, at most `most` tokens, at once.

        Needs `reuse` and a free row, whose last one it uses; the beginning may come from any free row that has it."""
        prompt, spare = list(prompt)[-self.model.config.block_size:], self.cache.rows - 1
        if not self.free or not self.reuse:
            raise UserError("reading ahead needs a decoder with reuse and a free row")
        best = max(range(len(self.active), self.cache.rows), key=lambda row: (self._known(row, prompt), row == spare))
        self._copy_left(best, spare)
        known = self._known(spare, prompt)
        if len(prompt) - known <= most:
            self._copy_left(spare, len(self.active))
            return True
        self.cache.truncate(spare, known)
        self._left[spare] = []
        next_logits(self.model, [prompt[:known + most]], self.cache, spare)
        self._left[spare] = prompt[:known + most]
        return False

    def _known(self, row, prompt):
        """How many tokens of a prompt, but for its last, a free row holds already; none once it has rolled."""
        length = self.cache.lengths[row]
        return min(common(self._left[row], prompt[:-1]), length) if length <= self.cache.length else 0

    def _copy_left(self, source, target):
        self.cache.copy_row(source, target)
        self._left[target] = self._left[source]

    def step(self) -> list[Piece]:
        """Write one more token of every active text; finished texts make room."""
        if not self.active:
            return []
        return self._choose(0, next_logits(self.model, self._texts, self.cache).to("cpu"))

    def cancel(self, writing):
        """Take a text out before it is finished."""
        if writing in self.active:
            writing.finish_reason = "cancelled"
            self._remove(self.active.index(writing))

    def _check(self, writing):
        settings, cache = writing.settings, self.cache
        if settings.stop and self.tokenizer is None:
            raise UserError("stop texts need a tokenizer; give stop_ids")
        check_bias(settings, self.model.config.vocab_size)
        need = len(writing.prompt) + settings.max_new_tokens - 1  # the last token is not read again
        if cache.length < self.model.config.block_size and need > cache.length:
            raise UserError(f"a prompt of {len(writing.prompt)} tokens and {settings.max_new_tokens} new ones do not "
                            f"fit the decoder's length of {cache.length}")

    def _stream(self, writing):
        return TextStream(self.tokenizer, writing.settings.stop, writing.prompt) if self.tokenizer else None

    @tg.no_grad()
    def _choose(self, first, logits):
        pieces = []
        for row, scores in enumerate(logits, first):
            writing, stream = self.active[row], self._streams[row]
            choice = writing.sampler.choose(scores)
            writing.ids.append(choice.id)
            writing.choices.append(choice)
            self._texts[row].append(choice.id)
            stopped = choice.id in writing.settings.stop_ids
            text = stream.push(choice.id) if stream and not stopped else ""
            if stopped or (stream and stream.stopped):
                writing.finish_reason = "stop"
            elif len(writing.ids) >= writing.settings.max_new_tokens:
                writing.finish_reason = "length"
            if writing.finish_reason and stream:
                text += stream.finish()
                if stream.stopped:  # the end of a cut-off character completed a stop text
                    writing.finish_reason = "stop"
            writing.text += text
            pieces.append(Piece(writing, choice, text, writing.finish_reason))
        for row in range(len(self.active) - 1, -1, -1):
            if self.active[row].finish_reason:
                self._remove(row)
        return pieces

    def _remove(self, row):
        """The last row moves into the place of a finished one, so that active rows stand together."""
        last = len(self.active) - 1
        self.cache.copy_row(last, row)
        self._left[last] = self._texts[last]
        for rows in (self.active, self._texts, self._streams):
            rows[row] = rows[last]
            rows.pop()


def common(a, b):
    """Number of elements that two sequences have in common at the beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

"""Choosing the next token: penalties and biases, the draw, and what is told about it.

The order is that of transformers: repetition penalty, bias, then temperature, top-k, top-p, min-p. Presence and
frequency penalties are OpenAI's: they count what was written, not what was asked.
"""
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import tensorgrad as tg
from tensorgrad.nn import functional as F

from ..errors import UserError
from ..model.sampling import GREEDY_BELOW, check_sampling, filter_logits


@dataclass(frozen=True)
class Sampling:
    """How a text is continued. Raises UserError for impossible values."""

    max_new_tokens: int = 100
    """Tokens to write at most."""
    temperature: float = 1.0
    """Divides the logits: below 1 safer, above 1 wilder, 0 the likeliest token always (greedy)."""
    top_k: int | None = None
    """Draw among this many likeliest tokens."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together reach this probability. Alone it sorts the whole vocabulary for
    each token, with top_k beside it only top_k tokens."""
    min_p: float | None = None
    """Draw among tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of all tokens so far (Keskar et al. 2019, CTRL); 1 is off."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that were written already."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens once for each time they were written."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these ids; -100 forbids, 100 forces."""
    stop: tuple[str, ...] = ()
    """Texts at which to stop; they are not part of the result."""
    stop_ids: tuple[int, ...] = ()
    """Token ids at which to stop; they are not part of the text."""
    seed: int | None = None
    """The same seed gives the same text whatever else is in the batch; None: from the default generator."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many likeliest ones; None: do not."""

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens must be at least 0, not {self.max_new_tokens}")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty must be above 0 and finite, not {self.repetition_penalty}")
        numbers = (self.presence_penalty, self.frequency_penalty, *(self.logit_bias or {}).values())
        if not all(map(math.isfinite, numbers)):
            raise UserError(f"penalties and biases must be finite numbers, not {', '.join(map(str, numbers))}")
        if self.logprobs is not None and self.logprobs < 0:
            raise UserError(f"logprobs must be at least 0, not {self.logprobs}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise UserError("stop must be a sequence of texts, none of them empty")

    @property
    def penalizes(self) -> bool:
        """Do the logits depend on the tokens so far, or on a bias?"""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True)
class Choice:
    """A token, and where asked for its log-probability by the model (before penalties, temperature and cuts, in nats)
    and the likeliest tokens, [(id, log-probability)]."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one text: its settings, its random numbers, and what it has seen.

    `number`: which of several samples with the same seed this is; sample n of seed s is sample 0 of seed s + n."""

    def __init__(self, settings: Sampling, prompt=(), number=0):
        self.settings = settings
        seed = tg.randint(2**62, (1,)).item() if settings.seed is None else settings.seed + number
        self.generator = tg.Generator().manual_seed(seed)
        self.seen, self.written = set(prompt), Counter()

    def choose(self, logits) -> Choice:
        """The next token for logits (V,) on the CPU."""
        settings = self.settings
        processed = penalize(logits, settings, self.seen, self.written) if settings.penalizes else logits
        if settings.temperature < GREEDY_BELOW:
            token = processed.argmax().item()
        else:
            ids, among = shortlist(processed, settings.top_k)
            kept = filter_logits(among.unsqueeze(0), settings.temperature, settings.top_k, settings.top_p,
                                 settings.min_p)                               # (1, n)
            place = tg.multinomial(F.softmax(kept, dim=-1), 1, generator=self.generator).item()
            token = place if ids is None else int(ids[place])
        if settings.penalizes:
            self.seen.add(token)
            self.written[token] += 1
        if settings.logprobs is None:
            return Choice(token)
        logprobs = F.log_softmax(logits, dim=-1)
        return Choice(token, logprobs[token].item(), tuple(largest(logprobs, settings.logprobs)))


def penalize(logits, settings, seen, written):
    """A copy of logits (V,) with penalties and biases: `seen` is the set of all ids so far, `written` a Counter of the
    generated ones."""
    logits = logits.clone()
    if settings.repetition_penalty != 1 and seen:
        ids = tg.tensor(sorted(seen))                                          # (n,)
        old = logits[ids]
        logits[ids] = tg.where(old > 0, old / settings.repetition_penalty, old * settings.repetition_penalty)
    if (settings.presence_penalty or settings.frequency_penalty) and written:
        counts = tg.tensor(list(written.values()), dtype=logits.dtype)         # (n,)
        penalty = counts * settings.frequency_penalty + settings.presence_penalty
        ids = tg.tensor(list(written))
        logits[ids] = logits[ids] - penalty
    if settings.logit_bias:
        ids = tg.tensor([int(i) for i in settings.logit_bias])
        logits[ids] = logits[ids] + tg.tensor([float(b) for b in settings.logit_bias.values()], dtype=logits.dtype)
    return logits


def shortlist(logits, top_k):
    """(ids, their logits) of the top_k largest of logits (V,) and what equals the least of them, by rising id: what
    follows then costs as little as top_k tokens do. (None, logits) where all are wanted."""
    if top_k is None or top_k >= logits.size(0):
        return None, logits
    ordered = logits.array.copy()
    ordered.partition(ordered.size - top_k)
    ids = (logits.array >= ordered[ordered.size - top_k]).nonzero()[0]
    return ids, tg.from_numpy(logits.array[ids])


def check_bias(settings, vocab_size):
    """Raise UserError for a bias on an id outside the vocabulary."""
    outside = [i for i in settings.logit_bias or () if not 0 <= int(i) < vocab_size]
    if outside:
        raise UserError(f"logit_bias: token id {outside[0]} is outside the vocabulary (0 to {vocab_size - 1})")


def largest(scores, k):
    """The k largest of scores (n,), [(index, value)] in falling order, the lower index first among equals."""
    array = scores.array
    k = min(k, array.shape[0])
    if k == 0:
        return []
    found = (-array).argpartition(k - 1)[:k] if k < array.shape[0] else range(k)
    return sorted(((int(i), float(array[i])) for i in found), key=lambda pair: (-pair[1], pair[0]))

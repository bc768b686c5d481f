"""How good a model is on a text it was not trained on: loss, perplexity, bits per byte."""
import math
from dataclasses import dataclass
from itertools import islice

import tensorgrad as tg
from tensorgrad.nn import functional as F

from ..text import IGNORE_INDEX, RandomWindows, SequentialWindows
from ..text.finetune import Examples, RandomExamples


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation, all over the same `tokens` targets."""

    loss: float
    """Mean cross-entropy per token, in nats."""
    bits_per_byte: float
    """Bits to write one byte of the text, special tokens excluded: comparable between tokenizers, and with file
    compressors."""
    tokens: int
    """Number of targets predicted."""

    @property
    def perplexity(self):
        """exp(loss): the model is as unsure as between this many equally likely tokens."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def mean_probability(self):
        """exp(-loss): geometric mean of the probability given to the right token."""
        return math.exp(-self.loss)


def training_batches(split, block_size, batch_size, seed):
    """The endless random batches of a split, token ids or Examples: an object with next() and a state."""
    if isinstance(split, Examples):
        return RandomExamples(split, batch_size, seed)
    return RandomWindows(split, block_size, batch_size, seed)


def validation_batches(tokens, block_size, batch_size, iters=0, seed=0):
    """The (inputs, targets) that an evaluation goes over: the whole of `tokens` in order, or `iters` random batches,
    which are the same for the same `seed`. Of Examples the first `iters` batches in order, 0 = all."""
    if isinstance(tokens, Examples):
        yield from islice(tokens.in_order(batch_size), iters or None)
    elif iters == 0:
        yield from SequentialWindows(tokens, block_size, batch_size)
    else:
        windows = RandomWindows(tokens, block_size, batch_size, seed)
        for _ in range(iters):
            yield windows.next()


def evaluate(model, batches, token_bytes, device="cpu", world=None):
    """The Evaluation of `model` on `batches` of (inputs, targets), integer arrays of shape (B, T); with `world`, a
    tg.distributed.Communicator, on the batches of all its processes together.

    token_bytes: integer array of shape (vocabulary,), the UTF-8 bytes of each token, 0 for special ones
    (`tokenizer.token_bytes()`). Targets of IGNORE_INDEX do not count. The model's mode is as before afterwards.
    """
    nats = text_nats = text_bytes = count = 0
    was_training = model.training
    model.eval()
    try:
        with tg.no_grad():
            for x, y in batches:
                targets = tg.tensor(y, device=device)  # (B, T)
                logits, loss = model(tg.tensor(x, device=device), targets)  # (B, T, V), ()
                counted = y != IGNORE_INDEX
                sizes = token_bytes[y * counted] * counted  # (B, T) bytes of each counted target
                batch_nats = loss.item() * int(counted.sum())
                special = counted & (sizes == 0)
                nats += batch_nats
                text_nats += batch_nats
                if special.any():
                    where = tg.tensor(special, device=device)  # (B, T)
                    text_nats -= F.cross_entropy(logits[where], targets[where], reduction="sum").item()
                text_bytes += int(sizes.sum())
                count += int(counted.sum())
    finally:
        model.train(was_training)
    if world is not None:
        sums = tg.tensor([nats, text_nats, text_bytes, count], dtype=tg.float64)
        nats, text_nats, text_bytes, count = world.all_reduce_(sums).tolist()
    bits = text_nats / math.log(2)
    return Evaluation(nats / max(count, 1), bits / text_bytes if text_bytes else math.inf, int(count))

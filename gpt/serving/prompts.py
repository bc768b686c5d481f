"""Log-probabilities of the tokens of a prompt, for clients that ask for an echo with them."""
import tensorgrad as tg
from tensorgrad.nn import functional as F

from ..inference.processors import Choice, largest
from ..model.cache import KVCache

_POSITIONS = 64  # positions whose logits are in memory at a time


class Scorer:
    """Reads a prompt, `most` tokens at each call of `read(model)`, until it is `finished`.

    `choices`: a Choice for each token, with its log-probability given those before (None for the first) and the `top`
    likeliest in its place."""

    def __init__(self, prompt, top, most):
        self.prompt, self.top, self.most = prompt, top, most
        self.choices, self._cache = [Choice(prompt[0])], None

    @property
    def finished(self):
        return len(self.choices) == len(self.prompt)

    @tg.no_grad()
    def read(self, model):
        """One part more."""
        if self._cache is None:
            self._cache = KVCache(model, 1, len(self.prompt))
        start = len(self.choices) - 1                                          # the token that stands there is read
        ids = self.prompt[start:min(start + self.most, len(self.prompt) - 1)]
        step = self._cache.step(0, [len(ids)], len(ids))
        hidden = model.hidden(tg.tensor([ids], device=step.positions.device), step)[0]  # (T, C)
        step.finish()
        for at in range(0, len(ids), _POSITIONS):
            logprobs = F.log_softmax(model.lm_head(hidden[at:at + _POSITIONS]).to("cpu"), dim=-1)  # (positions, V)
            for row in logprobs:
                token = self.prompt[len(self.choices)]
                self.choices.append(Choice(token, row[token].item(), tuple(largest(row, self.top))))

"""From logits to a token: which tokens stay in the draw, and the draw.

The order is that of Hugging Face's transformers: temperature, top-k, top-p, min-p, each on what the one before left.
"""
import math

import tensorgrad as tg
from tensorgrad.nn import functional as F

from ..errors import UserError

GREEDY_BELOW = 1e-4  # a temperature as low as this draws the likeliest token, and logits divided by less may overflow


def check_sampling(temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Raise UserError for values that mean nothing."""
    fine = (0 <= temperature < math.inf and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
            and (min_p is None or 0 <= min_p <= 1))
    if not fine:
        raise UserError("temperature must be at least 0, top_k at least 1, top_p in (0, 1] and min_p in [0, 1], not "
                        f"{temperature}, {top_k}, {top_p} and {min_p}")


def filter_logits(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Logits (B, V) divided by `temperature` (above 0), -inf for what is not to be drawn.

    `top_k` keeps the k likeliest tokens, `top_p` the fewest that together reach probability p (Holtzman et al. 2020),
    `min_p` those at least min_p times as likely as the likeliest (Nguyen et al. 2024)."""
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        least = _sorted(logits, among=top_k)[:, -top_k:].amin(dim=-1, keepdim=True)  # (B, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered = _sorted(logits)                                              # (B, V), rising
        up_to = F.softmax(ordered, dim=-1).cumsum(dim=-1)                      # the token and all that are less likely
        outside = up_to <= 1 - top_p
        outside[:, -1] = False                                                 # the likeliest always stays
        least = ordered.masked_fill(outside, math.inf).amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -math.inf)
    if min_p:
        least = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def _sorted(logits, among=None):
    """A copy with rising rows; with `among` only the last so many places hold the right values, in any order. Arrays
    sort in place and without indices, many times faster than `Tensor.sort`."""
    ordered = logits.detach().clone()
    if among is None:
        ordered.array.sort(axis=-1)
    else:
        ordered.array.partition(logits.size(-1) - among, axis=-1)
    return ordered


def next_token(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, generator=None):
    """Draw a token per row of logits (B, V): (B, 1) int64; the likeliest where `temperature` is 0, or next to it.
    `generator`: a tg.Generator, the default one of the device unless given."""
    check_sampling(temperature, top_k, top_p, min_p)
    if temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1, keepdim=True)
    kept = filter_logits(logits, temperature, top_k, top_p, min_p)
    return tg.multinomial(F.softmax(kept, dim=-1), 1, generator=generator)

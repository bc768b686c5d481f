"""Beam search: the likeliest text instead of a draw.

At each step every beam is continued by every token, and the num_beams best sums of log-probabilities go on. A beam that
meets a stop id is finished and scores its sum divided by (its number of new tokens) ** length_penalty. The rules for
when to stop are those of transformers, so that results agree: with `early_stopping` as soon as num_beams are finished,
else when no open beam can beat the worst finished one at its present length.
"""
import tensorgrad as tg
from tensorgrad.nn import functional as F

from ..errors import UserError
from ..model.cache import KVCache, next_logits
from .decoder import Writing
from .processors import check_bias, largest, penalize
from .text import TextStream


@tg.no_grad()
def beam_search(model, prompt, settings, num_beams, length_penalty=1.0, early_stopping=False, num_return=1,
                tokenizer=None):
    """The `num_return` best continuations of `prompt` (ids), best first: finished Writings with a `score`, the sum of
    log-probabilities divided by (number of new tokens) ** length_penalty.

    `settings`: a Sampling, of which max_new_tokens, stop_ids, repetition_penalty and logit_bias count; penalties act on
    the log-probabilities. Raises UserError where more are wanted than there are beams."""
    if num_return > num_beams:
        raise UserError(f"num_samples {num_return} is more than num_beams {num_beams}")
    if settings.stop or settings.presence_penalty or settings.frequency_penalty or settings.logprobs is not None:
        raise UserError("beam search knows stop_ids, repetition_penalty and logit_bias; stop texts, presence and "
                        "frequency penalties and logprobs need num_beams = 1")
    if not -50 <= length_penalty <= 50:  # lengths to such a power are numbers still
        raise UserError(f"length_penalty must be between -50 and 50, not {length_penalty}")
    check_bias(settings, model.config.vocab_size)
    limit, stop_ids = settings.max_new_tokens, set(settings.stop_ids)
    prompt = list(prompt)
    context = prompt[-model.config.block_size:]
    cache = KVCache(model, num_beams, len(context) + limit)
    beams = [(0.0, [])]                            # (sum of log-probabilities, new ids)
    finished = [] if limit else [(0.0, [])]        # (score, new ids)
    for length in range(1, limit + 1):
        logits = next_logits(model, [context + ids for _, ids in beams], cache).to("cpu")    # (beams, V)
        logprobs = F.log_softmax(logits, dim=-1)
        if settings.penalizes:
            logprobs = tg.stack([penalize(row, settings, {*prompt, *ids}, {})
                                 for row, (_, ids) in zip(logprobs, beams, strict=True)])
        sums = logprobs + tg.tensor([[total] for total, _ in beams], dtype=logprobs.dtype)   # (beams, V)
        found = largest(sums.reshape(-1), max(2, 1 + len(stop_ids)) * num_beams)
        found = [(total, *divmod(place, logits.size(1))) for place, total in found]          # (sum, beam, token)
        ended = [token in stop_ids or length == limit for _, _, token in found]
        for (total, beam, token), end in list(zip(found, ended, strict=True))[:num_beams]:
            if end:
                finished.append((total / length**length_penalty, [*beams[beam][1], token]))
        finished = sorted(finished, key=lambda text: -text[0])[:num_beams]
        going = [candidate for candidate, end in zip(found, ended, strict=True) if not end][:num_beams]
        if not going:
            break
        best_open = going[0][0] / length**length_penalty
        full = len(finished) == num_beams
        if full and (early_stopping or best_open <= finished[-1][0]):
            break
        cache.reorder([beam for _, beam, _ in going])
        beams = [(total, [*beams[beam][1], token]) for total, beam, token in going]
    return [_writing(prompt, settings, ids, score, tokenizer) for score, ids in finished[:num_return]]


def _writing(prompt, settings, ids, score, tokenizer):
    writing = Writing(prompt, settings)
    writing.ids, writing.score = ids, score
    writing.finish_reason = "stop" if ids and ids[-1] in settings.stop_ids else "length"
    if tokenizer is not None:
        stream = TextStream(tokenizer, after=prompt)
        shown = ids[:-1] if writing.finish_reason == "stop" else ids
        writing.text = "".join(map(stream.push, shown)) + stream.finish()
    return writing

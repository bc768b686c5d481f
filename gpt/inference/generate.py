"""Continue prompts: all at once, or as a stream.

    [text] = generate(model, "Once upon", tokenizer, max_new_tokens=50, temperature=0.8, seed=1)
    texts = generate(model, [[1, 2, 3], [4]], max_new_tokens=20, num_samples=4)    # 8 texts, each prompt read once
    for piece in stream(model, "Once upon", tokenizer, max_new_tokens=50):
        print(piece.text, end="", flush=True)
"""
from dataclasses import replace

from ..errors import UserError
from .beam import beam_search
from .decoder import Decoder, Writing
from .processors import Sampling


def generate(model, input_ids, tokenizer=None, max_new_tokens=100, *, num_samples=1, num_beams=1, length_penalty=1.0,
             early_stopping=False, do_sample=True, max_rows=16, **settings):
    """Write continuations and return them: `num_samples` per prompt, a list of Writings in the order of the prompts.

    input_ids: a prompt (text where there is a tokenizer, or ids) or a list of prompts, or a Tensor (B, T). `settings`:
    the fields of Sampling (temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
    logit_bias, stop, stop_ids, seed, logprobs). do_sample=False is temperature 0. Sample n of seed s is that of seed
    s + n. At most `max_rows` texts are written at once. `num_beams` above 1 searches the likeliest texts instead of
    drawing (see beam.py) and returns the `num_samples` best. Raises UserError for wrong values."""
    prompts = as_prompts(input_ids, tokenizer)
    sampling = Sampling(max_new_tokens=max_new_tokens, **settings)
    if num_samples < 1 or num_beams < 1 or max_rows < 1:
        raise UserError("num_samples, num_beams and max_rows must be at least 1, not "
                        f"{num_samples}, {num_beams} and {max_rows}")
    if num_beams > 1:
        return [writing for prompt in prompts
                for writing in beam_search(model, prompt, sampling, num_beams, length_penalty, early_stopping,
                                           num_samples, tokenizer)]
    if not do_sample:
        sampling = replace(sampling, temperature=0.0)
    waiting = [Writing(prompt, sampling, number) for prompt in prompts for number in range(num_samples)]
    writings = list(waiting)
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    decoder = Decoder(model, tokenizer, min(len(waiting), max_rows), longest)
    while waiting or decoder.active:
        room = decoder.free
        if waiting and room:
            decoder.add(waiting[:room])
            del waiting[:room]
        decoder.step()
    return writings


def stream(model, input_ids, tokenizer=None, max_new_tokens=100, *, do_sample=True, **settings):
    """Continue one prompt: an iterator of Pieces, one per token, as they are written. Arguments as in `generate`."""
    [prompt] = as_prompts(input_ids, tokenizer)
    sampling = Sampling(max_new_tokens=max_new_tokens, **settings)
    if not do_sample:
        sampling = replace(sampling, temperature=0.0)
    return follow(Decoder(model, tokenizer, 1, len(prompt) + max_new_tokens), [Writing(prompt, sampling)])


def follow(decoder, writings):
    """The pieces of `writings` until all are finished."""
    yield from decoder.add(writings)
    while decoder.active:
        yield from decoder.step()


def as_prompts(input_ids, tokenizer=None):
    """A prompt or several, as text, ids or a Tensor, as a list of lists of ids."""
    if hasattr(input_ids, "tolist"):
        input_ids = input_ids.tolist()
    if isinstance(input_ids, str) or (input_ids and isinstance(input_ids[0], int)):
        input_ids = [input_ids]
    prompts = []
    for prompt in input_ids:
        if isinstance(prompt, str):
            if tokenizer is None:
                raise UserError("a prompt given as text needs a tokenizer")
            prompt = tokenizer.encode(prompt)
        if not len(prompt):
            raise UserError("a prompt needs at least one token; begin with the id that ends a text, or with a new line")
        prompts.append(list(prompt))
    if not prompts:
        raise UserError("no prompt given")
    return prompts

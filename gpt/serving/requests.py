"""What a request asks for, read from its JSON: the fields of OpenAI's API and ours beside them.

Beyond OpenAI's: top_k, min_p, repetition_penalty, adapter_scale, and logprobs of /v1/completions up to 20. Fields
that would change the answer and are not offered are refused, never overlooked.
"""
import secrets
from dataclasses import dataclass

from ..errors import UserError
from ..inference.processors import Sampling
from ..inference.prompts import as_ids, conversation_ids, dialogue_stops, ends
from .errors import ServingError, wrong
from .fields import Fields, kind

MOST_LOGPROBS = 20
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Wanted:
    """A checked request: `prompts` of token ids, `n` texts for each, how to write them, and what the answer shows."""

    model: str
    adapter: str | None
    adapter_scale: float
    prompts: list
    n: int
    sampling: Sampling
    stream: bool
    include_usage: bool
    echo: bool = False


def read_completion(content, engine, config):
    """The Wanted of a body of /v1/completions. Raises ServingError."""
    fields = Fields(content)
    model, adapter, scale = _model(fields, engine)
    prompts = _prompts(fields.any("prompt"), engine)
    n = fields.integer("n", 1, 1)
    best_of = fields.integer("best_of", n, 1)
    if best_of != n:
        raise wrong("best_of", "only best_of = n is supported", "unsupported_parameter")
    _check_choices(n * len(prompts), config)
    echo = fields.boolean("echo", False)
    limit = fields.integer("max_tokens", 16, 0, config.max_new_tokens)
    if limit == 0 and not echo:
        raise wrong("max_tokens", "must be at least 1, but for echo")
    logprobs = fields.integer("logprobs", None, 0, MOST_LOGPROBS)
    stream, include_usage = _streaming(fields)
    sampling = _sampling(fields, engine, max_new_tokens=limit, logprobs=logprobs, stop_ids=ends(engine.tokenizer))
    fields.unsupported(suffix=("",))
    _finish(fields)
    for prompt in prompts:
        _check_length(len(prompt), limit, engine)
    return Wanted(model, adapter, scale, prompts, n, sampling, stream, include_usage, echo)


def read_chat(content, engine, config):
    """The Wanted of a body of /v1/chat/completions. Raises ServingError."""
    fields = Fields(content)
    model, adapter, scale = _model(fields, engine)
    prompt = conversation(fields.any("messages"), engine.tokenizer)
    n = fields.integer("n", 1, 1)
    _check_choices(n, config)
    _check_length(len(prompt), 0, engine)
    room = max(1, min(config.max_new_tokens, engine.model.config.block_size - len(prompt)))
    old = fields.integer("max_tokens", None, 1, config.max_new_tokens)
    limit = fields.integer("max_completion_tokens", old if old is not None else room, 1, config.max_new_tokens)
    _check_length(len(prompt), limit, engine)
    wanted, top = fields.boolean("logprobs", False), fields.integer("top_logprobs", None, 0, MOST_LOGPROBS)
    if top is not None and not wanted:
        raise wrong("top_logprobs", "needs logprobs = true")
    stream, include_usage = _streaming(fields)
    sampling = _sampling(fields, engine, dialogue_stops(engine.tokenizer), max_new_tokens=limit,
                         logprobs=(top or 0) if wanted else None, stop_ids=ends(engine.tokenizer))
    fields.unsupported(
        tools=([],), tool_choice=("none", "auto"), functions=([],), function_call=("none", "auto"),
        parallel_tool_calls=(True, False), response_format=({"type": "text"},), modalities=(["text"],), audio=(),
        prediction=(), web_search_options=(), reasoning_effort=("none",), verbosity=("medium",))
    _finish(fields)
    return Wanted(model, adapter, scale, [prompt], n, sampling, stream, include_usage)


def _model(fields, engine):
    """(name, adapter, scale) of the model that is asked for."""
    name = fields.text("model")
    if name is None:
        raise ServingError(400, "model: say which, one of " + ", ".join(engine.models), "missing_field", "model")
    find_adapter(name, engine)
    adapter, scale = engine.models[name], fields.number("adapter_scale", None, -10, 10)
    if scale is not None and adapter is None:
        raise wrong("adapter_scale", f"{name} has no adapter; {_with_adapters(engine)}")
    return name, adapter, 1.0 if scale is None else float(scale)


def find_adapter(name, engine):
    """The adapter that a model's name means, None for none. Raises ServingError for an unknown name."""
    if name not in engine.models:
        raise ServingError(404, f"there is no model {name[:200]!r}; this server has {', '.join(engine.models)}",
                           "model_not_found", "model")
    return engine.models[name]


def _with_adapters(engine):
    names = [name for name, adapter in engine.models.items() if adapter]
    return f"models with one: {', '.join(names)}" if names else "this server has none"


def _prompts(value, engine):
    """A prompt or several, as text or ids, as lists of ids."""
    if value is None:
        raise ServingError(400, "prompt: give a string, an array of token ids, or an array of these", "missing_field",
                           "prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and all(_is_id(item) for item in value)):
        value = [value]
    if not isinstance(value, list):
        raise wrong("prompt", f"must be a string or an array, not {kind(value)}", "invalid_type")
    if not value:
        raise wrong("prompt", "must not be empty")
    return [_ids(item, engine) for item in value]


def _ids(prompt, engine):
    if isinstance(prompt, str):
        return encode(engine.tokenizer, prompt, "prompt")
    size = engine.model.config.vocab_size
    if not isinstance(prompt, list) or not prompt or not all(_is_id(item) for item in prompt):
        raise wrong("prompt", "must hold strings or arrays of token ids", "invalid_type")
    outside = next((token for token in prompt if not 0 <= token < size), None)
    if outside is not None:
        raise wrong("prompt", f"a token id is outside the vocabulary (0 to {size - 1})")
    return prompt


def _is_id(value):
    return isinstance(value, int) and not isinstance(value, bool)


def encode(tokenizer, text, param):
    """The ids of a text, with what the model expects before it. Raises ServingError for what the vocabulary lacks."""
    try:
        return as_ids(tokenizer, text)
    except UserError as error:
        raise wrong(param, str(error)) from None


def conversation(messages, tokenizer):
    """The ids of a conversation."""
    if messages is None:
        raise ServingError(400, "messages: give the conversation so far", "missing_field", "messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "must be an array of at least one message", "invalid_type")
    read = []
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        if not isinstance(message, dict):
            raise wrong(place, f"must be an object, not {kind(message)}", "invalid_type")
        role = message.get("role")
        if role not in _ROLES:
            raise wrong(f"{place}.role", "must be one of " + ", ".join(_ROLES))
        read.append({"role": "system" if role == "developer" else role,
                     "content": _content(message.get("content"), f"{place}.content")})
    try:
        return conversation_ids(tokenizer, read)
    except UserError as error:
        raise wrong("messages", str(error)) from None


def _content(content, place):
    """A message's text; it may come in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise wrong(place, f"must be a string or an array of text parts, not {kind(content)}", "invalid_type")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong(place, 'each part must be {"type": "text", "text": "..."}: this model reads text alone')
    return "".join(part["text"] for part in content)


def _check_choices(count, config):
    most = min(config.max_choices, config.rows + config.queue)
    if count > most:
        raise wrong("n", f"{count} texts in one request; this server writes {most} at most")


def _check_length(prompt, new, engine):
    block_size = engine.model.config.block_size
    if prompt > engine.context or (engine.context < block_size and prompt + new > engine.context):
        what = f"{prompt} tokens in the prompt" + (f" and {new} to write" if new else "")
        raise ServingError(400, f"{what} are more than this server's context of {engine.context}",
                           "context_length_exceeded", "prompt")


def _streaming(fields):
    stream, options = fields.boolean("stream", False), fields.object("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise wrong("stream_options", "needs stream = true")
    include_usage = options.boolean("include_usage", False)
    options.ignore("include_obfuscation")
    options.check_all_read()
    return stream, include_usage


def _sampling(fields, engine, stops=(), **known):
    """The Sampling of a request; `stops` are the texts that end a turn of the conversation."""
    stop = fields.any("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise wrong("stop", "must be a string or an array of strings", "invalid_type")
    if len(stop) > 16 or not all(1 <= len(text) <= 1000 for text in stop):
        raise wrong("stop", "must be at most 16 texts of 1 to 1000 characters each")
    top_p = fields.number("top_p", 1.0, 0, 1)
    seed = fields.integer("seed", None, -2**63, 2**63 - 1)
    return Sampling(
        temperature=float(fields.number("temperature", 1.0, 0, 100)),
        top_p=max(float(top_p), 1e-9),  # OpenAI takes 0 for the likeliest token alone
        top_k=fields.integer("top_k", 0, 0, 2**31) or None, min_p=float(fields.number("min_p", 0.0, 0, 1)),
        repetition_penalty=float(fields.number("repetition_penalty", 1.0, 0.01, 100)),
        presence_penalty=float(fields.number("presence_penalty", 0.0, -2, 2)),
        frequency_penalty=float(fields.number("frequency_penalty", 0.0, -2, 2)),
        logit_bias=_bias(fields.any("logit_bias"), engine.model.config.vocab_size), stop=(*stop, *stops),
        seed=secrets.randbits(62) if seed is None else seed, **known)


def _bias(value, vocab_size):
    """logit_bias as {id: bias}."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong("logit_bias", f"must be an object, not {kind(value)}", "invalid_type")
    biases, fields = {}, Fields(value, "logit_bias.")
    for name in value:
        if not (name.isascii() and name.isdigit()) or not int(name[:20]) < vocab_size:
            raise wrong("logit_bias", f"{name[:100]!r} is no token id (0 to {vocab_size - 1})")
        bias = fields.number(name, None, -100, 100)
        if bias is not None:
            biases[int(name)] = float(bias)
    return biases or None


def _finish(fields):
    fields.ignore("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                  "prompt_cache_retention")
    fields.check_all_read()

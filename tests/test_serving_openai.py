"""The server as the real `openai` client sees it."""
import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
openai = pytest.importorskip("openai", reason="the client of these tests is openai's")

from serving_tools import ENDLESS, ByteTokenizer, serving, tiny_engine, writing_model  # noqa: E402

import tensorgrad as tg  # noqa: E402
from gpt.inference import generate  # noqa: E402
from gpt.inference.prompts import conversation_ids  # noqa: E402
from gpt.model.lora import set_adapters, set_scale  # noqa: E402
from gpt.text import CharTokenizer  # noqa: E402

LETTERS = "".join(chr(c) for c in range(32, 127)) + "\né"
QUESTION = [{"role": "user", "content": "how many."}]


def connect(engine):
    with serving(engine) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(adapters=("pirate",), prefill_tokens=5)


@pytest.fixture(scope="module")
def client(engine):
    yield from connect(engine)


@pytest.fixture(scope="module")
def byte_engine():
    return tiny_engine(ByteTokenizer(), prefill_tokens=3)


@pytest.fixture(scope="module")
def byte_client(byte_engine):
    yield from connect(byte_engine)


def alone(engine, prompt, adapter=None, scale=1.0, **settings):
    """The texts that the model writes by itself, called on the engine's thread, which owns it."""
    def write(model):
        return [writing.text for writing in generate(model, prompt, engine.tokenizer, **settings)]
    return engine.call(write, adapter, scale).result(20)


def logprobs_of(engine, ids):
    """(T - 1, V) float64 log-probabilities after each token but the last, by one pass without a cache."""
    def read(model):
        with tg.no_grad():
            idx = tg.tensor([ids])
            return model(idx, idx)[0][0].numpy().astype(np.float64)[:-1]
    logits = engine.call(read).result(20)
    return logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
        -1, keepdims=True)


# ---- models, completions ----

def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:pirate"]
    assert client.models.retrieve("tiny:pirate").id == "tiny:pirate"
    with pytest.raises(openai.NotFoundError, match="this server has tiny, tiny:pirate"):
        client.models.retrieve("huge")


def test_completion(client, engine):
    answer = client.completions.create(model="tiny", prompt="12 and ", max_tokens=20, seed=5, temperature=0.9)
    [choice] = answer.choices
    assert [choice.text] == alone(engine, "12 and ", max_new_tokens=20, seed=5, temperature=0.9)
    assert choice.finish_reason == "length" and choice.logprobs is None and choice.index == 0
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 20, 27)
    assert answer.object == "text_completion" and answer.model == "tiny" and answer.id.startswith("cmpl-")
    assert len(client.completions.create(model="tiny", prompt="a").choices[0].text) == 16  # OpenAI's default
    unseeded = {client.completions.create(model="tiny", prompt="a").choices[0].text for _ in range(3)}
    assert len(unseeded) == 3


@pytest.mark.parametrize("ours, asked", [
    ({"temperature": 0.0}, {"temperature": 0}), ({"temperature": 0.0}, {"temperature": 1e-9}),
    ({"temperature": 0.0}, {"top_p": 0}),
    ({"top_p": 0.7, "temperature": 1.3}, {"top_p": 0.7, "temperature": 1.3}),
    ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}), ({"frequency_penalty": 2.0}, {"frequency_penalty": 2}),
    ({"top_k": 3}, {"extra_body": {"top_k": 3}}), ({}, {"extra_body": {"top_k": 0}}),
    ({"min_p": 0.4}, {"extra_body": {"min_p": 0.4}}),
    ({"repetition_penalty": 1.7}, {"extra_body": {"repetition_penalty": 1.7}}),
    ({"logit_bias": {20: 100.0, 21: 99.0}}, {"logit_bias": {"20": 100, "21": 99}}),
], ids=str)
def test_sampling(client, engine, ours, asked):
    """Every setting arrives: the text is the library's with the same one, and not the one without."""
    asked = {"model": "tiny", "prompt": "12 and ", "max_tokens": 30, "seed": 3} | asked
    [text] = alone(engine, "12 and ", max_new_tokens=30, seed=3, **ours)
    assert client.completions.create(**asked).choices[0].text == text
    [plain] = alone(engine, "12 and ", max_new_tokens=30, seed=3)
    assert (text == plain) == (not ours)


def test_many_texts(client, engine):
    answer = client.completions.create(model="tiny", prompt=["one ", "two "], n=3, max_tokens=9, seed=4)
    assert [choice.index for choice in answer.choices] == list(range(6))
    expected = alone(engine, [engine.tokenizer.encode(p) for p in ("one ", "two ")], num_samples=3, max_new_tokens=9,
                     seed=4)
    assert [choice.text for choice in answer.choices] == expected and len(set(expected)) == 6
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 54)
    ids = engine.tokenizer.encode("two ")
    for prompt in (ids, [ids]):
        again = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, seed=4)
        assert again.choices[0].text == expected[3]
    chunks = client.completions.create(model="tiny", prompt=["one ", "two "], n=3, max_tokens=9, seed=4, stream=True)
    texts = [""] * 6
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_stop(client, engine):
    asked = {"model": "tiny", "prompt": "12 and ", "max_tokens": 40, "seed": 5}
    text = client.completions.create(**asked).choices[0].text
    stop = text[10:13]
    for how in (stop, ["never\n\n\n", stop]):
        choice = client.completions.create(**asked, stop=how, logprobs=0).choices[0]
        assert choice.text == text[:text.index(stop)] and choice.finish_reason == "stop"
        assert "".join(choice.logprobs.tokens) == choice.text
    pieces = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == text[:text.index(stop)]
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_stop_id(byte_client):
    """The id that ends a text ends the answer; it is counted but is no part of it."""
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 5, "logprobs": 1}
    answer = byte_client.completions.create(**asked, logit_bias={"256": 100})
    assert answer.choices[0].text == "" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 1 and answer.choices[0].logprobs.tokens == []
    other = byte_client.completions.create(**asked, logit_bias={"256": -100})
    assert other.choices[0].finish_reason == "length"


def test_stream(client):
    asked = {"model": "tiny", "prompt": "12 and ", "max_tokens": 20, "seed": 5}
    whole = client.completions.create(**asked, logprobs=3).choices[0]
    chunks = list(client.completions.create(**asked, logprobs=3, stream=True, stream_options={"include_usage": True}))
    assert len(chunks) == 21  # one per token, and the usage
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.text
    for field in ("tokens", "top_logprobs", "text_offset", "token_ids"):
        parts = [getattr(chunk.choices[0].logprobs, field) for chunk in chunks[:-1]]
        if field != "top_logprobs":
            assert sum(parts, []) == getattr(whole.logprobs, field)
        else:
            assert [list(top) for top in sum(parts, [])] == [list(top) for top in whole.logprobs.top_logprobs]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 19 + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1


def test_logprobs(client, engine):
    """They are the model's, before temperature and cuts, and of the prompt too where it is echoed."""
    answer = client.completions.create(model="tiny", prompt="12 and ", max_tokens=6, seed=5, temperature=0.5, echo=True,
                                       logprobs=4, extra_body={"top_k": 2})
    choice, told = answer.choices[0], answer.choices[0].logprobs
    ids = engine.tokenizer.encode(choice.text)
    assert choice.text.startswith("12 and ") and told.tokens == list(choice.text) and told.token_ids == ids
    assert told.text_offset == list(range(13)) and answer.usage.completion_tokens == 6
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    expected = logprobs_of(engine, ids)
    for i, row in enumerate(expected, 1):
        assert told.token_logprobs[i] == pytest.approx(row[ids[i]], abs=1e-4)
        best = {engine.tokenizer.decode([k]): row[k] for k in [*np.argsort(-row)[:4], ids[i]]}
        assert told.top_logprobs[i] == pytest.approx(best, abs=1e-4)


def test_echo_scores_a_text(client, engine):
    """What evaluation harnesses ask for: the log-probabilities of a text, and not a token more."""
    answer = client.completions.create(model="tiny", prompt=["12 and 3", "7"], max_tokens=0, echo=True, logprobs=1)
    first, second = answer.choices
    assert (first.text, second.text, answer.usage.completion_tokens) == ("12 and 3", "7", 0)
    assert first.finish_reason == "length" and second.logprobs.token_logprobs == [None]
    ids = engine.tokenizer.encode("12 and 3")
    expected = logprobs_of(engine, ids)[np.arange(7), ids[1:]]
    assert first.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    echo = list(client.completions.create(model="tiny", prompt="12", max_tokens=2, echo=True, stream=True))
    assert echo[0].choices[0].text == "12" and len(echo) == 3


@pytest.mark.parametrize("bias", [{"195": 100, "169": 100}, {"240": 98, "159": 99, "152": 100, "128": 99}, None],
                         ids=["two bytes", "four bytes", "any"])
def test_characters_of_several_tokens(byte_client, bias):
    """Text and tokens come together, offsets count characters, and bytes are exact."""
    for seed in range(4):
        asked = {"model": "tiny", "prompt": "é😀", "max_tokens": 25, "seed": seed, "logit_bias": bias, "logprobs": 2}
        choice = byte_client.completions.create(**asked, echo=True).choices[0]
        told = choice.logprobs
        data = b"".join(bytes(part) for part in told.bytes)
        assert choice.text == data.decode(errors="replace") and len(told.tokens) == 31
        assert told.text_offset[:6] == [0, 0, 1, 1, 1, 1]
        for i, offset in enumerate(told.text_offset):  # as many characters are certain before the token
            before = b"".join(bytes(part) for part in told.bytes[:i])
            whole = before.decode(errors="replace") if _complete(before) else before[:-_cut(before)].decode(
                errors="replace")
            assert offset == len(whole)
        text, ids = "", []
        for chunk in byte_client.completions.create(**asked, stream=True):
            text += chunk.choices[0].text
            ids += chunk.choices[0].logprobs.token_ids
            assert not chunk.choices[0].text or chunk.choices[0].logprobs.token_ids
        assert "é😀" + text == choice.text and ids == told.token_ids[6:]


class Blanks(ByteTokenizer):
    """As SentencePiece's vocabularies: the blank of the first token is not part of the text."""

    pieces = [b" " + bytes([97 + i % 26]) for i in range(256)] + [b"<|end|>"]

    def decode_bytes(self, ids):
        return super().decode_bytes(ids)[1:]


def test_tokens_whose_text_depends_on_what_precedes():
    """With and without a prompt before it, text and tokens say the same."""
    engine = tiny_engine(Blanks())
    with serving(engine) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
        asked = {"model": "tiny", "prompt": [5, 6], "max_tokens": 4, "logprobs": 1, "logit_bias": {"256": -100}}
        for echo, length in ((False, 8), (True, 11)):
            choice = client.completions.create(**asked, echo=echo).choices[0]
            assert "".join(choice.logprobs.tokens) == choice.text and len(choice.text) == length
            for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
                assert choice.text[offset:].startswith(token)


def _cut(data):
    """How many bytes at the end are the beginning of a character that may still come."""
    import codecs
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(data)
    return len(decoder.getstate()[0])


def _complete(data):
    return _cut(data) == 0


# ---- chat ----

def test_chat(client, engine):
    asked = {"model": "tiny", "messages": QUESTION, "seed": 2, "max_completion_tokens": 30}
    answer = client.chat.completions.create(**asked)
    [choice] = answer.choices
    ids = conversation_ids(engine.tokenizer, QUESTION)
    [text] = alone(engine, [ids], max_new_tokens=30, seed=2, stop=("\nUser:", "\nAssistant:"))
    assert choice.message.content == text.lstrip() and choice.message.role == "assistant"
    assert answer.usage.prompt_tokens == len(ids) and answer.object == "chat.completion"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    parts = [{"role": "user", "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "many."}]}]
    assert client.chat.completions.create(**asked | {"messages": parts}).choices[0].message == choice.message
    many = client.chat.completions.create(**asked, n=2)
    assert many.choices[0].message.content == choice.message.content != many.choices[1].message.content


def test_chat_logprobs(byte_client, byte_engine):
    asked = {"model": "tiny", "messages": QUESTION, "seed": 2, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    choice = byte_client.chat.completions.create(**asked).choices[0]
    told = choice.logprobs.content
    data = b"".join(bytes(token.bytes) for token in told)
    assert data.decode(errors="replace") == choice.message.content
    ids = conversation_ids(byte_engine.tokenizer, QUESTION)
    expected = logprobs_of(byte_engine, [*ids, *data])[len(ids) - 1:]
    for token, row in zip(told, expected, strict=True):
        assert token.logprob == pytest.approx(row[token.bytes[0]], abs=1e-4)
        best = np.argsort(-row)[:3]
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(list(row[best]), abs=1e-4)
    chunks = byte_client.chat.completions.create(**asked, stream=True)
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.bytes for token in streamed] == [token.bytes for token in told]


def test_chat_ends_where_the_turn_ends():
    """A model without a template writes a dialogue: what follows the answer is not shown."""
    tokenizer = CharTokenizer(LETTERS)
    text = "User: how many.\nAssistant: 7 of them\nUser: and so on"
    engine = tiny_engine(tokenizer, writing_model(tokenizer, text))
    with serving(engine) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        asked = {"model": "tiny", "messages": QUESTION, "max_tokens": 40, "temperature": 0, "logprobs": True}
        [choice] = client.chat.completions.create(**asked).choices
        assert choice.message.content == "7 of them" and choice.finish_reason == "stop"
        assert "".join(token.token for token in choice.logprobs.content) == "7 of them"
        [choice] = client.chat.completions.create(**asked, stop="of").choices
        assert choice.message.content == "7 "


# ---- adapters ----

def test_adapters(client, engine):
    asked = {"prompt": "12 and ", "max_tokens": 20, "temperature": 0}
    base = client.completions.create(model="tiny", **asked).choices[0].text
    pirate = client.completions.create(model="tiny:pirate", **asked).choices[0].text
    half = client.completions.create(model="tiny:pirate", **asked, extra_body={"adapter_scale": 0.5}).choices[0].text
    none = client.completions.create(model="tiny:pirate", **asked, extra_body={"adapter_scale": 0}).choices[0].text
    assert base == none and len({base, pirate, half}) == 3

    def by_hand(model):
        texts = []
        for names, scale in (([], 1), (["pirate"], 1), (["pirate"], 0.5)):
            set_adapters(model, names)
            set_scale(model, scale, "pirate")
            texts += [writing.text for writing in generate(model, "12 and ", engine.tokenizer, 20, temperature=0)]
        return texts
    model = tiny_engine(adapters=("pirate",)).model  # the same weights
    assert by_hand(model) == [base, pirate, half]
    with pytest.raises(openai.BadRequestError, match="tiny has no adapter; models with one: tiny:pirate"):
        client.completions.create(model="tiny", prompt="a", extra_body={"adapter_scale": 1})


# ---- errors ----

@pytest.mark.parametrize("changes, error, param, message", [
    ({"model": "gpt-4"}, openai.NotFoundError, "model", "there is no model 'gpt-4'"),
    ({"prompt": "Ж"}, openai.BadRequestError, "prompt", "U\\+0416"),
    ({"prompt": "a" * 97}, openai.BadRequestError, "prompt", "97 tokens in the prompt"),
    ({"prompt": [999]}, openai.BadRequestError, "prompt", "outside the vocabulary"),
    ({"temperature": -1}, openai.BadRequestError, "temperature", "between 0 and 100, not -1"),
    ({"max_tokens": -5}, openai.BadRequestError, "max_tokens", "not -5"),
    ({"n": 100}, openai.BadRequestError, "n", "16 at most"),
    ({"logit_bias": {"hello": 1}}, openai.BadRequestError, "logit_bias", "no token id"),
    ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "did you mean temperature"),
    ({"suffix": "x"}, openai.BadRequestError, "suffix", "not supported"),
], ids=lambda value: str(value)[:40])
def test_errors(client, changes, error, param, message):
    with pytest.raises(error, match=message) as found:
        client.completions.create(**{"model": "tiny", "prompt": "a"} | changes)
    assert found.value.param == param and found.value.code and found.value.type


def test_errors_of_the_server_s_state():
    """A full queue, a missing key and an end in the middle of a stream arrive as the client's own exceptions."""
    engine = tiny_engine(rows=1, queue=0, api_key="secret")
    with serving(engine) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0, timeout=60)
        stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="guess", max_retries=0, timeout=60)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        chunks = client.completions.create(model="tiny", prompt="a", max_tokens=ENDLESS, stream=True, temperature=0,
                                           extra_body={"repetition_penalty": 1.1})
        first = next(chunks)
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="tiny", prompt="a")
        assert full.value.code == "queue_full" and full.value.response.headers["retry-after"] == "1"
        engine.model.decode = lambda *args: 1 / 0  # what is computed from now on fails
        with pytest.raises(openai.APIError, match="failed at this request"):
            for _ in chunks:
                pass
        assert first.choices[0].finish_reason is None

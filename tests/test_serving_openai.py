"""The server as the real `openai` client sees it."""
import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
openai = pytest.importorskip("openai", reason="the client of these tests is openai's")

from serving_tools import serving, tiny_engine  # noqa: E402

from gpt.inference import generate  # noqa: E402


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(adapters=("pirate",))


@pytest.fixture(scope="module")
def client(engine):
    with serving(engine) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30)


def alone(engine, prompt, **settings):
    """The text that the model writes by itself."""
    [writing] = generate(engine.model, prompt, engine.tokenizer, **settings)
    return writing.text


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:pirate"]
    assert client.models.retrieve("tiny:pirate").id == "tiny:pirate"


def test_completion(client, engine):
    answer = client.completions.create(model="tiny", prompt="12 and ", max_tokens=20, seed=5, temperature=0.9)
    [choice] = answer.choices
    assert choice.text == alone(engine, "12 and ", max_new_tokens=20, seed=5, temperature=0.9)
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 20, 27)


def test_stream(client, engine):
    asked = {"model": "tiny", "prompt": "12 and ", "max_tokens": 20, "seed": 5}
    whole = client.completions.create(**asked, logprobs=3).choices[0]
    chunks = list(client.completions.create(**asked, logprobs=3, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.text
    assert sum((chunk.choices[0].logprobs.tokens for chunk in chunks[:-1]), []) == whole.logprobs.tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20

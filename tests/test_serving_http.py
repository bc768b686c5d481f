"""The server and what the network may send it: every wrong request is a 4xx in OpenAI's shape, never a 500."""
import json
import random
import socket

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
httpx = pytest.importorskip("httpx", reason="the client of these tests is httpx")

from serving_tools import serving, tiny_engine, until  # noqa: E402

from gpt.serving.run import listen  # noqa: E402

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
FINE = {COMPLETION: {"model": "tiny", "prompt": "a", "max_tokens": 2},
        CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        "/api/prompt": {"text": "ab"}, "/api/inspect": {"text": "ab"},
        "/api/attention": {"text": "ab"}, "/api/heads": {"text": "ab"}, "/api/losses": {"text": "ab"},
        "/api/alternatives": {"ids": [1, 2]}}


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(adapters=("pirate",), max_request_bytes=20000, max_new_tokens=50)


@pytest.fixture(scope="module")
def client(engine):
    with serving(engine) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def told(response):
    """The error in a response, after a look at its shape."""
    error = response.json()["error"]
    assert set(response.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"] and "\n" not in error["message"]
    return error


def post(client, path, content):
    return client.post(path, content=content, headers={"content-type": "application/json"})


# ---- bodies ----

@pytest.mark.parametrize("body, message", [
    (b"", "not JSON"), (b"{", "not JSON"), (b'{"a": 1,}', "not JSON"), (b"[]", "must be a JSON object"),
    (b"null", "must be a JSON object"), (b'"text"', "must be a JSON object"), (b'{"n": NaN}', "NaN is not JSON"),
    (b'{"n": Infinity}', "Infinity is not JSON"), (b'{"model": "\xff\xfe"}', "not UTF-8 (byte 11)"),
    (b'{"model": "\xed\xa0\x80"}', "not UTF-8"), (b'{"model": "\\ud800"}', "surrogate"),
    (b'{"\\udfff": 1}', "surrogate"), (b"[" * 15000, "nested too deeply"),
    (b'{"a":' * 3000 + b"1", "nested too deeply"), (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
    (b"\x00\x01\x02", "not JSON"),
], ids=lambda value: repr(value)[:25])
def test_malformed(client, body, message):
    for path in FINE:
        response = post(client, path, body)
        assert response.status_code == 400 and message in told(response)["message"], response.text


def test_size(client):
    """A body that is too large is refused while it comes, whatever it says about its length."""
    big = json.dumps(FINE[COMPLETION] | {"prompt": "a" * 30000}).encode()
    for content in (big, iter([big[:10000], big[10000:]])):
        response = post(client, COMPLETION, content)
        assert response.status_code == 413 and told(response)["code"] == "request_too_large"
    long = post(client, COMPLETION, json.dumps(FINE[COMPLETION] | {"prompt": "a" * 10000}))
    assert long.status_code == 400 and told(long)["code"] == "context_length_exceeded"
    chat = FINE[CHAT] | {"messages": [{"role": "user", "content": "a" * 10000}]}
    assert told(post(client, CHAT, json.dumps(chat)))["code"] == "context_length_exceeded"


def test_content_type(client):
    """What a page elsewhere may send without asking (a form, plain text) is not taken."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = client.post(COMPLETION, content=json.dumps(FINE[COMPLETION]), headers={"content-type": kind})
        assert response.status_code == 415 and told(response)
    response = client.post(COMPLETION, content=json.dumps(FINE[COMPLETION]),
                           headers={"content-type": "Application/JSON; charset=utf-8"})
    assert response.status_code == 200


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/v1/nothing", 404), ("GET", "/v1", 404), ("POST", "/v1/models", 405), ("GET", COMPLETION, 405),
    ("DELETE", CHAT, 405), ("GET", "/../../etc/passwd", 404), ("GET", "/%00", 404), ("PUT", "/metrics", 405),
    ("GET", "/v1/models/nothing", 404), ("OPTIONS", COMPLETION, 405), ("BREW", "/v1/models", 405),
])
def test_routes(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status and told(response)["code"]


def test_garbage_on_the_wire(client, engine):
    """What is no HTTP at all is turned away, and the server goes on."""
    port = client.base_url.port
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 100,
                 b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
                 b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 200000 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                assert b" 500 " not in connection.recv(65536)
            except OSError:  # it has hung up already
                pass
    assert client.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize("body", [b"Content-Length: 50\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\"mod\r\n",
                                  b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"])
def test_a_body_that_breaks_off(client, engine, caplog, body):
    """A client that goes away while it sends is no fault of the server's: no 500 is counted, no traceback logged."""
    before = dict(engine.metrics.responses)
    with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                           + body)
    until(lambda: dict(engine.metrics.responses) != before)
    assert set(engine.metrics.responses.items()) - set(before.items()) == {
        ((COMPLETION, 400), before.get((COMPLETION, 400), 0) + 1)}
    assert "Traceback" not in caplog.text and "Exception" not in caplog.text


def test_a_long_path_is_not_repeated(client):
    assert len(told(client.get("/" + "a" * 9000))["message"]) < 300


# ---- values ----

ODD = [None, True, False, 0, 1, -1, 2**31, 2**63, -2**63, 10**30, 0.5, -0.5, 1e-320, 1e308, -1e308, "", "a", "Ж", "1",
       "\x00", "😀", [], [[]], [None], [1], [-1], [10**9], ["a"], ["a", 1], [[1], "a"], [[1, "a"]], [True], {},
       {"a": 1}, {"1": "x"}, {"1": 5}, {"-1": 1}, {"١": 1}, {"1": 1e999}, {"include_usage": True}, {"type": "text"}]
NAMES = ["model", "prompt", "messages", "n", "best_of", "echo", "max_tokens", "max_completion_tokens", "logprobs",
         "top_logprobs", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
         "presence_penalty", "frequency_penalty", "logit_bias", "stop", "seed", "suffix", "adapter_scale", "tools",
         "tool_choice", "response_format", "user", "modalities", "nonsense"]
LOOKING = ["text", "ids", "messages", "adapter_scale", "layer", "head", "top", "token", "temperature", "top_k", "top_p",
           "min_p", "nonsense"]  # of the page's endpoints


@pytest.mark.parametrize("path", FINE)
def test_every_field_takes_odd_values(client, engine, path):
    """Each field with each odd value: an answer, or a 4xx that names what is wrong."""
    answers, names = 0, NAMES if path.startswith("/v1") else [*FINE[path], "model", *LOOKING]
    for name in names:
        for value in ODD:
            response = check(client, path, FINE[path] | {name: value})
            answers += response.status_code == 200
    assert (50 if path.startswith("/v1") else 0) < answers < len(names) * len(ODD) - 50
    until(lambda: engine.running == engine.waiting == 0)


def check(client, path, content):
    response = post(client, path, json.dumps(content).replace("Infinity", "1e999"))
    assert response.status_code in (200, 400, 404), (content, response.text)
    if response.status_code != 200:
        told(response)
    elif content.get("stream") is True:
        assert response.text.endswith("data: [DONE]\n\n") and "error" not in response.text
    else:
        for choice in response.json().get("choices", []):
            assert choice["finish_reason"] in ("stop", "length")
    return response


KEYS = st.sampled_from(["role", "content", "type", "text", "1", "2"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 200) | st.floats(-3, 3) | st.text(max_size=8) | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner), max_leaves=6)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(FINE)), st.dictionaries(st.sampled_from(NAMES + LOOKING), VALUES, max_size=6))
@example(CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}], "logprobs": True})
def test_fuzz_fields(client, path, changes):
    check(client, path, FINE[path] | changes)


def test_fuzz_bytes(client):
    """Requests with bytes changed, dropped and doubled."""
    rng = random.Random(0)
    for _ in range(1000):
        path = rng.choice(sorted(FINE))
        body = bytearray(json.dumps(FINE[path] | {"stop": ["é"], "stream": True}, ensure_ascii=False).encode())
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(body))
            body[at:at + rng.randrange(2)] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
        response = post(client, path, bytes(body))
        assert response.status_code in (200, 400, 404), (bytes(body), response.text)
        if response.status_code != 200:
            told(response)


def test_logits_of_any_size():
    """Extreme settings, together, on a model with extreme logits: still an answer."""
    engine = tiny_engine()
    for p in engine.model.parameters():
        p.array *= 30
    with serving(engine) as address, httpx.Client(base_url=address, timeout=60) as client:
        for extreme in ({"temperature": 1e-4, "repetition_penalty": 0.01}, {"temperature": 100, "min_p": 1},
                        {"temperature": 1e-4, "top_p": 1e-9, "top_k": 1, "repetition_penalty": 100},
                        {"logit_bias": {str(i): -100 for i in range(45)}, "temperature": 1e-4}):
            check(client, COMPLETION, FINE[COMPLETION] | extreme | {"max_tokens": 20, "logprobs": 3})


# ---- who may ask ----

def test_key():
    with serving(tiny_engine(api_key="sésame-1")) as address, httpx.Client(base_url=address, timeout=60) as client:
        for headers in ({}, {"authorization": "Bearer sesame-1"}, {"authorization": "sésame-1".encode()},
                        {"authorization": b"Basic s"}, {"authorization": b"Bearer \xff\xfe"}):
            for method, path in (("GET", "/v1/models"), ("POST", COMPLETION), ("GET", "/metrics"), ("GET", "/nothing")):
                response = client.request(method, path, headers=headers)
                assert response.status_code == 401 and told(response)["code"] == "invalid_api_key"
        good = {"authorization": "Bearer sésame-1".encode()}
        assert client.get("/v1/models", headers=good).status_code == 200
        assert client.post(COMPLETION, json=FINE[COMPLETION], headers=good).status_code == 200
        assert client.get("/health").status_code == 200


def test_hosts(client):
    """A page elsewhere whose name was made to point here is not let in."""
    for host, status in (("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost:8000", 200),
                         ("[::1]", 200), ("", 403), ("LOCALHOST", 200), ("localhost:evil", 403)):
        response = client.get("/v1/models", headers={"host": host})
        assert response.status_code == status, host
    with serving(tiny_engine(allowed_hosts="me.example, other.example")) as address:
        assert httpx.get(f"{address}/health", headers={"host": "me.example"}).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 403


def test_tokens_are_not_held_back():
    """Nagle's algorithm would keep each token for as long as the client delays its acknowledgement, 40 ms. asyncio
    turns it off for sockets that name their protocol."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_cors(client):
    origin = {"origin": "https://page.example"}
    asked = origin | {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert not [name for name in client.get("/v1/models", headers=origin).headers if name.startswith("access-")]
    assert client.options(COMPLETION, headers=asked).status_code == 405
    engine = tiny_engine(cors_origins="https://page.example", api_key="k")
    with serving(engine) as address, httpx.Client(base_url=address, timeout=60) as other:
        answer = other.options(COMPLETION, headers=asked)  # browsers send no key with it
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://page.example"
        key = {"authorization": "Bearer k"}
        assert other.get("/v1/models", headers=origin | key).headers["access-control-allow-origin"]
        stranger = other.get("/v1/models", headers=key | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers


# ---- health, metrics ----

def test_metrics():
    with serving(tiny_engine(rows=3)) as address, httpx.Client(base_url=address, timeout=60) as client:
        for _ in range(2):
            assert client.post(COMPLETION, json=FINE[COMPLETION] | {"max_tokens": 7}).status_code == 200
        client.post(COMPLETION, json={})
        client.get("/made/up/path")
        lines = client.get("/metrics").text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert values["gpt_tokens_total"] == "14" and values["gpt_rows"] == "3" and values["gpt_texts_running"] == "0"
        assert values['gpt_responses_total{path="/v1/completions",status="200"}'] == "2"
        assert values['gpt_responses_total{path="/v1/completions",status="400"}'] == "1"
        assert values['gpt_responses_total{path="other",status="404"}'] == "1"
        assert values['gpt_first_token_seconds_bucket{le="+Inf"}'] == values["gpt_first_token_seconds_count"] == "2"
        assert float(values["gpt_step_seconds_sum"]) > 0
        buckets = [int(value) for name, value in values.items() if name.startswith("gpt_step_seconds_bucket")]
        assert buckets == sorted(buckets) and buckets[0] <= buckets[-2] == buckets[-1] > 0  # each up to its bound
        kinds = [line.split()[2] for line in lines if line.startswith("# TYPE")]
        assert len(kinds) == len(set(kinds)) and all(any(name.startswith(k) for name in values) for k in kinds)
        health = client.get("/health").json()
        assert health == {"status": "ok", "model": "tiny", "running": 0, "waiting": 0, "rows": 3}

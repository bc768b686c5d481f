"""The engine under a server: who waits, who is sent away, who goes away, and what happens when something breaks."""
import gc
import json
import socket
import struct
import threading
import time
from functools import partial

import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
httpx = pytest.importorskip("httpx", reason="the client of these tests is httpx")

from serving_tools import ENDLESS, LETTERS, events, read, send, serving, tiny_engine, tiny_model, until  # noqa: E402

from gpt.errors import UserError  # noqa: E402
from gpt.inference import Sampling, Writing, generate  # noqa: E402
from gpt.serving.engine import Ticket  # noqa: E402
from gpt.serving.errors import ServingError  # noqa: E402
from gpt.text import CharTokenizer  # noqa: E402

post = partial(httpx.post, timeout=60)
SHORT = {"model": "tiny", "prompt": "12 and ", "max_tokens": 12, "seed": 1}
LONG = SHORT | {"max_tokens": ENDLESS, "stream": True}


# ---- going away ----

@pytest.mark.parametrize("how", ["closed", "reset", "half closed"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_away_frees_its_row(how, stream):
    engine = tiny_engine(rows=1)
    with serving(engine) as address:
        for _ in range(3):
            before = engine.metrics.cancelled
            connection = send(address, LONG | {"stream": stream})
            if stream:
                assert b"data: " in read(connection, b"data: ")
            until(lambda: engine.running == 1)
            if how == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if how == "half closed":
                connection.shutdown(socket.SHUT_WR)
            else:
                connection.close()
            until(lambda: engine.running == 0)
            assert engine.metrics.cancelled == before + 1
            connection.close()
        assert post(f"{address}/v1/completions", json=SHORT).json()["choices"][0]["finish_reason"] == "length"


def test_a_client_that_goes_away_while_it_waits():
    engine = tiny_engine(rows=1, queue=2)
    with serving(engine) as address:
        first = send(address, LONG)
        read(first, b"data: ")
        waiting = send(address, LONG)
        until(lambda: engine.waiting == 1)
        waiting.close()
        until(lambda: engine.waiting == 0)
        assert engine.running == 1
        first.close()
        until(lambda: engine.running == 0)
        unfinished = send(address, SHORT)  # the body never ends
        unfinished.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
        unfinished.close()
        assert httpx.get(f"{address}/health").json()["status"] == "ok"


def test_a_client_that_does_not_read():
    """It can not hold up anybody: its row is free when its text is written, and others are served meanwhile."""
    engine = tiny_engine(rows=2)
    with serving(engine) as address:
        connection = send(address, SHORT | {"max_tokens": 600, "stream": True, "logprobs": 20})
        text = post(f"{address}/v1/completions", json=SHORT, timeout=20).json()["choices"][0]["text"]
        assert len(text) == 12
        until(lambda: engine.running == 0)
        assert events(read(connection))[-1] == "[DONE]"
        connection.close()


# ---- room and time ----

def test_a_full_queue():
    engine = tiny_engine(rows=1, queue=1)
    with serving(engine) as address:
        connections = [send(address, LONG) for _ in range(2)]
        until(lambda: engine.running == 1 and engine.waiting == 1)
        for content in (SHORT, SHORT | {"stream": True}):
            answer = post(f"{address}/v1/completions", json=content)
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["type"] == "rate_limit_error"
        assert post(f"{address}/v1/completions", json=SHORT | {"n": 3}).status_code == 400  # never has room
        for connection in connections:
            connection.close()
        until(lambda: engine.running == engine.waiting == 0)
        assert post(f"{address}/v1/completions", json=SHORT | {"n": 2}).status_code == 200
        assert engine.metrics.refused == 2


def test_time_is_limited():
    with serving(tiny_engine(rows=1, timeout=1.0)) as address:
        began = time.monotonic()
        running = send(address, LONG)
        read(running, b"data: ")
        waiting = post(f"{address}/v1/completions", json=LONG | {"stream": False}, timeout=20)
        assert waiting.status_code == 504 and waiting.json()["error"]["code"] == "timeout"
        told = events(read(running))
        assert json.loads(told[-2])["error"]["code"] == "timeout" and told[-1] == "[DONE]"
        assert time.monotonic() - began < 20
        assert post(f"{address}/v1/completions", json=SHORT).status_code == 200


def test_context():
    """Below block_size it bounds prompt and answer together."""
    with serving(tiny_engine(context=20)) as address:
        for tokens, status in ((13, 200), (14, 400)):
            answer = post(f"{address}/v1/completions", json=SHORT | {"max_tokens": tokens})
            assert answer.status_code == status, answer.text


# ---- company ----

def test_texts_do_not_depend_on_their_company():
    """Prompts of all lengths, seeds and adapters at once, each the text that it is alone."""
    engine = tiny_engine(adapters=("pirate", "legal"), rows=4, prefill_tokens=40)
    wanted = [{"model": ["tiny", "tiny:pirate", "tiny:legal"][i % 3], "prompt": "12 and "[:1 + i % 7] * (1 + i % 3),
               "seed": i, "max_tokens": 5 + 7 * (i % 5), "n": 1 + i % 2, "temperature": [0, 1, 1.5][i % 3]}
              for i in range(24)]
    with serving(engine) as address:
        def ask(content):
            answer = post(f"{address}/v1/completions", json=content, timeout=60)
            assert answer.status_code == 200, answer.text
            return [choice["text"] for choice in answer.json()["choices"]]

        alone = [ask(content) for content in wanted]
        found = [None] * len(wanted)

        def work(i):
            found[i] = ask(wanted[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(wanted))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == alone
        assert len(engine._decoders) <= 5  # no memory is kept for every adapter and scale there ever was
        for scale in range(12):
            ask(SHORT | {"model": "tiny:pirate", "adapter_scale": scale / 4, "max_tokens": 1})
        assert len(engine._decoders) <= 5


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_long_prompts_are_read_in_parts(position):
    """Others go on meanwhile, every text is what it is alone, and what two prompts begin with is read once."""
    tokenizer = CharTokenizer(LETTERS)
    model = tiny_model(tokenizer, block_size=400, position=position)
    engine = tiny_engine(tokenizer, model, rows=3, prefill_tokens=16)
    long = "".join(LETTERS[i * i % 40] for i in range(300))
    wanted = [long, long[:200] + "and so on", "12 and ", long + " x"]
    alone = [generate(model, prompt, tokenizer, 20, seed=i, temperature=0.7)[0].text for i, prompt in enumerate(wanted)]
    shapes, decode = [], model.decode
    model.decode = lambda idx, step: shapes.append(tuple(idx.shape)) or decode(idx, step)
    asked = [{"model": "tiny", "prompt": prompt, "max_tokens": 20, "seed": i, "temperature": 0.7}
             for i, prompt in enumerate(wanted)]
    with serving(engine) as address, httpx.Client(base_url=address, timeout=30) as client:
        running = send(address, LONG | {"max_tokens": 300})
        beginning = read(running, b"data: ")
        texts = [client.post("/v1/completions", json=content).json()["choices"][0]["text"] for content in asked]
        assert texts == alone
        first = [i for i, shape in enumerate(shapes) if shape == (1, 16)]
        assert len(first) == 300 // 16  # the others' beginnings are known from the first
        between = shapes[first[0]:first[-1]]
        assert between.count((1, 1)) >= 10  # the text that was being written
        assert b"[DONE]" in beginning + read(running)
        both = client.post("/v1/completions", json=asked[0] | {"n": 2}).json()["choices"]
        assert both[0]["text"] == alone[0]
        echo = client.post("/v1/completions", json=asked[0] | {"max_tokens": 0, "echo": True}).json()["choices"][0]
        assert echo["text"] == long
        client.post("/v1/completions", json=asked[0] | {"max_tokens": 150})  # past block_size
        assert client.post("/v1/completions", json=asked[0]).json()["choices"][0]["text"] == alone[0]
        leaving = send(address, asked[3] | {"prompt": long[::-1]})  # goes away while its prompt is read
        leaving.close()
        until(lambda: engine.running == engine.waiting == 0)
        assert [client.post("/v1/completions", json=content).json()["choices"][0]["text"] for content in asked] == alone
        assert max(shape[1] for shape in shapes) == 16


def test_nothing_is_kept():
    """Requests that are over, however they ended, leave no texts behind."""
    engine = tiny_engine(rows=2)
    with serving(engine) as address:
        for i in range(12):
            connection = send(address, (SHORT, LONG)[i % 2] | {"stream": i % 3 > 0, "logprobs": 2})
            read(connection, b"data: " if i % 2 and i % 3 else b"}") if not i % 2 or i % 3 else None
            connection.close()
        until(lambda: engine.running == engine.waiting == 0)
        until(lambda: not gc.collect() and not [o for o in gc.get_objects() if type(o) in (Writing, Ticket)])


def test_several_are_written_in_one_step():
    engine = tiny_engine(rows=4)
    with serving(engine) as address:
        before = engine.metrics.steps
        post(f"{address}/v1/completions", json=SHORT | {"max_tokens": 20, "n": 4, "prompt": ["a"]})
        assert engine.metrics.tokens == 80 and engine.metrics.steps - before == 20


# ---- faults ----

def test_a_fault_is_told_and_the_server_goes_on(monkeypatch, caplog):
    engine = tiny_engine(adapters=("pirate",))
    with serving(engine) as address:
        expected = post(f"{address}/v1/completions", json=SHORT).json()["choices"]
        decode, broken = engine.model.decode, threading.Event()

        def fail(*args):
            if broken.is_set() and engine._selected == ("pirate", 1.0):
                raise MemoryError("no room")
            return decode(*args)

        monkeypatch.setattr(engine.model, "decode", fail)
        base = send(address, LONG | {"max_tokens": 300})
        pirate = send(address, LONG | {"model": "tiny:pirate"})
        read(pirate, b"data: ")
        broken.set()
        told = events(read(pirate))
        assert json.loads(told[-2])["error"]["type"] == "server_error" and told[-1] == "[DONE]"
        answer = post(f"{address}/v1/completions", json=SHORT | {"model": "tiny:pirate"})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
        assert "no room" not in answer.text and "no room" in caplog.text
        broken.clear()
        assert json.loads(events(read(base))[-2])["choices"][0]["finish_reason"] == "length"
        assert post(f"{address}/v1/completions", json=SHORT).json()["choices"] == expected
        assert post(f"{address}/v1/completions", json=SHORT | {"model": "tiny:pirate"}).status_code == 200


def test_an_engine_that_fails_says_so(monkeypatch, caplog):
    """Nobody waits for an answer that never comes, and who watches /health can start the server anew."""
    engine = tiny_engine()
    with serving(engine) as address:
        running = send(address, LONG)
        read(running, b"data: ")
        monkeypatch.setattr(engine, "_admit", lambda: 1 / 0)
        assert json.loads(events(read(running))[-2])["error"]["type"] == "server_error"
        assert httpx.get(f"{address}/health").status_code == 503 and "division" in caplog.text
        assert post(f"{address}/v1/completions", json=SHORT).status_code == 503


def test_calls():
    """Anything else the model is wanted for is done between two steps, with the adapter that is asked for."""
    engine = tiny_engine(adapters=("pirate",), rows=1)
    engine.start()
    from gpt.model.lora import active_adapters, parts
    told = []
    engine.submit([Writing([1, 2], Sampling(max_new_tokens=ENDLESS, seed=1))], told.append)
    assert engine.call(active_adapters).result(5) == []
    assert engine.call(active_adapters, "pirate", 0.25).result(5) == ["pirate"]
    assert engine.call(lambda model: parts(model, "pirate")[0].strength, "pirate", 0.25).result(5) == 0.25
    with pytest.raises(UserError, match="mine"):
        engine.call(lambda model: (_ for _ in ()).throw(UserError("mine"))).result(5)
    assert engine.running == 1  # all the while
    engine.stop()
    assert isinstance(told[-1], ServingError) and told[-1].status == 503
    with pytest.raises(ServingError, match="shutting down"):
        engine.call(active_adapters)


# ---- stopping ----

def test_stopping_finishes_or_tells():
    engine = tiny_engine(rows=2)
    engine.start()
    told = {name: [] for name in ("short", "long", "waiting")}
    tickets = {name: engine.submit([Writing([1, 2], Sampling(max_new_tokens=tokens, seed=1))], told[name].append)
               for name, tokens in (("short", 20), ("long", ENDLESS), ("waiting", 5))}
    until(lambda: engine.running == 2 and told["short"])
    engine.drain(1.5)
    with pytest.raises(ServingError, match="shutting down"):
        engine.submit([Writing([1])], print)
    until(lambda: told["waiting"])
    assert told["waiting"][-1].code == "shutting_down" and not engine.healthy
    until(lambda: isinstance(told["long"][-1], ServingError))
    assert told["short"][-1][-1].finish_reason == "length"
    until(lambda: not engine._thread.is_alive())
    engine.stop()
    assert not any(ticket.open for ticket in tickets.values())


def test_a_cancelled_ticket_hears_nothing_more():
    engine = tiny_engine()
    engine.start()
    told = []
    ticket = engine.submit([Writing([1, 2], Sampling(max_new_tokens=ENDLESS), i) for i in range(3)], told.append)
    until(lambda: engine.running == 3 and told)
    ticket.cancel()
    count = len(told)
    until(lambda: engine.running == 0)
    assert len(told) <= count + 1
    engine.stop()

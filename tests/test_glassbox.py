"""What the page asks the server for: the endpoints of gpt/serving/glassbox.py against gpt.inspect, and their errors."""
import json

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
httpx = pytest.importorskip("httpx", reason="the client of these tests is httpx")

from serving_tools import ByteTokenizer, serving, tiny_engine, tiny_model  # noqa: E402

from gpt.inspect import attention_map, inspect_text, next_tokens, text_losses  # noqa: E402
from gpt.model.lora import set_adapters, set_scale  # noqa: E402
from gpt.serving.config import ServeConfig  # noqa: E402
from gpt.serving.glassbox import MAX_LOOK, MAX_TOKENS, token_texts  # noqa: E402
from gpt.serving.watch import run_since, watched  # noqa: E402

TEXT = "Größe 😀 of a text"
BYTES = ByteTokenizer()


def lively():
    """As the server's model, but our own."""
    return tiny_model(BYTES, adapters=("pirate",))


@pytest.fixture(scope="module")
def client():
    engine = tiny_engine(BYTES, tiny_model(BYTES, adapters=("pirate",)), max_request_bytes=50_000)
    with serving(engine) as address, httpx.Client(base_url=address, timeout=30) as client:
        yield client


def ask(client, path, **fields):
    response = client.post(f"/api/{path}", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_model_and_page(client):
    told = client.get("/api/model").json()
    assert told["models"] == {"tiny": None, "tiny:pirate": "pirate"} and told["run"] is None
    assert (told["n_layer"], told["n_head"], told["vocab_size"], told["block_size"]) == (2, 2, 257, 96)
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8" and page.text.startswith("<!doctype html>")
    assert "src=" not in page.text and "@import" not in page.text and "url(" not in page.text
    missing = client.get("/api/run")
    assert missing.status_code == 404 and "--run_dir" in missing.json()["error"]["message"]


def test_inspect_attention_heads(client):
    model, ids = lively(), BYTES.encode(TEXT)
    told, seen = ask(client, "inspect", text=TEXT, top=3), inspect_text(model, BYTES, TEXT, top=3)
    assert told["ids"] == ids and "".join(told["pieces"]) == TEXT and len(told["pieces"]) == len(ids)
    np.testing.assert_allclose(told["losses"], seen.losses, rtol=1e-5)
    assert told["ranks"] == seen.ranks and told["skipped"] == 0
    np.testing.assert_allclose([[[(i, p) for _, p, i in said] for said in layer] for layer in told["lens"]],
                               seen.lens, atol=1e-6)
    for layer, head in ((None, None), (1, 0), (0, None), (None, 1)):
        rows = ask(client, "attention", ids=ids, layer=layer, head=head)["rows"]
        assert [len(row) for row in rows] == list(range(1, len(ids) + 1))
        expected = attention_map(model, ids, layer, head)
        for i, row in enumerate(rows):
            np.testing.assert_allclose(row, expected[i, :i + 1], atol=1e-6)
    small = np.array(ask(client, "heads", text=TEXT * 2)["heads"])                 # 46 tokens: 2 to a cell
    maps = np.array(inspect_text(model, BYTES, TEXT * 2).attention)
    count = len(BYTES.encode(TEXT * 2))
    assert small.shape == (2, 2, -(-count // 2), -(-count // 2))
    assert small[1, 0, 3, 1] == round(255 * float(maps[1][0][6:8, 2:4].max()))
    long = ask(client, "inspect", text="x" * 100 + "end")
    assert (len(long["ids"]), long["skipped"]) == (96, 7) and 96 < MAX_LOOK
    assert client.post("/api/attention", json={"ids": ids, "layer": 2}).status_code == 400


def test_losses(client):
    model, text = lively(), TEXT * 9
    told = ask(client, "losses", text=text)
    losses, ranks, starts = text_losses(model, BYTES.encode(text))
    np.testing.assert_allclose(told["losses"], losses, rtol=1e-5)
    assert (told["ranks"], told["starts"], "".join(told["pieces"])) == (ranks, starts, text) and max(starts) > 0
    refused = client.post("/api/losses", json={"text": "x" * (MAX_TOKENS + 1)})
    assert refused.status_code == 400 and "at most 2,048" in refused.json()["error"]["message"]


def test_alternatives_of_adapters(client):
    model, ids = lively(), BYTES.encode(TEXT)
    found = []
    for name, scale, active in (("tiny", 1.0, []), ("tiny:pirate", 1.0, ["pirate"]), ("tiny:pirate", 0.3, ["pirate"]),
                                ("tiny", 1.0, [])):
        settings = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05}
        told = ask(client, "alternatives", ids=ids, model=name, adapter_scale=scale, token=65, top=5, **settings)
        set_adapters(model, active)
        set_scale(model, scale, "pirate")
        seen = next_tokens(model, ids, token=65, top=5, **settings)
        assert [token["id"] for token in told["tokens"]] == [i for i, *_ in seen.tokens]
        assert [token["cut"] for token in told["tokens"]] == [cut for *_, cut in seen.tokens]
        np.testing.assert_allclose([(t["p"], t["drawn"]) for t in told["tokens"]],
                                   [(p, drawn) for _, p, drawn, _ in seen.tokens], rtol=1e-4, atol=1e-7)
        assert (told["kept"], told["rank"]) == (seen.kept, seen.rank)
        found.append(told["tokens"][-1]["p"])
    assert found[0] == found[3] and len({round(p, 9) for p in found}) == 3


def test_prompt(client):
    assert ask(client, "prompt", text="abc") == {"ids": [97, 98, 99], "skipped": 0, "forgotten": 0, "stop": []}
    assert ask(client, "prompt", text="")["ids"] == [BYTES.eot_id]
    assert ask(client, "prompt", text="x" * 200)["skipped"] == 104
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(4) for role in ("user", "assistant")]
    told = ask(client, "prompt", messages=[*turns, {"role": "user", "content": "now"}])
    assert BYTES.decode(told["ids"]).endswith("User: now\nAssistant:") and len(told["ids"]) <= 64
    assert told["forgotten"] == 6 and "assistant 3" in BYTES.decode(told["ids"])
    assert told["stop"] == ["\nUser:", "\nAssistant:"]


@pytest.mark.parametrize("path, fields, says", [
    ("inspect", {}, "text"), ("inspect", {"text": "a", "ids": [1]}, "text"), ("inspect", {"ids": []}, "ids"),
    ("inspect", {"ids": [257]}, "ids"), ("inspect", {"ids": [True]}, "ids"), ("inspect", {"ids": "abc"}, "ids"),
    ("inspect", {"text": 3}, "text"), ("inspect", {"text": "a", "top": 0}, "top"),
    ("inspect", {"text": "a", "topp": 3}, "topp"), ("attention", {"text": "a", "head": -1}, "head"),
    ("attention", {"text": "a", "head": 0.5}, "head"), ("alternatives", {"ids": [1], "temperature": -1}, "temperature"),
    ("alternatives", {"ids": [1], "token": 300}, "token"), ("alternatives", {"ids": [1], "top_k": "x"}, "top_k"),
    ("prompt", {"messages": 3}, "messages"), ("prompt", {"messages": [{"role": "x"}]}, "messages"),
    ("losses", {"text": "a", "model": "other"}, "other"),
    ("heads", {"text": "a", "adapter_scale": 1e9}, "adapter_scale"),
])
def test_errors(client, path, fields, says):
    response = client.post(f"/api/{path}", json=fields)
    error = response.json()["error"]
    assert 400 <= response.status_code < 500 and says in error["message"] and "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert client.post(f"/api/{path}", content=b"{").status_code == 415


def test_token_texts():
    """Joined they are the text; a character of several tokens is with the last of them."""
    ids = BYTES.encode("aß😀") + [256]
    assert token_texts(BYTES, ids) == ["a", "", "ß", "", "", "", "😀", "<|end|>"]


def test_run_since(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = run_since(tmp_path)
    assert (first["records"], first["reset"], first["more"]) == ([], False, False)
    assert first["samples"] is first["max_iters"] is first["age"] is None

    def line(i):
        return json.dumps({"iter": i, "loss": 1 / (i + 1)}) + "\n"

    path.write_text(line(0) + line(1) + line(2)[:5])
    one = run_since(tmp_path, first["mark"])
    assert [r["iter"] for r in one["records"]] == [0, 1] and 0 <= one["age"] < 60
    with path.open("a") as file:
        file.write(line(2)[5:] + "broken\n" + line(3))
    (tmp_path / "samples.txt").write_text("".join(f"--- iteration {i}\ntext {i}\n" for i in range(12)))
    two = run_since(tmp_path, one["mark"])
    assert [r["iter"] for r in two["records"]] == [2, 3] and not two["reset"]
    assert two["samples"][-1] == {"iter": 11, "text": "text 11\n"} and len(two["samples"]) == 10
    three = run_since(tmp_path, two["mark"])
    assert (three["records"], three["samples"], three["more"], three["mark"]) == ([], None, False, two["mark"])
    new = tmp_path / "new"  # a resumed run writes the file anew; it may even be longer than before
    new.write_text("".join(map(line, range(9))))
    new.replace(path)
    four = run_since(tmp_path, three["mark"])
    assert four["reset"] and len(four["records"]) == 9 and len(four["samples"]) == 10
    path.write_text(line(5))
    assert run_since(tmp_path, four["mark"])["reset"]
    for nonsense in ("x", "1-2", "9" * 99 + "-1-1", "1-9999999-3"):
        assert [r["iter"] for r in run_since(tmp_path, nonsense)["records"]] == [5]


def test_long_metrics_come_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt.serving.watch.MAX_CHUNK", 100)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"iter": i}) + "\n" for i in range(50)))
    mark, found, more = "", [], True
    while more:
        told = run_since(tmp_path, mark)
        mark, more = told["mark"], told["more"]
        found += [record["iter"] for record in told["records"]]
    assert found == list(range(50))


def test_watched(tmp_path):
    assert watched(ServeConfig(init_from=str(tmp_path))) is None
    (tmp_path / "metrics.jsonl").write_text("")
    assert watched(ServeConfig(init_from=str(tmp_path))) == tmp_path
    assert watched(ServeConfig(init_from="elsewhere", run_dir=str(tmp_path))) == tmp_path

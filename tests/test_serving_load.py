"""64 clients at once: no error but 429, no mixed-up text, and memory that stays flat.

    GPT_LOAD_SECONDS=60 python -m pytest -q -s tests/test_serving_load.py       # by default a few seconds
"""
import asyncio
import json
import os
import random
import time
from collections import Counter

import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
httpx = pytest.importorskip("httpx", reason="the client of these tests is httpx")

from serving_tools import Program, make_run, until  # noqa: E402

from gpt.inference import generate  # noqa: E402
from gpt.interop.peft import load_peft  # noqa: E402
from gpt.model.lora import set_adapters  # noqa: E402
from gpt.training.checkpoints import load_run  # noqa: E402

SECONDS, CLIENTS = float(os.environ.get("GPT_LOAD_SECONDS", 6)), 64


def requests():
    """Different prompts, lengths, seeds and adapters."""
    return [{"model": ["out", "out", "out:pirate"][i % 3], "prompt": f"{i} and {i * 7 % 40} make"[:4 + i % 11],
             "seed": i, "max_tokens": 4 + i * 5 % 56, "temperature": [1.0, 0.0, 1.3][i % 3], "stream": True}
            for i in range(48)]


def alone(folder, wanted):
    """The text of each request, by the library, one at a time."""
    model, tokenizer, _ = load_run(folder / "out")
    load_peft(model, folder / "pirate", "pirate")
    texts = []
    for content in wanted:
        set_adapters(model, ["pirate"] if content["model"] == "out:pirate" else [])
        [writing] = generate(model, content["prompt"], tokenizer, content["max_tokens"], seed=content["seed"],
                             temperature=content["temperature"])
        texts.append(writing.text)
    return texts


async def one_client(number, http, wanted, texts, end, counts):
    """Ask again and again; every seventh client also goes away in the middle of texts."""
    rng = random.Random(number)
    while time.monotonic() < end:
        i = rng.randrange(len(wanted))
        leaves = number % 7 == 0 and rng.random() < 0.5
        text = ""
        async with http.stream("POST", "/v1/completions", json=wanted[i]) as answer:
            counts[answer.status_code] += 1
            if answer.status_code == 429:
                await answer.aread()
                await asyncio.sleep(rng.random() / 5)
                continue
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    text += event["choices"][0]["text"]
                    if leaves and len(text) > 3:
                        break
        assert texts[i].startswith(text) if leaves else text == texts[i], (wanted[i], text, texts[i])
        counts["left" if leaves else "texts"] += 1


def memory(pid):
    """Resident memory of a process in MiB."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc, which Linux has")
def test_many_clients(tmp_path):
    folder = make_run(tmp_path).parent
    wanted = requests()
    texts = alone(folder, wanted)
    assert len(set(texts)) > 40
    program = Program("--init_from=out", "--adapters=pirate=pirate", "--rows=16", "--queue=16", folder=folder)
    counts, sizes = Counter(), []

    async def measure(end):
        while time.monotonic() < end:
            sizes.append(memory(program.process.pid))
            await asyncio.sleep(SECONDS / 40)

    async def all_clients():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=program.address, timeout=60, limits=limits) as http:
            began = time.monotonic()  # a turn of everybody warms the server up
            await asyncio.gather(*(one_client(i, http, wanted, texts, began + 0.1, Counter()) for i in range(CLIENTS)))
            end = time.monotonic() + SECONDS
            clients = [one_client(i, http, wanted, texts, end, counts) for i in range(CLIENTS)]
            await asyncio.gather(measure(end), *clients)

    try:
        asyncio.run(all_clients())

        def health():
            return httpx.get(f"{program.address}/health", timeout=60).json()

        until(lambda: (health()["running"], health()["waiting"]) == (0, 0))
    finally:
        program.process.terminate()
        code, _, err = program.end()
    assert (code, err) == (0, "")
    early, late = max(sizes[:5]), max(sizes[-5:])
    print(f"\n{CLIENTS} clients, {SECONDS:g} s: {dict(counts)}; memory {early:.1f}, at the end {late:.1f} MiB")
    assert counts["texts"] >= 20 and counts["left"] > 0 and counts[429] > 0
    assert set(counts) <= {200, 429, "texts", "left"}
    assert late < early + 6

"""Servers on loopback with tiny random models, in a thread or as a process, for the tests of gpt.serving."""
import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_run import environment, tiny_config, tiny_trainer

import tensorgrad as tg
from gpt.interop.peft import save_peft
from gpt.model import GPT, GPTConfig
from gpt.model.lora import LoRAConfig, inject, parts, set_adapters
from gpt.text import CharTokenizer
from gpt.text.tokenizers.base import Tokenizer
from gpt.training.checkpoints import load_run, save_best, start_run

ROOT = Path(__file__).resolve().parents[1]

ENDLESS = 1_000_000  # tokens: minutes, so that nothing ends by itself, however slowly a test goes
LETTERS = "".join(sorted(set("abcdefghijklmnopqrstuvwxyz0123456789 .,\nUserAssistant:é😀")))


class ByteTokenizer(Tokenizer):
    """One id per byte, and <|end|>: texts whose characters take several tokens."""

    kind = name = "bytes"
    vocab_size = 257
    special_tokens = {"<|end|>": 256}
    eos_id = eot_id = 256
    pieces = [bytes([i]) for i in range(256)] + [b"<|end|>"]

    def _encode_ordinary(self, text):
        import numpy as np
        return np.frombuffer(text.encode(), np.uint8)

    def to_json(self):
        return {"kind": self.kind}

    @classmethod
    def from_json(cls, description):
        return cls()

    def hugging_face_json(self):
        return {}


def tiny_model(tokenizer, block_size=96, adapters=(), seed=1, **changes):
    """A random model whose choices are far from even, with adapters that say something else."""
    tg.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32} | changes
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=block_size, **shape)).eval()
    with tg.no_grad():
        for p in model.parameters():
            p.add_(tg.randn(*p.shape) * 0.15)
        for name in adapters:
            inject(model, LoRAConfig(r=2), name)
            for part in parts(model, name):
                part.lora_B.add_(tg.randn(*part.lora_B.shape))
    set_adapters(model, [])
    return model


def writing_model(tokenizer, text):
    """A model that goes on with `text` whatever it reads: what it says depends on the position alone."""
    ids = tokenizer.encode(text)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=len(ids), n_layer=1, n_head=1, n_embd=len(ids),
                          tie_weights=False)).eval()
    with tg.no_grad():
        for name, p in model.named_parameters():
            if "c_proj" in name or "wte" in name or "lm_head" in name:
                p.zero_()
        model.transformer.wpe.weight.copy_(tg.eye(len(ids)))
        for position, token in enumerate(ids[1:]):
            model.lm_head.weight[token, position] = 10.0
    return model


def tiny_engine(tokenizer=None, model=None, adapters=(), **settings):
    """An Engine, not started."""
    from gpt.serving.config import ServeConfig
    from gpt.serving.engine import Engine

    tokenizer = tokenizer or CharTokenizer(LETTERS)
    settings = {"max_new_tokens": ENDLESS} | settings
    return Engine(model or tiny_model(tokenizer, adapters=adapters), tokenizer, ServeConfig(**settings), "tiny")


@contextmanager
def serving(engine, drain=2.0):
    """The address of a real server in a thread of its own."""
    import uvicorn

    from gpt.serving.app import create_app
    from gpt.serving.run import listen, warm_up

    warm_up(engine.model)
    listener = listen("127.0.0.1", 0)
    settings = uvicorn.Config(create_app(engine, engine.config), log_level="warning", lifespan="on",
                              timeout_graceful_shutdown=5)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition, seconds=60):
    """Wait until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ---- a server as a process ----

def make_run(folder):
    """`folder`/out, a run with weights as they begin, and `folder`/pirate, an adapter for it that says something
    else."""
    config = tiny_config(folder, max_iters=3, block_size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORGRAD_CACHE", str(folder / "cache"))
        trainer = tiny_trainer(config)
    start_run(config.out_dir, config, trainer.dataset.tokenizer)
    save_best(config.out_dir, trainer.model)
    model, *_ = load_run(config.out_dir)
    inject(model, LoRAConfig(r=2))
    with tg.no_grad():
        for part in parts(model):
            part.lora_B.add_(tg.randn(*part.lora_B.shape))
    save_peft(model, folder / "pirate", base=config.out_dir)
    return folder / "out"


class Program:
    """scripts/serve.py as a process; `address` once it serves."""

    def __init__(self, *arguments, folder, **variables):
        command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--port=0", *map(str, arguments)]
        self.process = subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env=environment(folder) | variables)
        self.first_line = self.process.stdout.readline()
        self.address = re.search(r"http://\S+", self.first_line)[0]

    def end(self):
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


# ---- a client made by hand, for what real ones do not do ----

def send(address, content, path="/v1/completions"):
    """A connection on which a request was sent, by hand: what it does next is up to the test."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    body = json.dumps(content).encode()
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                       f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def read(connection, until_text=b"0\r\n\r\n"):
    data = b""
    while until_text not in data:
        part = connection.recv(65536)
        if not part:
            break
        data += part
    return data


def events(data):
    """The data of server-sent events in a raw answer."""
    return [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]

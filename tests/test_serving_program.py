"""scripts/serve.py: a process that serves a run folder, is stopped by signals, and every wrong input."""
import json
import os
import re
import signal
import time
import tomllib

import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
httpx = pytest.importorskip("httpx", reason="the client of these tests is httpx")

from serving_tools import ENDLESS, ROOT, Program, events, make_run, read, send, until  # noqa: E402

from gpt import cli  # noqa: E402
from gpt.errors import UserError  # noqa: E402
from gpt.interop.peft import save_peft  # noqa: E402
from gpt.model.lora import LoRAConfig, inject  # noqa: E402
from gpt.serving.config import ServeConfig  # noqa: E402
from gpt.serving.run import complete, listen, open_engine  # noqa: E402
from gpt.training.checkpoints import load_run  # noqa: E402

SHORT = {"model": "out", "prompt": "1 and 2", "max_tokens": 8, "seed": 1}
LONG = SHORT | {"max_tokens": ENDLESS, "stream": True}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def start(run_folder):
    programs = []

    def start(*arguments, **variables):
        programs.append(Program("--init_from", run_folder, *arguments, folder=run_folder.parent, **variables))
        return programs[-1]

    yield start
    for program in programs:
        if program.process.poll() is None:
            program.process.kill()
            program.process.communicate()


@pytest.mark.parametrize("sig, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_lets_running_requests_finish(start, run_folder, sig, code):
    program = start("--adapters", f"pirate={run_folder.parent / 'pirate'}", "--rows=2", GPT_API_KEY="")
    assert "out, out:pirate at http://127.0.0.1:" in program.first_line
    content = SHORT | {"max_tokens": 400, "stream": True}
    connection = send(program.address, content)
    data = read(connection, b"data: ")
    os.kill(program.process.pid, sig)
    data += read(connection)
    told = [json.loads(event) for event in events(data)[:-1]]
    assert told[-1]["choices"][0]["finish_reason"] == "length" and events(data)[-1] == "[DONE]"
    assert len("".join(piece["choices"][0]["text"] for piece in told)) == 400
    status, _, err = program.end()
    assert status == code and err.strip() in ("", "stopped"), err


def test_a_signal_tells_those_who_take_too_long(start):
    program = start("--shutdown_timeout=0.3", "--rows=1", f"--max_new_tokens={ENDLESS}")
    running = send(program.address, LONG)
    read(running, b"data: ")
    waiting = send(program.address, LONG)
    until(lambda: httpx.get(f"{program.address}/health").json()["waiting"] == 1)
    os.kill(program.process.pid, signal.SIGTERM)
    assert b"503 Service Unavailable" in read(waiting, b"}}")
    told = events(read(running))
    assert json.loads(told[-2])["error"]["code"] == "shutting_down" and told[-1] == "[DONE]"
    assert program.end()[0] == 0


def test_a_second_interrupt_ends_at_once(start):
    program = start("--shutdown_timeout=60", f"--max_new_tokens={ENDLESS}")
    connection = send(program.address, LONG | {"n": 8})
    read(connection, b"data: ")
    for _ in range(2):
        os.kill(program.process.pid, signal.SIGINT)
        time.sleep(0.3)
    began = time.monotonic()
    assert program.end()[0] == 130 and time.monotonic() - began < 20
    assert b"[DONE]" not in read(connection)


def test_the_key_comes_from_the_environment(start):
    program = start(GPT_API_KEY="secret-7")
    assert httpx.get(f"{program.address}/v1/models", timeout=60).status_code == 401
    key = {"authorization": "Bearer secret-7"}
    answer = httpx.post(f"{program.address}/v1/completions", json=SHORT, headers=key, timeout=60)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 8
    assert "server" not in answer.headers


def test_ipv6(start):
    try:
        listen("::1", 0).close()
    except UserError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    program = start("--host=::1")
    assert "http://[::1]:" in program.address and httpx.get(f"{program.address}/health").status_code == 200


@pytest.mark.parametrize("arguments, message", [
    (["out"], "unexpected argument 'out'"), (["--port=70000"], "port = 70000"), (["--rows=0"], "rows = 0"),
    (["--host="], "host is empty"),
    (["--adapters=pirate"], "'pirate' should read NAME=FOLDER"), (["--adapters=a=x,a=y"], "each name once"),
    (["--adapters=a=nowhere"], "nowhere"), (["--adapters=base=pirate"], "base stands for"),
    (["--host=256.0.0.1"], "cannot listen on 256.0.0.1"), (["--host=8.8.8.8"], "cannot listen on 8.8.8.8"),
    (["--init_from=nothing-here/at-all"], "nothing-here"), (["--timeout=0"], "timeout = 0"),
    (["--temprature=1"], "unknown flag --temprature"), (["--device=tpu"], "tpu"),
], ids=str)
def test_wrong_input(run_folder, capsys, arguments, message):
    if not arguments[0].startswith("--init_from"):
        arguments = [f"--init_from={run_folder}", *arguments]
    code = cli.serve([*arguments, *([] if "--port=70000" in arguments else ["--port=0"])])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and message in err


def test_a_port_that_is_taken(start, run_folder, capsys):
    program = start()
    port = program.address.rpartition(":")[2]
    assert cli.serve([f"--init_from={run_folder}", f"--port={port}"]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_dockerfile():
    """Every file it copies is there, the extras exist, and the command is one that the program takes."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY")]
    assert all((ROOT / name).exists() for names in copies for name in names if not name.startswith(("--", "$")))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [extras] = [re.search(r"\[(.*)\]", line)[1] for line in lines if line.startswith("RUN pip")]
    assert set(extras.split(",")) <= set(project["optional-dependencies"]) and "serve" in extras
    program, *flags = json.loads(lines[-1].removeprefix("CMD "))
    assert project["scripts"][program] == "gpt.cli:serve"
    values, others = cli.parse_flags(flags, ServeConfig)
    assert ServeConfig(**values).port == 7860 and not others and "USER user" in lines


def test_names_and_adapters(run_folder, tmp_path):
    """A model is called as its folder; one that was trained as an adapter is served with it, and without as :base."""
    config = complete(ServeConfig(str(run_folder), name=""))
    assert config.name == "out" and complete(ServeConfig("gpt2.gguf")).name == "gpt2"
    model, tokenizer, run = load_run(run_folder)
    inject(model, LoRAConfig(r=2), "default")
    engine = open_engine(config, load=lambda path, device, dtype: (model, tokenizer, run))
    assert engine.models == {"out": "default", "out:default": "default", "out:base": None}
    lora_run = tmp_path / "lora"
    save_peft(model, lora_run / "peft")  # as a run that trains an adapter leaves it
    engine = open_engine(complete(ServeConfig(str(run_folder), adapters=f"mine={lora_run}")))
    assert engine.models == {"out": None, "out:mine": "mine"}

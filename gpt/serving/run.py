"""Starting the server, as scripts/serve.py does, and stopping it so that what can be finished is."""
import logging
import os
import signal
import socket
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..errors import UserError
from ..inference import generate
from ..interop import load_with_tokenizer
from ..interop.adapters import add_adapters
from ..training.checkpoints import METRICS
from .engine import BASE, Engine

KEY_VARIABLE = "GPT_API_KEY"
_KEEP_ALIVE = 75  # seconds; more than clients keep an idle connection, or one closes while the other is about to ask


def serve(config, load=load_with_tokenizer, say=None):
    """Serve until SIGINT (raises KeyboardInterrupt when all is closed) or SIGTERM.

    `load(path, device, dtype=...)` gives a tuple that begins with model and tokenizer; `say` shows where the server is
    (None: on standard output). Raises UserError where the model or the address is not to be had."""
    say = say or partial(print, flush=True)
    try:
        import uvicorn

        from .app import create_app
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install starlette uvicorn") from None
    config = complete(config)
    listener = listen(config.host, config.port)
    with listener:
        engine = open_engine(config, load)
        settings = uvicorn.Config(create_app(engine, config), log_level="warning", server_header=False, lifespan="on",
                                  timeout_keep_alive=_KEEP_ALIVE,
                                  timeout_graceful_shutdown=int(config.shutdown_timeout) + 5)
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        host = f"[{config.host}]" if ":" in config.host else config.host
        say(f"{', '.join(engine.models)} at http://{host}:{listener.getsockname()[1]} (Ctrl-C stops)")
        server = _server_class(uvicorn.Server)(settings, engine, config.shutdown_timeout)
        server.run(sockets=[listener])
    if server.signals[:1] == [signal.SIGINT]:
        raise KeyboardInterrupt("stopped")


def _server_class(base):
    class Server(base):
        """uvicorn's, which lets the engine finish first and leaves it to the caller what a signal means."""

        def __init__(self, settings, engine, seconds):
            super().__init__(settings)
            self.engine, self.seconds, self.signals = engine, seconds, []

        def handle_exit(self, sig, frame):
            super().handle_exit(sig, frame)
            self.signals.append(sig)

        @contextmanager
        def capture_signals(self):
            """uvicorn's would raise the signals again in the end, and SIGTERM then ends the process."""
            before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for sig, handler in before.items():
                    signal.signal(sig, handler)

        async def shutdown(self, sockets=None):
            self.engine.drain(self.seconds)
            await super().shutdown(sockets)

    return Server


def complete(config):
    """A ServeConfig with what it leaves open: the key from the environment, name, and run folder."""
    run = Path(config.init_from)
    return replace(config, api_key=config.api_key or os.environ.get(KEY_VARIABLE, ""),
                   name=config.name or run.resolve().name.removesuffix(".gguf") or "model",
                   run_dir=config.run_dir or (str(run) if (run / METRICS).is_file() else ""))


def listen(host, port):
    """A listening socket. Raises UserError for an address that is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio switches Nagle's algorithm off
    try:                                               # only where the protocol is named, and tokens would come late
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --host or "
                        "--port") from None
    return listener


def open_engine(config, load=load_with_tokenizer):
    """The Engine that a ServeConfig describes, not started. Raises UserError for what cannot be opened."""
    folders = config.adapter_folders()
    if BASE in folders:
        raise UserError(f"adapters: {BASE} stands for the model without its own adapter; choose another name")
    model, tokenizer, *_ = load(config.init_from, config.device, dtype=config.dtype)
    add_adapters(model, folders)
    warm_up(model.eval())
    return Engine(model, tokenizer, config, config.name)


def warm_up(model):
    """Compile what is to be compiled before anybody waits for it: prompts of one and of several lengths, and steps."""
    length = min(8, model.config.block_size)
    for prompts in ([[0] * length], [[0] * length, [0]]):
        generate(model, prompts, max_new_tokens=2, seed=0, top_k=5, top_p=0.9, logprobs=1)

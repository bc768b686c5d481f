"""A small trained model behind the real server, on a thread and a free port: for the tests of the page."""
import time
from contextlib import contextmanager

from serving_tools import serving
from tiny_run import tiny_config

import tensorgrad as tg
from gpt.interop import load_with_tokenizer
from gpt.model.lora import LoRAConfig, inject, parts, set_adapters
from gpt.serving.config import ServeConfig
from gpt.training.run import train

ADAPTER = "loud"


def trained_run(folder):
    """A run folder: 300 steps on sums, which take a few seconds; its samples and metrics are there too."""
    config = tiny_config(folder, n_layer=2, n_embd=32, block_size=48, batch_size=16, max_iters=300, eval_interval=100,
                         dropout=0.0, sample_interval=100, sample_tokens=30, sample_prompt="1 and ", log_interval=10)
    train(config, say=lambda text: None)
    return folder / "out"


def add_adapter(model):
    """An adapter that says something, without training; it is there but not active."""
    tg.manual_seed(3)
    inject(model, LoRAConfig(r=2, lora_alpha=2), ADAPTER)
    with tg.no_grad():
        for part in parts(model, ADAPTER):
            part.lora_B.copy_(tg.randn(*part.lora_B.shape) * 2)
    set_adapters(model, [])


@contextmanager
def served(run, delay=0.0, **settings):
    """(address, engine) of a server for a run folder with an adapter. `delay`: seconds that each step takes longer, so
    that a browser has time to see it."""
    from gpt.serving.engine import Engine  # needs starlette

    model, tokenizer, *_ = load_with_tokenizer(run)
    add_adapter(model)
    if delay:
        model.lm_head.register_forward_pre_hook(lambda module, args: time.sleep(delay))
    engine = Engine(model, tokenizer, ServeConfig(init_from=str(run), **settings), "sums")
    with serving(engine) as address:
        yield address, engine

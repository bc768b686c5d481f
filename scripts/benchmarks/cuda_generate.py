"""Greedy decoding on a GPU with a key-value cache, one text and eight at once, random weights in bfloat16 (float32 on a
CPU), with CUDA graphs and without."""
import os
import time
from statistics import median

import numpy as np

from .runner import Contender, middle, print_table, take_turns

PROMPT, NEW_TOKENS, BATCHES = 16, 256, (1, 8)
SWITCH = "TENSORGRAD_CUDA_GRAPH"


def report(options, skipped, **spec):
    """Measure and print; the rows of what ran."""
    rows = []
    for batch in BATCHES:
        found = {}
        for graph in (True, False):
            name = f"ours, batch {batch}, {'graph' if graph else 'no graph'}"
            for own in take_turns([Contender(name)], "cuda_generate", options, skipped,
                                  **{**spec, "batch": batch, "graph": graph}).values():
                found[graph] = {"generated": spec["size"], "batch": batch, "graph": graph, "rounds": own,
                                "tokens_per_s": middle(own, "tokens_per_s"),
                                "ms_per_token": middle(own, "ms_per_token")}
        for row in found.values():
            row["speed_vs_no_graph"] = row["tokens_per_s"] / found[False]["tokens_per_s"] if False in found else None
        rows += found.values()
    print_table([f"generate {spec['size']}", "batch", "tokens/s", "ms/step", "x without"],
                [["graph" if row["graph"] else "no graph", row["batch"], row["tokens_per_s"], row["ms_per_token"],
                  row["speed_vs_no_graph"]] for row in rows])
    return rows


def measure(spec, size):
    """In the measuring process: tokens per second of a whole continuation, prompt and recording included, and the
    median time of a step."""
    os.environ[SWITCH] = "1" if spec["graph"] else "0"
    import tensorgrad as tg
    from gpt import GPT, GPTConfig
    from gpt.model import KVCache, next_logits

    tg.manual_seed(0)
    model = GPT(GPTConfig(block_size=size.block, vocab_size=size.vocab, n_layer=size.layers, n_head=size.heads,
                          n_embd=size.width, bias=True)).to(spec["device"]).eval()
    if spec["device"] != "cpu":
        model = model.to(tg.bfloat16)
    batch, prompt = spec["batch"], min(PROMPT, size.block // 2)
    new = min(NEW_TOKENS, size.block - prompt)
    prompts = np.random.default_rng(0).integers(0, size.vocab, (batch, prompt)).tolist()

    def write():
        texts, cache, steps = [list(text) for text in prompts], KVCache(model, batch, prompt + new), []
        for _ in range(new):
            began = time.perf_counter()
            for text, token in zip(texts, next_logits(model, texts, cache).argmax(dim=-1).tolist(), strict=True):
                text.append(token)
            steps.append(time.perf_counter() - began)
        return steps

    write()  # kernels are compiled, algorithms chosen
    steps = write()
    return {"tokens_per_s": batch * new / sum(steps), "ms_per_token": 1e3 * median(steps), "new_tokens": new}

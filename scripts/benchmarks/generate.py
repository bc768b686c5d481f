"""Greedy decoding with a key-value cache, one text and eight at once, random weights, float32; ours with weights stored
in fewer bits too."""
import importlib.util
import time
from typing import NamedTuple

import numpy as np

from .runner import ROOT, Contender, contenders, middle, print_table, take_turns, times_before, times_faster

PROMPT, NEW_TOKENS, BATCHES = 16, 128, (1, 8)
STORAGE = ("bfloat16", "int8")


class Shape(NamedTuple):
    layers: int
    heads: int
    width: int
    vocab: int


SHAPES = {"124M": Shape(12, 12, 768, 50257), "tiny": Shape(2, 2, 32, 65)}  # GPT-2, and one to try the script with


def report(options):
    """Measure and print; the results as (rows, skipped)."""
    options.peers = ["none"]
    rows, skipped_at = [], {}
    for size in options.size:
        chosen, skipped = contenders(options)
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        if missing:
            skipped["transformers"] = f"{' and '.join(missing)} not installed"
        else:
            chosen.append(Contender("transformers", mode="eager"))
        chosen += [Contender(f"{c.name} {kind}", kind, c.level, required=True) for kind in STORAGE for c in chosen
                   if c.mode == "ours" and c.root == str(ROOT)]
        found, single = [], {}
        for batch in BATCHES:
            results = take_turns([c for c in chosen if c.name not in skipped], "generate", options, skipped, size=size,
                                 batch=batch, steps=options.steps or NEW_TOKENS)
            single |= {c: middle(own, "tokens_per_s") for c, own in results.items() if batch == BATCHES[0]}
            found += [{"size": size, "batch": batch, "contender": contender.name, "ms": middle(own, "ms"),
                       "tokens_per_s": middle(own, "tokens_per_s"), "ms_per_token": middle(own, "ms_per_token"),
                       "throughput_vs_single": middle(own, "tokens_per_s") / single[contender],
                       "speed_vs_torch": times_faster(results, contender, "ms"),
                       "speed_vs_before": times_before(results, contender, "ms"), "rounds": own}
                      for contender, own in results.items()]
        head = [f"generate {size}", "batch", "tokens/s", "ms/step", "x single", "torch/ours"]
        keys = ["contender", "batch", "tokens_per_s", "ms_per_token", "throughput_vs_single", "speed_vs_torch"]
        if options.against:
            head.append(f"{options.against}/ours")
            keys.append("speed_vs_before")
        print_table(head, [[row[key] for key in keys] for row in found])
        rows += found
        skipped_at |= {f"{name} at {size}": reason for name, reason in skipped.items()}
    return rows, skipped_at


# ---- in the measuring process ----------------------------------------------------------------------------------------


def measure(spec):
    """Time for a whole continuation, the prompt's reading included."""
    ids = np.random.default_rng(0).integers(0, SHAPES[spec["size"]].vocab, (spec["batch"], PROMPT))
    write = (_transformers if spec["mode"] == "eager" else _ours)(SHAPES[spec["size"]], ids, spec)
    new = spec["steps"]
    write(min(new, 4))
    started = time.perf_counter()
    length = write(new)
    seconds = time.perf_counter() - started
    if length != PROMPT + new:
        raise RuntimeError(f"asked for {new} tokens, got {length - PROMPT}")
    return {"ms": 1e3 * seconds, "tokens_per_s": spec["batch"] * new / seconds, "ms_per_token": 1e3 * seconds / new}


def _ours(shape, ids, spec):
    import tensorgrad as tg
    from gpt import GPT, GPTConfig

    model = GPT(GPTConfig(block_size=1024, vocab_size=shape.vocab, n_layer=shape.layers, n_head=shape.heads,
                          n_embd=shape.width, bias=True, activation="gelu_tanh")).eval()
    if spec["mode"] in STORAGE:
        tg.nn.quantize(model, spec["mode"])
    idx = tg.from_numpy(ids)
    return lambda new: model.generate(idx, new, temperature=0).shape[1]


def _transformers(shape, ids, spec):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(spec["threads"])
    model = GPT2LMHeadModel(GPT2Config(vocab_size=shape.vocab, n_layer=shape.layers, n_head=shape.heads,
                                       n_embd=shape.width, bos_token_id=0, eos_token_id=None)).eval()
    idx = torch.from_numpy(ids)
    mask = torch.ones_like(idx)

    def write(new):
        with torch.inference_mode():
            return model.generate(idx, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True,
                                  pad_token_id=0).shape[1]

    return write

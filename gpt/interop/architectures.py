"""Which published architecture a GPTConfig is, and the config.json of Hugging Face in both directions.

    gpt2     learned positions, LayerNorm, biases, GELU             (also sinusoidal or no positions: as a fixed table)
    llama    rotary positions, RMSNorm, swiglu, grouped queries     (Llama 1 to 3, SmolLM2; Mistral is read as well)
    qwen2    llama with biases on queries, keys and values
    qwen3    llama with normalized queries and keys
"""
from dataclasses import replace

from ..errors import UserError
from ..model.config import GPTConfig
from .names import GPT2, LLAMA

LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")
_CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM"}
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu",
                "relu2": "relu2"}


class Values:
    """The values of a configuration that is not ours, taken one by one with their type; `source` is for messages."""

    def __init__(self, values, source):
        self.values, self.source = values, source

    def get(self, key, kind, default=...):
        """The value of `key` as `kind`; where it is absent or null `default`, or, without one, a UserError."""
        value = self.values.get(key)
        if value is None:
            if default is ...:
                raise UserError(f"{self.source}: {key} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{self.source}: {key} is {value!r}, not of type {kind.__name__}")
        return value

    def only(self, key, *allowed):
        """Raise UserError unless the value of `key` is absent or one of `allowed`."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise UserError(f"{self.source}: {key} = {value!r} is a computation that is not done here")


def architecture_of(config):
    """"gpt2", "llama", "qwen2" or "qwen3". Raises UserError with the reasons where the model is none of them."""
    if config.position == "rotary":
        name = "llama"
        reasons = {
            "norm layernorm with rotary positions": config.norm != "rmsnorm",
            f"activation {config.activation} with rotary positions": config.activation != "swiglu",
        }
        if config.qk_norm:
            name, reasons["biases with normalized queries and keys"] = "qwen3", config.bias or qkv_bias(config)
        elif qkv_bias(config) and not config.bias:
            name = "qwen2"
    else:
        name = "gpt2"
        reasons = {
            f"norm rmsnorm with position {config.position}": config.norm != "layernorm",
            f"activation swiglu with position {config.position}": config.activation == "swiglu",
            f"grouped queries with position {config.position}": config.kv_heads != config.n_head,
            f"qk_norm with position {config.position}": config.qk_norm,
            f"head_size other than n_embd / n_head with position {config.position}":
                config.head_dim * config.n_head != config.n_embd,
        }
    reasons["norm_position post"] = config.norm_position == "post"
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UserError("this model cannot be exported: neither GPT-2 nor Llama, Qwen2 or Qwen3 has "
                        f"{', '.join(found)}")
    return name


def qkv_bias(config):
    """Do queries, keys and values have biases?"""
    return config.bias if config.qkv_bias is None else config.qkv_bias


def as_published(config):
    """(architecture, GPTConfig of the same computation with all that the architecture has: biases, positions)."""
    name = architecture_of(config)
    if name == "gpt2":
        return name, replace(config, bias=True, qkv_bias=None, position="learned")
    if name == "llama" and config.bias:
        return name, replace(config, qkv_bias=None)
    return name, config


# ---- Hugging Face's config.json ----

def from_config_json(values, source):
    """(GPTConfig, Names, our modules without bias) for the content of a config.json. Raises UserError for a model of
    another kind, and for what is asked of a known one but not done here."""
    values = Values(values, source)
    kind = values.get("model_type", str)
    if kind == "gpt2":
        return _from_gpt2(values), GPT2, ()
    if kind in LLAMA_FAMILY:
        config, without_bias = _from_llama(values, kind)
        return config, LLAMA, without_bias
    raise UserError(f"{source}: models of type {kind!r} are not read here, only gpt2, {', '.join(LLAMA_FAMILY)}")


def _from_gpt2(values):
    activation = values.get("activation_function", str, "gelu_new")
    values.only("activation_function", *_ACTIVATIONS)
    values.only("scale_attn_weights", True)
    values.only("scale_attn_by_inverse_layer_idx", False)
    values.only("add_cross_attention", False)
    return GPTConfig(
        block_size=values.get("n_positions", int, 1024), vocab_size=values.get("vocab_size", int, 50257),
        n_layer=values.get("n_layer", int, 12), n_head=values.get("n_head", int, 12),
        n_embd=values.get("n_embd", int, 768), ffn_dim=values.get("n_inner", int, None), bias=True,
        activation=_ACTIVATIONS[activation], norm_eps=values.get("layer_norm_epsilon", float, 1e-5),
        tie_weights=values.get("tie_word_embeddings", bool, True))


def _from_llama(values, kind):
    """(GPTConfig, our modules without bias)."""
    values.only("hidden_act", "silu")
    width, heads = values.get("hidden_size", int), values.get("num_attention_heads", int)
    size = values.get("head_dim", int, 128 if kind == "qwen3" else None)
    block_size = values.get("max_position_embeddings", int, 2048)
    if kind == "mistral" or values.get("use_sliding_window", bool, False):
        # up to the window's length all attend to all: longer texts are not for this model as it is here
        block_size = min(block_size, values.get("sliding_window", int, block_size))
    in_attention = kind == "llama" and values.get("attention_bias", bool, False)
    in_mlp = kind == "llama" and values.get("mlp_bias", bool, False)
    without = (() if in_attention else ("attn.c_attn", "attn.c_proj")) + (() if in_mlp else ("mlp.c_fc", "mlp.c_proj"))
    bias = in_attention or in_mlp
    qkv = kind == "qwen2" or None
    if kind == "qwen3" and values.get("attention_bias", bool, False):
        bias, without = True, ("mlp.c_fc", "mlp.c_proj")
    config = GPTConfig(
        block_size=block_size, vocab_size=values.get("vocab_size", int), n_layer=values.get("num_hidden_layers", int),
        n_head=heads, n_kv_head=values.get("num_key_value_heads", int, heads), n_embd=width,
        ffn_dim=values.get("intermediate_size", int), bias=bias, qkv_bias=qkv, position="rotary", norm="rmsnorm",
        activation="swiglu", norm_eps=values.get("rms_norm_eps", float, 1e-6), qk_norm=kind == "qwen3",
        head_size=None if size and size * heads == width else size,
        tie_weights=values.get("tie_word_embeddings", bool, False), **_rope_from_json(values))
    return config, without if bias else ()


def _rope_from_json(values):
    """The rope_ fields: of rope_parameters (transformers 5), or of rope_theta and rope_scaling (before)."""
    given = values.values.get("rope_parameters") or values.values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise UserError(f"{values.source}: rope_parameters is {given!r}, not a table")
    rope = Values(given, f"{values.source}: rope_parameters")
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    fields = {"rope_theta": rope.get("rope_theta", float, values.get("rope_theta", float, 10000.0))}
    if kind == "default":
        return fields
    if kind not in ("linear", "llama3"):
        raise UserError(f"{values.source}: rotary positions of type {kind!r} are not done here, only default, linear "
                        "and llama3")
    fields |= {"rope_scaling": kind, "rope_factor": rope.get("factor", float)}
    if kind == "llama3":
        fields |= {"rope_low_freq_factor": rope.get("low_freq_factor", float),
                   "rope_high_freq_factor": rope.get("high_freq_factor", float),
                   "rope_original_block_size": rope.get("original_max_position_embeddings", int)}
    return fields


def to_config_json(config, name):
    """The content of config.json for a GPTConfig that `as_published` gave with the architecture `name`."""
    common = {"architectures": [_CLASSES[name]], "model_type": name, "vocab_size": config.vocab_size,
              "tie_word_embeddings": config.tie_weights, "use_cache": True}
    if name == "gpt2":
        theirs = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
        return common | {
            "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "n_inner": config.hidden_dim,
            "n_positions": config.block_size, "n_ctx": config.block_size, "layer_norm_epsilon": config.norm_eps,
            "activation_function": theirs[config.activation], "attn_pdrop": config.dropout,
            "embd_pdrop": config.dropout, "resid_pdrop": config.dropout, "initializer_range": 0.02}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling != "none":
        rope |= {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        rope |= {"low_freq_factor": config.rope_low_freq_factor, "high_freq_factor": config.rope_high_freq_factor,
                 "original_max_position_embeddings": config.rope_original_block_size}
    found = common | {
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "hidden_size": config.n_embd,
        "intermediate_size": config.hidden_dim, "hidden_act": "silu", "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.block_size, "attention_dropout": config.dropout, "initializer_range": 0.02,
        "rope_theta": config.rope_theta, "rope_scaling": None if config.rope_scaling == "none" else rope,
        "rope_parameters": rope}
    return found | ({"attention_bias": config.bias, "mlp_bias": config.bias} if name == "llama" else {})

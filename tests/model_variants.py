"""Small configurations of the GPT, one for each thing that can be chosen."""

TINY = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 8}
MODERN = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "n_head": 4, "n_kv_head": 2, "n_embd": 16}
VARIANTS = {
    "default": {},
    "bias": {"bias": True},
    "untied": {"tie_weights": False},
    "sinusoidal": {"position": "sinusoidal"},
    "no_positions": {"position": "none"},
    "post_norm": {"norm_position": "post", "bias": True},
    "post_rmsnorm": {"norm_position": "post", "norm": "rmsnorm"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu", "ffn_dim": 12},
    "qk_norm": {"qk_norm": True, "position": "rotary"},
    "one_kv_head": {"n_kv_head": 1},
    "modern": MODERN,
}

"""GPTConfig: the shape of a model, with nanoGPT's names."""
import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from ..errors import UserError


@dataclass
class GPTConfig:
    """Everything that fixes a model's shape and computation. The defaults are GPT-2's sizes in nanoGPT's modern dress:
    no biases, vocabulary padded to a multiple of 64. Raises UserError where values do not fit together."""

    block_size: int = 1024
    """Longest sequence, in tokens."""
    vocab_size: int = 50304
    """Number of token ids. 50304 is GPT-2's 50257 padded to a multiple of 64, which is faster."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Number of attention (query) heads; divides n_embd."""
    n_kv_head: int | None = None
    """Number of key and value heads, each shared by n_head / n_kv_head query heads; None: n_head."""
    n_embd: int = 768
    """Width of the residual stream."""
    ffn_dim: int | None = None
    """Width inside the feed-forward; None: 4 * n_embd, for swiglu 8/3 * n_embd rounded up to a multiple of 32."""
    dropout: float = 0.0
    """Probability of dropping: embeddings, attention weights, and what each block adds to the stream."""
    bias: bool = False
    """Biases in linear layers and LayerNorms, as GPT-2 has them; False is a bit better and faster."""
    position: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"
    """How the model knows the order of the tokens."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of normalization."""
    norm_position: Literal["pre", "post"] = "pre"
    """pre: x + f(norm(x)) and a final norm; post: norm(x + f(x)), as in the first transformer."""
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu"] = "gelu"
    """Nonlinearity: gelu (exact), gelu_tanh (GPT-2's approximation), relu, relu2 (squared), swiglu (gated)."""
    tie_weights: bool = True
    """The output head shares the token embedding's weights."""
    qk_norm: bool = False
    """Normalize queries and keys per head (RMSNorm) before the attention product."""
    rope_theta: float = 10000.0
    """Base of the wavelengths of rotary positions."""
    norm_eps: float = 1e-5
    """Added to the variance in the norms."""
    head_size: int | None = None
    """Dimensions per head; None: n_embd / n_head."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values, which Qwen2 has although it has no others; None: as `bias` says."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """How rotary wavelengths are stretched for longer texts: linear (all alike; Chen et al. 2023, "Position
    interpolation"), llama3 (only the long ones; Llama 3.1)."""
    rope_factor: float = 1.0
    """Factor by which rope_scaling stretches."""
    rope_low_freq_factor: float = 1.0
    """llama3: wavelengths above rope_original_block_size / this are stretched in full."""
    rope_high_freq_factor: float = 4.0
    """llama3: wavelengths below rope_original_block_size / this stay; those between are stretched in part."""
    rope_original_block_size: int = 8192
    """llama3: the block_size before stretching."""

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_dim", "head_size",
                     "rope_original_block_size"):
            value = getattr(self, name)
            if value is None and name in ("n_kv_head", "ffn_dim", "head_size"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.head_size is None and self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; "
                            f"take n_embd {-(-self.n_embd // self.n_head) * self.n_head} or another n_head")
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            divisors = [str(n) for n in range(1, self.n_head + 1) if self.n_head % n == 0]
            raise UserError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}; "
                            f"take one of {', '.join(divisors)}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        for name, kind in get_type_hints(GPTConfig).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise UserError(f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}")
        if self.position == "rotary" and self.head_dim % 2:
            raise UserError(f"position 'rotary' turns pairs of dimensions: n_embd / n_head must be even, "
                            f"not {self.head_dim}; take another n_head")
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise UserError(f"position 'sinusoidal' needs an even n_embd, not {self.n_embd}")
        for name in ("rope_theta", "norm_eps", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be above 0 and finite, not {getattr(self, name)!r}")
        if self.rope_scaling == "llama3" and self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise UserError(f"rope_high_freq_factor {self.rope_high_freq_factor} must be above rope_low_freq_factor "
                            f"{self.rope_low_freq_factor}")

    @property
    def head_dim(self) -> int:
        """Dimensions per head, with the default filled in."""
        return self.head_size or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default filled in."""
        return self.n_kv_head or self.n_head

    @property
    def rope_stretch(self) -> tuple | None:
        """What `rotary_table` needs to stretch wavelengths; None where it does not."""
        if self.rope_scaling == "none":
            return None
        if self.rope_scaling == "linear":
            return self.rope_factor, None
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        return self.rope_factor, (self.rope_original_block_size / low, self.rope_original_block_size / high)

    @property
    def hidden_dim(self) -> int:
        """Width inside the feed-forward, with the default filled in."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        if self.activation == "swiglu":  # three matrices instead of two: 8/3 keeps the number of parameters
            return -(-self.n_embd * 8 // (3 * 32)) * 32
        return 4 * self.n_embd

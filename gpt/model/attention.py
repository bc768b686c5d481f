"""Causal self-attention with heads, optionally grouped queries, normalized queries and keys, rotary positions."""
import tensorgrad as tg
from tensorgrad import nn
from tensorgrad.nn import functional as F
from tensorgrad.nn.sublayer import plain, self_attention

from .positions import rotary_table


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and to what came before: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        # one product for queries, keys and values: rows are [q | k | v], head by head
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim,
                                bias=config.bias if config.qkv_bias is None else config.qkv_bias)
        self.c_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout
        self.window = config.block_size
        self.rope = None
        if config.position == "rotary":  # a table for up to 4096 positions, for more where texts are longer
            self.rope = (min(config.block_size, 4096), config.head_dim, config.rope_theta)
            self.rope_stretch = config.rope_stretch

    def forward(self, x, step=None):
        """`step`: a Step of the key-value cache, in which x (B, T, C) are new tokens after the cached ones."""
        B, T, _ = x.shape
        nh, nkv, hs = self.n_head, self.n_kv_head, self.head_dim
        drop = self.dropout if self.training else 0.0
        if step is None and self.simple and 1 < T <= self.window and plain(self.c_attn) and plain(self.c_proj):
            weights = self.c_attn.weight, self.c_attn.bias, self.c_proj.weight, self.c_proj.bias
            return self.resid_dropout(self_attention(x, *weights, nh, nkv, drop))
        q, k, v = self.heads(x, step)
        mask, causal = None, True
        if step is not None:
            k, v = step.attended(k, v)                                         # (B, nkv, S, hs), all that may be seen
            mask, causal = step.mask, step.fresh
        elif T > self.window:                                                  # only where positions are not absolute
            mask, causal = window_mask(T, self.window, x.device), False
        if T == 1 and nkv != nh:  # the queries of a group stand where others have time: no copies of keys and values
            q = q.reshape(B, nkv, nh // nkv, hs)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)        # (B, nkv, nh / nkv, hs)
            y = y.reshape(B, nh, 1, hs)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, drop, causal, enable_gqa=nkv != nh)    # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, nh * hs)                           # heads side by side
        return self.resid_dropout(self.c_proj(y))

    @property
    def simple(self):
        """Does nothing stand between the projection and the products of its heads?"""
        return self.q_norm is None and self.k_norm is None and self.rope is None

    def heads(self, x, step=None):
        """Queries (B, nh, T, hs), keys and values (B, nkv, T, hs) of x (B, T, C), normalized and rotated."""
        B, T, _ = x.shape
        nh, nkv, hs = self.n_head, self.n_kv_head, self.head_dim
        heads = self.c_attn(x).view(B, T, nh + 2 * nkv, hs).transpose(1, 2)    # (B, nh + 2 nkv, T, hs)
        q, k, v = heads.split([nh, nkv, nkv], dim=1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = F.rotary(q, k, *self.rotary(T, step, q.dtype, q.device))
        return q, k, v

    def rotary(self, T, step=None, dtype=tg.float32, device="cpu"):
        """(cos, sin) of the positions of T tokens, (T, hs) each, or (B, 1, T, hs) where the rows of `step` stand
        apart."""
        length, *rope = self.rope
        last = T - 1 if step is None else step.last_position
        while length <= last:
            length *= 2
        tables = rotary_table(length, *rope, dtype, tg.device(device), self.rope_stretch)      # (length, hs) each
        return tuple(table[:T] if step is None else step.at_positions(table) for table in tables)


def window_mask(T, window, device):
    """(T, T) bool: each position sees the `window` last ones, itself included."""
    distance = tg.arange(T, device=device).unsqueeze(1) - tg.arange(T, device=device)
    return (distance >= 0) & (distance < window)

"""Causal self-attention with heads, optionally grouped queries, normalized queries and keys, rotary positions."""
from tensorgrad import nn
from tensorgrad.nn import functional as F

from .positions import rotary_table, rotate


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and to what came before: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        # one product for queries, keys and values: rows are [q | k | v], head by head
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout
        self.rope = (config.block_size, config.head_dim, config.rope_theta) if config.position == "rotary" else None

    def forward(self, x):
        B, T, C = x.shape
        nh, nkv, hs = self.n_head, self.n_kv_head, self.head_dim
        q, k, v = self.c_attn(x).split([nh * hs, nkv * hs, nkv * hs], dim=-1)
        q = q.view(B, T, nh, hs).transpose(1, 2)                               # (B, nh, T, hs)
        k = k.view(B, T, nkv, hs).transpose(1, 2)                              # (B, nkv, T, hs)
        v = v.view(B, T, nkv, hs).transpose(1, 2)                              # (B, nkv, T, hs)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            cos, sin = rotary_table(*self.rope, q.dtype, q.device)              # (block_size, hs) each
            q, k = rotate(q, cos[:T], sin[:T]), rotate(k, cos[:T], sin[:T])
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True,
                                           enable_gqa=nkv != nh)               # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)                                 # heads side by side
        return self.resid_dropout(self.c_proj(y))

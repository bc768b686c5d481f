"""The GPT of gpt/model in PyTorch, with the same parameter names: what our training step is measured against."""
import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, size, dropout):
        super().__init__()
        self.heads, self.dropout = size.heads, dropout
        self.c_attn = nn.Linear(size.width, 3 * size.width, bias=False)
        self.c_proj = nn.Linear(size.width, size.width, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2)             # (B, nh, T, hs)
                   for part in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, size, dropout):
        super().__init__()
        self.c_fc = nn.Linear(size.width, 4 * size.width, bias=False)
        self.c_proj = nn.Linear(4 * size.width, size.width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, size, dropout):
        super().__init__()
        self.ln_1 = nn.LayerNorm(size.width, bias=False)
        self.attn = Attention(size, dropout)
        self.ln_2 = nn.LayerNorm(size.width, bias=False)
        self.mlp = MLP(size, dropout)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TorchGPT(nn.Module):
    """idx (B, T), targets (B, T) -> logits (B, T, V), mean cross-entropy."""

    def __init__(self, size, dropout=0.0):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(size.vocab, size.width),
            "wpe": nn.Embedding(size.block, size.width),
            "drop": nn.Dropout(dropout),
            "h": nn.ModuleList([Block(size, dropout) for _ in range(size.layers)]),
            "ln_f": nn.LayerNorm(size.width, bias=False),
        })
        self.lm_head = nn.Linear(size.width, size.vocab, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if p.ndim == 2:
                scale = math.sqrt(2 * size.layers) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / scale)

    def forward(self, idx, targets):
        parts = self.transformer
        x = parts.drop(parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1], device=idx.device)))  # (B, T, C)
        for block in parts.h:
            x = block(x)
        logits = self.lm_head(parts.ln_f(x))                                   # (B, T, V)
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate, betas):
        """AdamW as eager PyTorch does it by default; vectors do not decay."""
        decay = [p for p in self.parameters() if p.ndim >= 2]
        others = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)

"""The GPT: embeddings, a stack of blocks, a head that predicts the next token."""
import math

import tensorgrad as tg
from tensorgrad import nn, optim
from tensorgrad.nn import functional as F
from tensorgrad.utils import checkpoint

from ..errors import UserError
from .attention import CausalSelfAttention
from .cache import KVCache, next_logits
from .config import GPTConfig
from .ffn import MLP
from .fused import fused_step
from .norms import make_norm
from .positions import sinusoidal_table
from .sampling import check_sampling, next_token


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.post = config.norm_position == "post"
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, step=None):
        if self.post:
            x = self.ln_1(x + self.attn(x, step))
            return self.ln_2(x + self.mlp(x))
        h, x = self.ln_2(x, self.attn(self.ln_1(x), step))                     # the norm of the sum, and the sum
        return x + self.mlp(h)


class GPT(nn.Module):
    """A decoder-only transformer (Radford et al. 2019, GPT-2); the default configuration computes what nanoGPT does."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """Keep only what enters each block, and compute the rest again in backward: less memory, about a third more
        time, the same bits."""
        parts = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if config.position == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        parts["drop"] = nn.Dropout(config.dropout)
        parts["h"] = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        if config.norm_position == "pre":
            parts["ln_f"] = make_norm(config)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        self._init_weights()

    def _init_weights(self):
        """N(0, 0.02) for all matrices, zero for biases; norms keep their 1."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 * n_layer of them add up in the stream: keep its variance
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.ndim >= 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None):
        """idx (B, T) token ids -> (logits, loss).

        With `targets` (B, T): logits (B, T, V) and the mean cross-entropy in nats, where targets of -100 do not count.
        Without: logits (B, 1, V) of the last position only, and None. Raises UserError for sequences longer than
        block_size and ids outside the vocabulary."""
        self._check_ids(idx)
        x = self.hidden(idx)                                                   # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, -1:]), None                               # (B, 1, V)
        logits = self.lm_head(x)                                               # (B, T, V)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))  # (B*T, V), (B*T,) -> ()
        return logits, loss

    def hidden(self, idx, step=None):
        """What the head reads: (B, T) -> (B, T, C). `step`: a Step of the key-value cache that idx continues."""
        x = self.embed(idx, step)                                              # (B, T, C)
        for block in self.transformer.h:
            x = checkpoint(block, x) if self.activation_checkpointing and step is None else block(x, step)
        return self.transformer.ln_f(x) if self.config.norm_position == "pre" else x

    def decode(self, idx, step):
        """Logits (B, V) after the last of each row's new tokens, idx (B, T), padded on the right; see `next_logits`."""
        if step.fresh:
            self._check_ids(idx)
        logits = fused_step(self, idx, step)
        if logits is not None:
            return logits
        x = self.hidden(idx, step)                                             # (B, T, C)
        if step.padded:
            x = x[tg.arange(step.rows, device=idx.device), tg.tensor(step.counts, device=idx.device) - 1]  # (B, C)
        else:
            x = x[:, -1]                                                       # (B, C)
        step.finish()
        return self.lm_head(x)

    def embed(self, idx, step=None):
        """Token vectors, with position vectors where the model has them: (B, T) -> (B, T, C)."""
        T, config, transformer = idx.size(1), self.config, self.transformer
        x = transformer.wte(idx)                                               # (B, T, C)
        if config.position == "learned":
            places = tg.arange(T, device=idx.device) if step is None else step.positions
            x = x + transformer.wpe(places)                                    # (T, C) for all B alike, or (B, T, C)
        elif config.position == "sinusoidal":
            table = sinusoidal_table(config.block_size, config.n_embd, x.dtype, x.device)
            x = x + (table[:T] if step is None else step.rows_of(table))       # (T, C) or (B, T, C)
        if tg.is_autocast_enabled(x.device.type):                              # the stream flows in 16 bits as well
            x = x.to(tg.get_autocast_dtype(x.device.type))
        return transformer.drop(x)

    def _check_ids(self, idx):
        if idx.ndim != 2 or idx.size(1) == 0:
            raise UserError(f"token ids must have the shape (batch, time) with time at least 1, not {tuple(idx.shape)}")
        if idx.size(1) > self.config.block_size:
            raise UserError(f"the sequence has {idx.size(1)} tokens, the model's block_size is "
                            f"{self.config.block_size}; crop the sequence or train with a larger block_size")
        if idx.device.type == "cpu" and idx.numel():  # looking at values on a GPU would stall its queue
            low, high = idx.min().item(), idx.max().item()
            if low < 0 or high >= self.config.vocab_size:
                raise UserError(f"token id {low if low < 0 else high} is outside the model's vocabulary (0 to "
                                f"{self.config.vocab_size - 1}); the tokenizer belongs to another model")

    def num_params(self, non_embedding=True):
        """Number of parameters; `non_embedding` leaves out position embeddings, and token embeddings unless the head
        uses them too."""
        count = sum(p.numel() for p in self.parameters())
        if non_embedding:
            if self.config.position == "learned":
                count -= self.transformer.wpe.weight.numel()
            if not self.config.tie_weights:
                count -= self.transformer.wte.weight.numel()
        return count

    def flops_per_token(self):
        """Floating-point operations of forward and backward per token at full block_size: 6 per parameter, and 12 per
        layer, width and position for the attention products (Chowdhery et al. 2022, PaLM, appendix B)."""
        config = self.config
        return 6 * self.num_params() + 12 * config.n_layer * config.n_embd * config.block_size

    def configure_optimizers(self, weight_decay, learning_rate, betas, optimizer="adamw"):
        """The optimizer of all trainable parameters. Tensors of two or more dimensions decay, vectors do not.

        "adamw", or "muon": the matrices of the blocks by Muon, scaled so that AdamW's learning rate fits, embeddings,
        head and vectors by AdamW."""
        if optimizer not in ("adamw", "muon"):
            raise UserError(f"optimizer must be 'adamw' or 'muon', not {optimizer!r}")
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        in_block = [optimizer == "muon" and p.ndim == 2 and name.startswith("transformer.h.") for name, p in trained]
        hidden = [p for (_, p), inside in zip(trained, in_block, strict=True) if inside]
        others = [p for (_, p), inside in zip(trained, in_block, strict=True) if not inside]
        decay = {"params": [p for p in others if p.ndim >= 2], "weight_decay": weight_decay}
        no_decay = {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0}
        if optimizer == "adamw":
            return optim.AdamW([decay, no_decay], lr=learning_rate, betas=betas)
        groups = [{"params": hidden, "weight_decay": weight_decay},
                  {**decay, "use_muon": False}, {**no_decay, "use_muon": False}]
        return optim.Muon(groups, lr=learning_rate, betas=betas, adjust_lr_fn="match_rms_adamw")

    @tg.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, do_sample=True,
                 min_p=None, use_cache=True):
        """Continue idx (B, T) by up to `max_new_tokens` tokens and return all of it (B, T + new).

        `temperature` divides the logits; 0, or do_sample=False, takes the likeliest token. `top_k` keeps the k
        likeliest tokens, `top_p` the fewest whose probabilities sum to at least p, `min_p` those at least min_p times
        as likely as the likeliest. `stop`: a token id, or several, that ends a sequence; a sequence that ended is
        filled up with its last token while others go on. Past block_size the window slides, see cache.py;
        `use_cache=False` computes all tokens anew for each, the same text in more time. Training mode is left as it is:
        call eval() first.
        Penalties, several samples, beams, streams and seeds per text: `gpt.inference.generate`."""
        temperature = temperature if do_sample else 0
        check_sampling(temperature, top_k, top_p, min_p)
        if stop is not None:
            stop = tg.tensor([stop] if isinstance(stop, int) else list(stop), device=idx.device)
        block_size = self.config.block_size
        texts = idx[:, -block_size:].tolist()
        cache = KVCache(self, len(texts), len(texts[0]) + max_new_tokens) if use_cache else None
        done = tg.zeros(idx.size(0), 1, dtype=tg.bool, device=idx.device)      # (B, 1)
        for _ in range(max_new_tokens):
            if use_cache:
                logits = next_logits(self, texts, cache)                       # (B, V)
            else:
                window = tg.tensor(texts, device=idx.device)
                if self.config.position in ("learned", "sinusoidal"):
                    window = window[:, -block_size:]
                logits = self.lm_head(self.hidden(window)[:, -1])              # (B, V)
            token = next_token(logits, temperature, top_k, top_p, min_p)       # (B, 1)
            token = tg.where(done, idx[:, -1:], token)
            idx = tg.cat([idx, token], dim=1)                                  # (B, T + 1)
            for text, new in zip(texts, token[:, 0].tolist(), strict=True):
                text.append(new)
            if stop is not None:
                done = (token == stop).any(dim=1, keepdim=True)                # (B, 1) == (number of stops,)
                if done.all():
                    break
        return idx

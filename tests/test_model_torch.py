"""The GPT against the same model in PyTorch: every variant's logits and gradients, fifty AdamW steps in lockstep."""
import math

import numpy as np
import pytest
from model_variants import MODERN, TINY, VARIANTS

import tensorgrad as tg
from gpt import GPT, GPTConfig

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional

LOCKSTEP = {"block_size": 16, "vocab_size": 65, "n_layer": 2, "n_head": 4, "n_embd": 32}


def torch_gpt(config):
    """The model with all its variants, written down again in PyTorch's modules."""
    nh, kv, hs = config.n_head, config.n_kv_head or config.n_head, config.n_embd // config.n_head
    rotary, gated, post = config.position == "rotary", config.activation == "swiglu", config.norm_position == "post"
    activation = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
                  "relu2": lambda x: F.relu(x) * F.relu(x)}.get(config.activation)

    def norm():
        if config.norm == "rmsnorm":
            return nn.RMSNorm(config.n_embd, eps=1e-5)
        return nn.LayerNorm(config.n_embd, bias=config.bias)

    def angles(length, half):
        inverse = 1.0 / 10000.0 ** (torch.arange(half, dtype=torch.float64) / half)
        return torch.outer(torch.arange(length, dtype=torch.float64), inverse)

    def rotate(x):
        angle = angles(x.shape[2], hs // 2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., :hs // 2], x[..., hs // 2:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn = nn.Linear(config.n_embd, (nh + 2 * kv) * hs, bias=config.bias)
            self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
            if config.qk_norm:
                self.q_norm, self.k_norm = nn.RMSNorm(hs, eps=1e-5), nn.RMSNorm(hs, eps=1e-5)

        def forward(self, x):
            B, T, C = x.shape
            q, k, v = self.c_attn(x).split([nh * hs, kv * hs, kv * hs], dim=2)
            q, k, v = (t.view(B, T, -1, hs).transpose(1, 2) for t in (q, k, v))
            if config.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            if rotary:
                q, k = rotate(q), rotate(k)
            k, v = (t.repeat_interleave(nh // kv, dim=1) for t in (k, v))
            weights = (q @ k.transpose(-2, -1)) / math.sqrt(hs)
            weights = weights.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
            return self.c_proj((weights @ v).transpose(1, 2).reshape(B, T, C))

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc = nn.Linear(config.n_embd, config.hidden_dim * (2 if gated else 1), bias=config.bias)
            self.c_proj = nn.Linear(config.hidden_dim, config.n_embd, bias=config.bias)

        def forward(self, x):
            x = self.c_fc(x)
            if gated:
                return self.c_proj(F.silu(x[..., :config.hidden_dim]) * x[..., config.hidden_dim:])
            return self.c_proj(activation(x))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.attn, self.ln_2, self.mlp = norm(), Attention(), norm(), MLP()

        def forward(self, x):
            if post:
                x = self.ln_1(x + self.attn(x))
                return self.ln_2(x + self.mlp(x))
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            parts = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
            if config.position == "learned":
                parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
            parts["h"] = nn.ModuleList(Block() for _ in range(config.n_layer))
            if not post:
                parts["ln_f"] = norm()
            self.transformer = nn.ModuleDict(parts)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            if config.tie_weights:
                self.lm_head.weight = self.transformer.wte.weight

        def forward(self, idx, targets):
            x = self.transformer.wte(idx)
            if config.position == "learned":
                x = x + self.transformer.wpe(torch.arange(idx.shape[1]))
            elif config.position == "sinusoidal":
                angle = angles(idx.shape[1], config.n_embd // 2).to(x.dtype)
                x = x + torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
            for block in self.transformer.h:
                x = block(x)
            logits = self.lm_head(x if post else self.transformer.ln_f(x))
            return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    return Model()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_equals_torch(name):
    config = GPTConfig(**{**TINY, **VARIANTS[name]})
    ours, theirs = GPT(config).double(), torch_gpt(config).double()
    rng = np.random.default_rng(0)
    state = {key: rng.normal(size=value.shape) * 0.3 for key, value in theirs.state_dict().items()}
    if config.tie_weights:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    ours.load_state_dict(state)
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    idx, targets = rng.integers(config.vocab_size, size=(2, 2, config.block_size))
    logits, loss = ours(tg.tensor(idx), tg.tensor(targets))
    logits2, loss2 = theirs(torch.from_numpy(idx), torch.from_numpy(targets))
    np.testing.assert_allclose(logits.detach().numpy(), logits2.detach().numpy(), rtol=1e-9, atol=1e-11)
    loss.backward()
    loss2.backward()
    for (key, p), (key2, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert key == key2
        np.testing.assert_allclose(p.grad.numpy(), q.grad.numpy(), rtol=1e-8, atol=1e-11, err_msg=key)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float64", 1e-8)])
@pytest.mark.parametrize("variant", [{}, {**MODERN, "n_embd": 32}], ids=["default", "modern"])
def test_fifty_adamw_steps_in_lockstep_with_torch(variant, dtype, tolerance):
    config = GPTConfig(**{**LOCKSTEP, **variant})
    ours, theirs = GPT(config), torch_gpt(config)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.to(np.dtype(dtype))
    theirs.to(getattr(torch, dtype)).load_state_dict(
        {name: torch.from_numpy(value.numpy().copy()) for name, value in ours.state_dict().items()})
    opt = ours.configure_optimizers(weight_decay=0.1, learning_rate=3e-3, betas=(0.9, 0.99))
    parameters = list(theirs.parameters())
    reference = torch.optim.AdamW([
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}], lr=3e-3, betas=(0.9, 0.99), eps=1e-8)
    losses = []
    for step in range(50):
        idx, targets = np.random.default_rng(step % 10).integers(config.vocab_size, size=(2, 4, 16))
        loss, loss2 = ours(tg.tensor(idx), tg.tensor(targets))[1], \
            theirs(torch.from_numpy(idx), torch.from_numpy(targets))[1]
        assert abs(loss.item() - loss2.item()) < tolerance, step
        losses.append(loss.item())
        for model, o, value, library in ((ours, opt, loss, tg.nn), (theirs, reference, loss2, torch.nn)):
            o.zero_grad()
            value.backward()
            library.utils.clip_grad_norm_(model.parameters(), 1.0)
            o.step()
        if step == 0 and dtype == "float64":
            for (name, p), q in zip(ours.named_parameters(), parameters, strict=True):
                np.testing.assert_allclose(p.grad.numpy(), q.grad.numpy(), rtol=1e-7, atol=1e-11, err_msg=name)
    assert losses[-1] < losses[0] - 0.3  # it did learn

"""The GPT: every variant against finite differences, and what the model promises."""
import dataclasses
import math

import numpy as np
import pytest
from model_variants import MODERN, TINY, VARIANTS

import tensorgrad as tg
from gpt import GPT, GPTConfig
from gpt.errors import UserError
from gpt.model.gpt import next_token
from gpt.model.positions import rotary_table, sinusoidal_table


def tiny(**changes):
    return GPT(GPTConfig(**{**TINY, **changes}))


def batch(config, B=2, T=None, seed=0):
    rng = np.random.default_rng(seed)
    shape = (B, T or config.block_size)
    return rng.integers(config.vocab_size, size=shape), rng.integers(config.vocab_size, size=shape)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_match_finite_differences(name):
    model = tiny(**VARIANTS[name]).double()
    rng = np.random.default_rng(1)
    with tg.no_grad():
        for p in model.parameters():  # away from the initial values, where norms and biases would hide errors
            p.add_(tg.tensor(rng.normal(size=p.shape) * 0.3))
    idx, targets = (tg.tensor(a) for a in batch(model.config))
    logits, loss = model(idx, targets)
    assert logits.shape == (2, 8, 11) and loss.shape == ()
    loss.backward()
    eps = 1e-6
    for path, p in model.named_parameters():
        flat, grad = p.array.reshape(-1), p.grad.numpy().reshape(-1)
        for i in rng.choice(flat.size, size=min(flat.size, 6), replace=False):
            value, losses = flat[i], []
            for step in (eps, -eps):
                flat[i] = value + step
                p._bump()
                with tg.no_grad():
                    losses.append(model(idx, targets)[1].item())
            flat[i] = value
            np.testing.assert_allclose(grad[i], (losses[0] - losses[1]) / (2 * eps), rtol=1e-4, atol=1e-8,
                                       err_msg=f"{path}[{i}]")


@pytest.mark.parametrize("name", VARIANTS)
def test_no_position_sees_the_future(name):
    model = tiny(**VARIANTS[name]).eval()
    idx, targets = batch(model.config, B=1)
    changed = idx.copy()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    with tg.no_grad():
        a, b = (model(tg.tensor(i), tg.tensor(targets))[0].numpy() for i in (idx, changed))
        last = model(tg.tensor(idx))[0].numpy()
    assert np.array_equal(a[:, :5], b[:, :5]) and not np.allclose(a[:, 5], b[:, 5])
    assert last.shape == (1, 1, 11)
    np.testing.assert_allclose(last, a[:, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["default", "sinusoidal", "modern"])
def test_order_matters_where_positions_are_known(name):
    model = tiny(**VARIANTS[name]).eval()
    with tg.no_grad():
        for p in model.parameters():
            p.mul_(10)  # at the initial 0.02, attention hardly looks at anything
        a, b = (model(tg.tensor([ids]))[0].numpy() for ids in ([1, 2, 3, 4], [2, 1, 3, 4]))
    assert not np.allclose(a, b, atol=1e-6)


def test_names_are_nanogpts():
    names = list(tiny(bias=True).state_dict())
    assert names[:2] == ["transformer.wte.weight", "transformer.wpe.weight"]
    block = [f"transformer.h.0.{part}.{kind}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc",
                                                           "mlp.c_proj") for kind in ("weight", "bias")]
    assert names[2:14] == block
    assert names[26:] == ["transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"]
    plain = tiny()
    assert not any(name.endswith("bias") for name in plain.state_dict())
    assert plain.lm_head.weight is plain.transformer.wte.weight
    shapes = {name: p.shape for name, p in tiny(**MODERN, ffn_dim=24).named_parameters()}
    assert shapes["transformer.h.1.attn.c_attn.weight"] == ((4 + 2 * 2) * 4, 16)
    assert shapes["transformer.h.1.mlp.c_fc.weight"] == (48, 16)
    assert shapes["transformer.h.1.mlp.c_proj.weight"] == (16, 24)
    assert "transformer.wpe.weight" not in shapes and "lm_head.weight" not in shapes
    assert "transformer.ln_f.weight" not in dict(tiny(norm_position="post").named_parameters())


def test_initial_values():
    model = GPT(GPTConfig(block_size=32, vocab_size=500, n_layer=8, n_head=4, n_embd=128, bias=True))
    for name, p in model.named_parameters():
        a = p.detach().numpy()
        if "ln_" in name:
            assert (a == name.endswith("weight")).all(), name
        elif name.endswith("bias"):
            assert not a.any(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert abs(a.std() / std - 1) < 0.03 and abs(a.mean()) < 0.05 * std, name
    with tg.no_grad():
        idx, targets = (tg.tensor(a) for a in batch(model.config, B=8))
        assert model(idx, targets)[1].item() == pytest.approx(math.log(500), rel=0.02)


def test_sizes():
    baby = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128))
    assert baby.num_params() == 795904 and baby.num_params(non_embedding=False) == 795904 + 64 * 128
    assert baby.flops_per_token() == 6 * 795904 + 12 * 4 * 128 * 64
    untied = tiny(tie_weights=False, position="rotary")
    assert untied.num_params(non_embedding=False) - untied.num_params() == 11 * 8
    assert GPTConfig(activation="swiglu").hidden_dim == 2048 and GPTConfig().hidden_dim == 3072
    assert GPTConfig(activation="swiglu", n_embd=288, n_head=6).hidden_dim == 768
    assert GPTConfig(ffn_dim=5).hidden_dim == 5


def test_ignored_targets_do_not_count():
    model = tiny()
    idx, targets = batch(model.config, B=1)
    cut = targets.copy()
    cut[0, 3:] = -100
    with tg.no_grad():
        full = model(tg.tensor(idx[:, :3]), tg.tensor(targets[:, :3]))[1].item()
        assert model(tg.tensor(idx), tg.tensor(cut))[1].item() == pytest.approx(full, rel=1e-5)


def test_dropout_acts_in_training_only():
    model = tiny(dropout=0.5)
    idx = tg.tensor(batch(model.config)[0])
    with tg.no_grad():
        assert not np.allclose(model(idx)[0].numpy(), model(idx)[0].numpy())
        model.eval()
        assert np.array_equal(model(idx)[0].numpy(), model(idx)[0].numpy())


@pytest.mark.parametrize("changes, message", [
    ({"n_embd": 10, "n_head": 4}, "n_embd 10 is not divisible by n_head 4; take n_embd 12"),
    ({"n_kv_head": 5}, "n_kv_head 5 does not divide n_head 12; take one of 1, 2, 3, 4, 6, 12"),
    ({"n_layer": 0}, "n_layer must be a whole number of at least 1, not 0"),
    ({"block_size": 2.5}, "block_size must be a whole number"),
    ({"ffn_dim": -1}, "ffn_dim must be a whole number"),
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
    ({"position": "alibi"}, "position must be one of learned, sinusoidal, rotary, none, not 'alibi'"),
    ({"norm": "batchnorm"}, "norm must be one of layernorm, rmsnorm"),
    ({"norm_position": "both"}, "norm_position must be one of pre, post"),
    ({"activation": "swish"}, "activation must be one of gelu, gelu_tanh, relu, relu2, swiglu, not 'swish'"),
    ({"position": "rotary", "n_embd": 36}, "must be even, not 3"),
    ({"position": "sinusoidal", "n_embd": 9, "n_head": 3}, "needs an even n_embd, not 9"),
    ({"norm_eps": 0.0}, "norm_eps must be above 0"),
])
def test_config_errors(changes, message):
    with pytest.raises(UserError) as error:
        GPTConfig(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_config_fields():
    assert [f.name for f in dataclasses.fields(GPTConfig)] == [
        "block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_dim", "dropout", "bias",
        "position", "norm", "norm_position", "activation", "tie_weights", "qk_norm", "rope_theta", "norm_eps",
        "head_size", "qkv_bias", "rope_scaling", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor",
        "rope_original_block_size"]
    assert dataclasses.astuple(GPTConfig()) == (
        1024, 50304, 12, 12, None, 768, None, 0.0, False, "learned", "layernorm", "pre", "gelu", True, False, 10000.0,
        1e-5, None, None, "none", 1.0, 1.0, 4.0, 8192)


def test_bad_ids_get_one_clear_line():
    model = tiny()
    with pytest.raises(UserError, match="token id 11 is outside the model's vocabulary"):
        model(tg.tensor([[0, 11]]))
    with pytest.raises(UserError, match="token id -1 is outside"):
        model(tg.tensor([[0, -1]]))
    with pytest.raises(UserError, match="the sequence has 9 tokens, the model's block_size is 8"):
        model(tg.zeros(1, 9, dtype=tg.int64))
    with pytest.raises(UserError, match=r"\(batch, time\)"):
        model(tg.tensor([0, 1]))
    with pytest.raises(UserError, match=r"\(batch, time\)"):
        model(tg.zeros(1, 0, dtype=tg.int64))


# ---- optimizers ----

def test_configure_optimizers_groups():
    model = tiny(bias=True)
    opt = model.configure_optimizers(weight_decay=0.1, learning_rate=3e-4, betas=(0.9, 0.95))
    decay, plain = opt.param_groups
    assert type(opt).__name__ == "AdamW" and decay["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decay["params"]) and all(p.ndim < 2 for p in plain["params"])
    assert any(p is model.transformer.wte.weight for p in decay["params"])
    assert len(decay["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert decay["lr"] == 3e-4 and decay["betas"] == (0.9, 0.95) and decay["eps"] == 1e-8
    model.transformer.h[0].requires_grad_(False)
    fewer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95))
    assert sum(len(g["params"]) for g in fewer.param_groups) == len(list(model.parameters())) - 12
    with pytest.raises(UserError, match="optimizer must be 'adamw' or 'muon', not 'lion'"):
        model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), optimizer="lion")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_batch_is_learned_by_heart(optimizer):
    model = tiny(**MODERN)
    opt = model.configure_optimizers(0.0, 1e-2, (0.9, 0.95), optimizer=optimizer)
    if optimizer == "muon":
        hidden = opt.param_groups[0]["params"]
        assert len(hidden) == 8 and not any(p is model.transformer.wte.weight for p in hidden)
    idx, targets = (tg.tensor(a) for a in batch(model.config, B=1))
    for _ in range(60):
        loss = model(idx, targets)[1]
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < 0.1


# ---- positions ----

def test_tables():
    table = sinusoidal_table(20, 6, tg.float64, tg.zeros(1).device).numpy()
    for position in (0, 7, 19):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            np.testing.assert_allclose(table[position, 2 * i:2 * i + 2], [math.sin(angle), math.cos(angle)], atol=1e-12)
    cos, sin = rotary_table(20, 6, 500.0, tg.float16, tg.zeros(1).device)
    assert cos.dtype == sin.dtype == tg.float32 and cos.shape == (20, 6)
    assert np.array_equal(cos.numpy()[:, :3], cos.numpy()[:, 3:])
    np.testing.assert_allclose(sin.numpy()[7, 4], math.sin(7 / 500 ** (2 / 6)), rtol=1e-6)


def test_tables_made_under_inference_mode_can_be_trained_with():
    model = tiny(position="rotary", block_size=7, rope_theta=77.0)  # values that no other test has cached
    idx = tg.zeros(1, 7, dtype=tg.int64)
    with tg.inference_mode():
        model(idx)
    model(idx, idx)[1].backward()
    assert model.transformer.wte.weight.grad is not None


# ---- generation ----

@pytest.fixture
def trained():
    """A model that counts: after n comes n + 1 modulo 11."""
    model = tiny(position="rotary")
    opt = model.configure_optimizers(0.0, 1e-2, (0.9, 0.95))
    for step in range(80):
        ids = (np.arange(9) + np.arange(step, step + 8)[:, None]) % 11
        loss = model(tg.tensor(ids[:, :-1]), tg.tensor(ids[:, 1:]))[1]
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model.eval()


def test_generate(trained):
    start = tg.tensor([[3], [9]])
    out = trained.generate(start, 12, temperature=0)  # longer than block_size: cropped
    assert np.array_equal(out.numpy(), (np.arange(13) + [[3], [9]]) % 11)
    assert not out.requires_grad and out.dtype == tg.int64
    stopped = trained.generate(start, 12, temperature=0, stop=6)
    assert stopped.tolist() == [[3, 4, 5, 6, 6, 6, 6, 6, 6], [9, 10, 0, 1, 2, 3, 4, 5, 6]]
    assert trained.generate(start[:1], 12, temperature=0, stop=[0, 5]).tolist() == [[3, 4, 5]]
    assert trained.generate(start, 0).tolist() == start.tolist()
    tg.manual_seed(7)
    first = trained.generate(start, 8, temperature=2.0).tolist()
    tg.manual_seed(7)
    assert trained.generate(start, 8, temperature=2.0).tolist() == first
    assert trained.generate(start, 5, temperature=5.0, top_k=1).tolist() == out[:, :6].tolist()
    assert trained.generate(start, 5, temperature=1.0, top_p=1e-9).tolist() == out[:, :6].tolist()


def test_next_token_follows_the_distribution():
    probabilities = np.array([0.4, 0.3, 0.2, 0.1])
    rows = tg.tensor(np.log(probabilities)).expand(20000, 4)

    def frequencies(**options):
        return np.bincount(next_token(rows, **options).numpy().reshape(-1), minlength=4) / 20000

    def close(counts, expected):
        return abs(counts - np.array(expected) / np.sum(expected)).max() < 0.02

    assert close(frequencies(), probabilities)
    assert close(frequencies(temperature=0.5), probabilities**2)
    assert close(frequencies(top_k=2), [4, 3, 0, 0]) and close(frequencies(top_k=99), probabilities)
    assert close(frequencies(top_p=0.65), [4, 3, 0, 0])  # 0.4 is less than 0.65, 0.7 reaches it
    assert close(frequencies(top_p=0.75), [4, 3, 2, 0]) and close(frequencies(top_p=1.0), probabilities)
    assert close(frequencies(top_k=3, top_p=0.7), [4, 3, 0, 0])  # of the three kept: 0.44, 0.33, 0.22
    for options in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(UserError, match="temperature must be at least 0"):
            next_token(rows, **options)

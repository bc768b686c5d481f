"""Adapters in a model: what is trained, what they compute, names, merging, several at once."""
import math

import numpy as np
import pytest
from lora_models import V, fill, ids, logits

import tensorgrad as tg
from gpt.errors import UserError
from gpt.model import GPT, GPTConfig
from gpt.model.lora import (
    LoRAConfig,
    LoRALinear,
    active_adapters,
    adapter_names,
    adapter_state,
    inject,
    load_adapter_state,
    merge,
    merge_and_unload,
    parts,
    set_adapters,
    set_scale,
    unmerge,
)
from gpt.model.lora_targets import find_targets

SHAPE = {"vocab_size": V, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 32}
KINDS = {"gpt2": {"bias": True}, "llama": {"n_kv_head": 2, "position": "rotary", "norm": "rmsnorm",
                                           "activation": "swiglu", "tie_weights": False}}
EVERY = [("gpt2", ["c_attn"]), ("gpt2", ["q_proj", "v_proj"]), ("gpt2", ["k_proj", "attn.c_proj"]),
         ("gpt2", "all-linear"), ("gpt2", ["lm_head"]), ("llama", ["q_proj", "k_proj", "v_proj"]),
         ("llama", ["gate_proj", "down_proj"]), ("llama", ["up_proj", "c_attn"]),
         ("gpt2", ["wte", "wpe"]), ("llama", ["embed_tokens", "o_proj"]),
         ("llama", r"model\.layers\.0\.self_attn\.[qo]_proj")]


def make(kind="gpt2", **changes):
    tg.manual_seed(1)
    model = GPT(GPTConfig(**SHAPE | KINDS[kind] | changes))
    for p in model.parameters():
        tg.nn.init.normal_(p, std=0.2)
    return model.eval()


def adapted(kind="gpt2", targets=("c_attn",), **config):
    model = make(kind)
    inject(model, LoRAConfig(**{"r": 3, "lora_alpha": 7, "target_modules": targets} | config))
    fill(model)
    return model


def bits(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


# ---- what is computed ----

@pytest.mark.parametrize("kind, targets", EVERY)
def test_a_new_adapter_changes_nothing(kind, targets):
    model = make(kind)
    before = logits(model)
    inject(model, LoRAConfig(target_modules=targets))
    np.testing.assert_array_equal(logits(model), before)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [["c_attn"], ["q_proj", "v_proj"], ["k_proj"]])
def test_it_adds_scale_times_b_a(targets, rslora):
    model = adapted("llama", targets, use_rslora=rslora)
    layer = model.transformer.h[1].attn.c_attn
    x = tg.randn(2, 5, 32)
    weight = layer.weight.detach().numpy().astype(np.float64).copy()
    for part in layer.adapters["default"]:
        start, stop = part.target.rows
        b, a = part.lora_B.detach().numpy().astype(np.float64), part.lora_A.detach().numpy().astype(np.float64)
        weight[start:stop] += (7 / math.sqrt(3) if rslora else 7 / 3) * b @ a
    with tg.no_grad():
        np.testing.assert_allclose(layer(x).numpy(), x.numpy() @ weight.T, rtol=0, atol=1e-5)


def test_blocks_are_the_rows_of_queries_keys_and_values():
    rows = {target.name.rpartition(".")[2]: target.rows for target in find_targets(make("llama"))}
    assert (rows["q_proj"], rows["k_proj"], rows["v_proj"]) == ((0, 32), (32, 48), (48, 64))
    assert rows["gate_proj"][1] == rows["up_proj"][0] == rows["c_fc"][1] // 2


def test_dropout_acts_in_training_only_and_on_the_adapter_only():
    model = adapted(lora_dropout=0.5)
    still = logits(model)
    np.testing.assert_array_equal(logits(model), still)
    model.train()
    assert np.abs(logits(model) - logits(model)).max() > 1e-3
    set_adapters(model, [])
    np.testing.assert_array_equal(logits(model), logits(make().train()))


# ---- what is trained ----

@pytest.mark.parametrize("kind, targets", EVERY)
def test_only_the_adapter_gets_gradients(kind, targets):
    model = adapted(kind, targets).train()
    x = tg.tensor(ids())
    model(x, x)[1].backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95))
    in_optimizer = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert in_optimizer == sum(tensor.numel() for tensor in adapter_state(model).values())


def test_gradients_of_frozen_weights_are_not_computed(monkeypatch):
    from tensorgrad.ops.nn import Linear

    model, seen = adapted().train(), []
    gradient = Linear.gradient

    def watch(ctx, saved, g):
        grads = gradient(ctx, saved, g)
        seen.extend(tuple(grad.shape) for grad in grads[1:] if grad is not None)
        return grads

    monkeypatch.setattr(Linear, "gradient", watch)
    x = tg.tensor(ids())
    model(x, x)[1].backward()
    assert sorted(set(seen)) == [(3, 32), (96, 3)]  # of A and B, and of no weight or bias


def test_the_report_counts_and_names():
    model = make()
    before = model.num_params(non_embedding=False)
    report = inject(model, LoRAConfig(r=3, target_modules=["c_attn", "q_proj"][:1]))
    assert [target.name for target in report.targets] == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
    assert report.trained == 2 * 3 * (32 + 96) and report.total == before + report.trained
    assert "transformer.h.*.attn.c_attn (2)" in str(report) and f"{report.share:.3%}" in str(report)


# ---- merging ----

@pytest.mark.parametrize("kind, targets", EVERY)
def test_merge_computes_the_same_and_unmerge_restores_the_bits(kind, targets):
    model = adapted(kind, targets)
    before, expected = bits(model), logits(model)
    merge(model)
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=2e-5)
    assert bits(model) != before
    unmerge(model)
    assert bits(model) == before
    np.testing.assert_array_equal(logits(model), expected)


@pytest.mark.parametrize("kind, targets", EVERY)
def test_unloading_leaves_a_plain_model(kind, targets):
    model = adapted(kind, targets)
    expected, names = logits(model), list(make(kind).state_dict())
    assert merge_and_unload(model) is model
    assert list(model.state_dict()) == names and not adapter_names(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=2e-5)
    copy = GPT(model.config).eval()
    copy.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(logits(copy), logits(model))


def test_a_tied_head_is_merged_without_the_embedding():
    model = adapted("gpt2", ["lm_head"])
    embedding = model.transformer.wte.weight.numpy().tobytes()
    assert model.lm_head.weight is model.transformer.wte.weight
    merge(model)
    assert model.transformer.wte.weight.numpy().tobytes() == embedding
    unmerge(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not merge_and_unload(model).config.tie_weights


def test_what_is_merged_cannot_be_changed():
    model = adapted()
    merge(model)
    for change in (lambda: set_scale(model, 2), lambda: set_adapters(model, []),
                   lambda: inject(model, LoRAConfig(), "two")):
        with pytest.raises(UserError, match="merged"):
            change()


# ---- several ----

def test_several_adapters_switch_add_and_scale():
    model = make()
    bare = logits(model)
    alone = {}
    for name, targets in (("one", ["c_attn"]), ("two", ["v_proj", "c_fc"])):
        inject(model, LoRAConfig(r=2, target_modules=targets), name)
        fill(model, name)
        alone[name] = logits(model)
        assert active_adapters(model) == [name]
    assert adapter_names(model) == ["one", "two"]
    set_adapters(model, ["one"])
    np.testing.assert_array_equal(logits(model), alone["one"])
    assert all(p.requires_grad == (".one." in name) for name, p in model.named_parameters())
    set_adapters(model, [])
    np.testing.assert_array_equal(logits(model), bare)
    set_adapters(model, ["one", "two"])
    both = logits(model)
    assert min(np.abs(both - alone[name]).max() for name in alone) > 0.1
    merge(model)
    np.testing.assert_allclose(logits(model), both, rtol=0, atol=2e-5)
    unmerge(model)
    set_scale(model, 0, "two")
    np.testing.assert_allclose(logits(model), alone["one"], rtol=0, atol=1e-6)
    set_scale(model, 1, "two")
    np.testing.assert_array_equal(logits(model), both)


def test_scale_is_a_factor_of_what_is_added():
    model = adapted(targets=["lm_head"])
    one, bare = logits(model), logits(make())
    set_scale(model, -0.5)
    np.testing.assert_allclose(logits(model) - bare, -0.5 * (one - bare), rtol=0, atol=1e-5)


def test_names_of_adapters():
    model = adapted()
    for name in ("default", "", "a.b"):
        with pytest.raises(UserError, match="called"):
            inject(model, LoRAConfig(), name)
    with pytest.raises(UserError, match="no adapter 'x'; this model has default"):
        set_adapters(model, ["x"])


# ---- state ----

def test_the_state_is_the_adapter_alone():
    model, other = adapted("llama", ["q_proj", "o_proj"]), make("llama")
    inject(other, LoRAConfig(r=3, lora_alpha=7, target_modules=["q_proj", "o_proj"]))
    state = {name: tg.tensor(tensor.numpy()) for name, tensor in adapter_state(model).items()}
    assert len(state) == 8 and state["transformer.h.1.attn.q_proj.lora_B.weight"].shape == (32, 3)
    load_adapter_state(other, state)
    np.testing.assert_array_equal(logits(other), logits(model))
    key = "transformer.h.0.attn.q_proj.lora_A.weight"
    for broken, words in ((state | {"x": state[key]}, "tensor x that"), ({**state, key: state[key].t()}, "shape"),
                          ({name: tensor for name, tensor in state.items() if name != key}, f"no tensor {key}")):
        before = bits(other)
        with pytest.raises(UserError, match=words):
            load_adapter_state(other, broken)
        assert bits(other) == before


# ---- names that match nothing ----

@pytest.mark.parametrize("options, words", [
    ({"target_modules": ["c_atn"]}, "'c_atn' matches no layer; did you mean c_attn"),
    ({"target_modules": ["c_attn", "q_porj"]}, "'q_porj' matches no layer; did you mean q_proj"),
    ({"target_modules": ["attn"]}, "'attn' matches no layer"),
    ({"target_modules": ["gate_proj"]}, "'gate_proj' matches no layer"),
    ({"target_modules": r".*\.nothing"}, "matches no layer"),
    ({"target_modules": ["c_attn"], "layers_to_transform": [7]}, r"layers_to_transform = \[7\]"),
    ({"target_modules": ["c_attn"], "exclude_modules": ["c_attn"]}, "exclude_modules"),
    ({"target_modules": []}, "target_modules is empty"),
    ({"target_modules": ["c_attn", "q_proj"]}, "whole layer transformer.h.0.attn.c_attn"),
    ({"r": 0}, "rank"), ({"r": 1.5}, "rank"), ({"lora_dropout": 1.0}, "lora_dropout"),
    ({"target_modules": "("}, "regular expression"),
])
def test_what_cannot_be_is_refused_and_the_model_left_alone(options, words):
    model = make()
    with pytest.raises(UserError, match=words):
        inject(model, LoRAConfig(**options))
    assert all(p.requires_grad for p in model.parameters()) and not adapter_names(model)


def test_ranks_and_alphas_by_pattern():
    model = make("llama")
    inject(model, LoRAConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"],
                             rank_pattern={"o_proj": 5, r"layers\.1\.self_attn\.q_proj": 3},
                             alpha_pattern={"q_proj": 6}))
    shown = {part.target.name[12:]: (part.lora_A.size(0), part.scale) for part in parts(model)}
    assert shown == {"h.0.attn.q_proj": (2, 3.0), "h.1.attn.q_proj": (3, 2.0),
                     "h.0.attn.c_proj": (5, 0.8), "h.1.attn.c_proj": (5, 0.8)}

"""Adapters through PEFT's own eyes: folders written here load there with equal logits, and the other way."""
import json

import numpy as np
import pytest
from lora_models import fill, hf_logits, hf_model, ids, logits, our_model

import tensorgrad as tg
from gpt.errors import UserError
from gpt.interop.peft import load_peft, save_peft
from gpt.model.lora import LoRAConfig, adapter_state, inject, merge, merge_and_unload, parts, set_scale
from gpt.model.lora_targets import find_targets, matches

transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed")
peft = pytest.importorskip("peft", reason="the oracle peft is not installed")
torch = pytest.importorskip("torch", reason="the oracle torch is not installed")

TOLERANCE = {"rtol": 0, "atol": 2e-5}  # float32 logits of size 1 to 10, two implementations
TARGETS = {
    "gpt2": [["c_attn"], ["q_proj", "v_proj"], ["q_proj", "v_proj", "attn.c_proj"], ["c_proj", "c_fc"], ["k_proj"],
             "all-linear", ["lm_head"], ["wte", "wpe", "c_attn"], r"transformer\.h\.1\..*c_(attn|fc)"],
    "llama": [["q_proj", "v_proj"], ["c_attn", "down_proj"], ["c_attn", "c_fc", "c_proj"], ["gate_proj", "o_proj"],
              "all-linear", ["embed_tokens", "q_proj"], r"model\.layers\.1\..*(q|down)_proj"],
}
OURS = [(kind, targets) for kind, several in TARGETS.items() for targets in several]


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("kind, targets", OURS)
def test_peft_loads_ours(tmp_path, kind, targets, variant):
    if variant.get("use_dora") and {"wte", "embed_tokens"} & set(targets):
        with pytest.raises(UserError, match="use_dora is for linear layers"):
            inject(our_model(kind, hf_model(kind)), LoRAConfig(use_dora=True, target_modules=targets))
        return
    theirs = hf_model(kind)
    ours = our_model(kind, theirs)
    before = logits(ours)
    np.testing.assert_allclose(before, hf_logits(theirs), **TOLERANCE)
    inject(ours, LoRAConfig(r=3, lora_alpha=7, target_modules=targets, **variant))
    fill(ours)
    expected = logits(ours)
    assert np.abs(expected - before).max() > 0.1
    save_peft(ours, tmp_path, base="a/base")
    loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path))
    np.testing.assert_allclose(hf_logits(loaded), expected, **TOLERANCE)
    if not {"lm_head", "wte"} & set(targets):  # merging into a tied head, PEFT changes the embedding as well, and warns
        np.testing.assert_allclose(hf_logits(loaded.merge_and_unload()), expected, **TOLERANCE)


THEIRS = [("gpt2", {"target_modules": ["c_attn"]}), ("gpt2", {"target_modules": ["attn.c_proj", "c_fc"]}),
          ("gpt2", {"target_modules": "all-linear"}), ("gpt2", {"target_modules": ["c_attn"],
                                                                "layers_to_transform": [1]}),
          ("gpt2", {"target_modules": ["wte", "wpe", "c_fc"]}),
          ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
          ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True}),
          ("llama", {"target_modules": "all-linear", "use_dora": True}),
          ("llama", {"target_modules": ["q_proj", "v_proj"]}), ("llama", {"target_modules": "all-linear"}),
          ("llama", {"target_modules": r".*layers\.0.*(q|up)_proj"}),
          ("llama", {"target_modules": ["q_proj", "k_proj", "down_proj"],
                     "rank_pattern": {"k_proj": 5, "0.mlp.down_proj": 2},
                     "alpha_pattern": {"q_proj": 11}, "exclude_modules": ["1.self_attn.q_proj"]})]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind, options", THEIRS)
def test_ours_loads_pefts(tmp_path, kind, options, rslora):
    theirs = hf_model(kind)
    ours, base = our_model(kind, theirs), hf_logits(theirs)
    config = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=rslora, lora_dropout=0.1, task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(theirs, config).eval()
    for name, p in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(p, std=0.3)
        if "magnitude" in name:
            with torch.no_grad():
                p.mul_(torch.rand_like(p) + 0.5)
    adapted.save_pretrained(str(tmp_path))
    load_peft(ours, tmp_path)
    expected = hf_logits(adapted)
    assert np.abs(expected - base).max() > 0.1
    np.testing.assert_allclose(logits(ours), expected, **TOLERANCE)
    set_scale(ours, 0.0)
    np.testing.assert_allclose(logits(ours), base, **TOLERANCE)
    set_scale(ours, 1.0)
    again = tmp_path / "again"
    save_peft(ours, again)
    reloaded = peft.PeftModel.from_pretrained(hf_model(kind), str(again))
    np.testing.assert_allclose(hf_logits(reloaded), expected, **TOLERANCE)
    merge(ours)
    np.testing.assert_allclose(logits(ours), expected, **TOLERANCE)
    np.testing.assert_allclose(logits(merge_and_unload(ours)), expected, **TOLERANCE)


@pytest.mark.parametrize("kind, targets", OURS)
def test_round_trip_here(tmp_path, kind, targets):
    theirs = hf_model(kind)
    ours, other = our_model(kind, theirs), our_model(kind, theirs)
    inject(ours, LoRAConfig(r=2, lora_alpha=5, target_modules=targets))
    fill(ours)
    save_peft(ours, tmp_path)
    load_peft(other, tmp_path, name="from_disk")
    np.testing.assert_allclose(logits(other), logits(ours), **TOLERANCE)


def test_query_value_adapters_are_stacked_exactly(tmp_path):
    ours = our_model("gpt2", hf_model("gpt2"))
    inject(ours, LoRAConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    fill(ours)
    save_peft(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 12, ["attn.c_attn"])
    assert config["fan_in_fan_out"] and not config["rank_pattern"] and not config["alpha_pattern"]
    b = tg.load(tmp_path / "adapter_model.safetensors")[
        "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].numpy()
    q, v = parts(ours)[:2]
    assert b.shape == (96, 8)
    assert (b[:32, :4] == q.lora_B.detach().numpy()).all() and (b[64:, 4:] == v.lora_B.detach().numpy()).all()
    assert not b[32:64].any() and not b[:32, 4:].any() and not b[64:, :4].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind, targets, variant", [
    ("gpt2", ["q_proj", "v_proj"], {"use_dora": True}), ("llama", ["c_attn", "down_proj"], {"use_dora": True}),
    ("llama", ["embed_tokens", "c_fc"], {})])
def test_adapters_of_packed_weights(tmp_path, dtype, kind, targets, variant):
    """Written from a model whose weights are packed, and read into one, merged or not: the same as in float32."""
    def packed():
        return tg.nn.quantize(our_model(kind, hf_model(kind)), dtype)

    ours, again, wide = packed(), packed(), our_model(kind, hf_model(kind))
    for name, module in ours.named_modules():  # the values that the packed ones stand for
        if isinstance(getattr(module, "weight", None), tg.nn.PackedWeight):
            wide.get_submodule(name).weight.data = module.weight.widened()
    inject(ours, LoRAConfig(r=3, lora_alpha=7, target_modules=targets, **variant))
    fill(ours)
    expected = logits(ours)
    save_peft(ours, tmp_path)
    for model in (again, wide):
        load_peft(model, tmp_path)
        np.testing.assert_allclose(logits(model), expected, **TOLERANCE)
        np.testing.assert_allclose(logits(merge_and_unload(model)), expected, **TOLERANCE)


def test_initial_values_are_pefts():
    theirs = hf_model("llama")
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=16, target_modules=["down_proj"]))
    a = dict(adapted.named_parameters())[
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight"].detach().numpy()
    ours = our_model("llama", hf_model("llama"))
    inject(ours, LoRAConfig(r=16, target_modules=["down_proj"]))
    part = parts(ours)[0]
    assert part.lora_A.shape == a.shape and not part.lora_B.detach().numpy().any()
    bound = 1 / np.sqrt(a.shape[1])
    for values in (a, part.lora_A.detach().numpy()):
        assert 0.95 * bound < np.abs(values).max() <= bound
        assert abs(values.std() - bound / np.sqrt(3)) < 0.03 * bound


@pytest.mark.parametrize("kind, targets, variant", [
    ("llama", ["q_proj", "down_proj"], {}), ("llama", ["v_proj", "gate_proj"], {"use_dora": True}),
    ("gpt2", ["c_attn", "wte"], {}), ("gpt2", ["c_attn", "mlp.c_proj"], {"use_dora": True})])
def test_gradients_are_pefts(tmp_path, kind, targets, variant):
    theirs = hf_model(kind)
    ours = our_model(kind, theirs)
    inject(ours, LoRAConfig(r=3, lora_alpha=7, target_modules=targets, **variant))
    fill(ours)
    save_peft(ours, tmp_path)
    loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path), is_trainable=True).eval()
    x = torch.tensor(ids())
    torch.nn.functional.cross_entropy(loaded(x).logits.flatten(0, 1), x.flatten()).backward()
    expected = {name.replace(".default", ""): p.grad.numpy() for name, p in loaded.named_parameters()
                if p.grad is not None}
    x = tg.tensor(ids())
    ours(x, x)[1].backward()
    for part in parts(ours):
        module = "base_model.model." + (part.target.llama if kind == "llama" else part.target.name)
        for key, tensor in part.tensors().items():
            key = key + ".weight" if "magnitude" in key else key
            np.testing.assert_allclose(tensor.grad.numpy(), expected.pop(f"{module}.{key}"), rtol=1e-4, atol=1e-5)
    assert not expected


PATTERNS = [
    {"target_modules": ["c_attn"]}, {"target_modules": ["attn.c_proj"]}, {"target_modules": ["c_proj"]},
    {"target_modules": ["proj"]}, {"target_modules": ["transformer.h.1.attn.c_attn"]}, {"target_modules": ["h.1.attn"]},
    {"target_modules": ["lm_head"]}, {"target_modules": "lm_head"}, {"target_modules": "c_attn"},
    {"target_modules": r".*c_attn"}, {"target_modules": r".*\.(q|v)_proj"}, {"target_modules": r"transformer\.h\.\d"},
    {"target_modules": r"transformer\.h\.[01]\.mlp.*"}, {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["mlp.c_proj"]},
    {"target_modules": ["c_attn", "c_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["c_attn", "q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["c_attn", "q_proj"], "layers_to_transform": 1, "layers_pattern": "h"},
    {"target_modules": ["c_attn", "q_proj"], "layers_to_transform": [0, 11], "layers_pattern": ["layers", "h"]},
    {"target_modules": ["transformer.h.0.attn.c_attn", "c_proj"], "layers_to_transform": [1]},
    {"target_modules": ["lm_head", "q_proj"], "layers_to_transform": [0]},
]


@pytest.mark.parametrize("options", PATTERNS, ids=str)
def test_names_match_as_in_peft(options):
    names = {name for kind in ("gpt2", "llama") for name, _ in hf_model(kind).named_modules() if name}
    names |= {name.replace(".1.", ".11.") for name in names}
    names |= {name for target in find_targets(our_model("llama", hf_model("llama"))) for name in target.names}
    theirs = peft.LoraConfig(**options)
    expected = set()
    for name in names:
        found = peft.tuners.tuners_utils.check_target_module_exists(theirs, name)
        if found and type(found).__name__ != "_ExcludedModule":
            expected.add(name)
    ours = LoRAConfig(**options)
    assert {name for name in names if matches(ours, name)} == expected


# ---- folders that do not fit ----

@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter on c_attn of rank 2, and a function that changes its configuration or its tensors."""
    ours = our_model("gpt2", hf_model("gpt2"))
    inject(ours, LoRAConfig(r=2, target_modules=["c_attn"]))
    save_peft(ours, tmp_path)

    def change(tensors=None, **options):
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))
        if tensors:
            weights = tg.load(tmp_path / "adapter_model.safetensors")
            tensors(weights)
            tg.save(weights, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return change


KEY = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize("options, words", [
    ({"peft_type": "IA3"}, "peft_type is IA3"), ({"use_dora": True}, "no tensor .*c_attn.lora_magnitude_vector"),
    ({"use_qalora": True}, "use_qalora"), ({"bias": "all"}, 'bias = "all"'),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"init_lora_weights": "pissa"}, "pissa"),
    ({"r": 4}, r"lora_A.weight has shape \(2, 32\), but r = 4"), ({"r": 0}, "rank"),
    ({"target_modules": ["c_attn", "c_fc"]}, "no tensors for transformer.h.0.mlp.c_fc"),
    ({"target_modules": ["c_fc"]}, "no tensors for"), ({"target_modules": None}, "target_modules is missing"),
    ({"layers_to_transform": [0]}, "tensors for transformer.h.1.attn.c_attn, which target_modules"),
    ({"rank_pattern": {"0.attn.c_attn": 3}}, "r = 3"), ({"target_modules": "("}, "regular expression"),
])
def test_configuration_that_does_not_fit(saved, options, words):
    with pytest.raises(UserError, match=words):
        load_peft(our_model("gpt2", hf_model("gpt2")), saved(**options))


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop(KEY), f"has no tensor {KEY}"),
    (lambda w: [w.pop(KEY), w.pop(KEY.replace("_A", "_B"))], "no tensors for transformer.h.1.attn.c_attn"),
    (lambda w: w.update({"x.weight": w[KEY]}), "unexpected tensor x.weight"),
    (lambda w: w.update({KEY.replace("lora_A.weight", "lora_embedding_A"): w[KEY]}),
     "unexpected tensor .*lora_embedding_A"),
    (lambda w: w.update({KEY.replace("c_attn.lora_A", f"q_attn.lora_{which}"): w[KEY] for which in "AB"}),
     "transformer.h.1.attn.q_attn, which is no layer"),
    (lambda w: w.update({KEY: w[KEY].t()}), r"has shape \(32, 2\)"),
])
def test_tensors_that_do_not_fit(saved, change, words):
    model = our_model("gpt2", hf_model("gpt2"))
    with pytest.raises(UserError, match=words):
        load_peft(model, saved(tensors=change))
    assert not hasattr(model, "lora_configs")  # the model is as it was


def test_pickles_are_refused_and_absent_files_named(tmp_path, saved):
    folder = saved()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load_peft(our_model("gpt2", hf_model("gpt2")), folder)
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        load_peft(our_model("gpt2", hf_model("gpt2")), tmp_path / "nothing")


def test_unknown_options_warn(saved):
    with pytest.warns(UserWarning, match="shiny"):
        load_peft(our_model("gpt2", hf_model("gpt2")), saved(shiny=True, dull=None))


def test_an_adapter_has_no_tensor_of_the_base(tmp_path):
    ours = our_model("gpt2", hf_model("gpt2"))
    inject(ours, LoRAConfig(r=2, target_modules=["c_attn"]))
    save_peft(ours, tmp_path)
    assert len(tg.load(tmp_path / "adapter_model.safetensors")) == len(adapter_state(ours)) == 4

"""Hugging Face folders: models written by transformers read here, ours opened by transformers, damaged ones refused."""
import json
import random

import numpy as np
import pytest
from interop_tools import EXPORTS, MODERN, greedy, logits_of, make_model

import tensorgrad as tg
from gpt.errors import UserError
from gpt.interop import export_hf, load, load_hf, load_with_tokenizer, shape_of
from gpt.text import CharTokenizer
from gpt.text.tokenizers import BPETokenizer

torch = pytest.importorskip("torch", reason="transformers, the oracle, needs torch")
transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed")

LLAMA = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": None,
        "eos_token_id": None}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
THEIRS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2_untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": 40,
                                    "layer_norm_epsilon": 1e-3}),
    "llama": ("Llama", LLAMA | {"tie_word_embeddings": False, "rope_theta": 500.0}),
    "llama_tied": ("Llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "llama_attention_bias": ("Llama", LLAMA | {"attention_bias": True, "head_dim": 16}),
    "llama_mlp_bias": ("Llama", LLAMA | {"mlp_bias": True}),
    "llama3": ("Llama", LLAMA | {"rope_parameters": LLAMA3}),
    "llama_linear": ("Llama", LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0}}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": None}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_bias": ("Qwen3", LLAMA | {"head_dim": 16, "attention_bias": True}),
}
IDS = np.random.default_rng(3).integers(0, 97, (2, 40))


def theirs(kind, **config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    return model


def their_logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(ids))).logits.numpy()


def their_greedy(model, ids, count):
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)
    return out[0].tolist()[len(ids):]


@pytest.mark.parametrize("name", THEIRS)
def test_models_of_transformers(tmp_path, name):
    kind, config = THEIRS[name]
    oracle = theirs(kind, **config)
    oracle.save_pretrained(tmp_path / "theirs")
    model, tokenizer, _ = load_hf(tmp_path / "theirs")
    assert tokenizer is None and not model.training
    assert np.abs(logits_of(model, IDS) - their_logits(oracle)).max() <= 1e-4
    assert greedy(model, IDS[0, :5].tolist(), 20) == their_greedy(oracle, IDS[0, :5].tolist(), 20)
    if name != "qwen3_bias":  # which has no name once its feed-forward has biases too
        export_hf(model, tmp_path / "back")
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
        assert np.abs(their_logits(back) - their_logits(oracle)).max() <= 1e-4


@pytest.mark.parametrize("name", EXPORTS)
def test_our_models_in_transformers(tmp_path, name):
    kind, changes = EXPORTS[name]
    model = make_model(**changes)
    assert export_hf(model, tmp_path / "ours") == kind
    oracle, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()) and oracle.config.model_type == kind
    assert np.abs(their_logits(oracle) - logits_of(model, IDS)).max() <= 1e-4
    assert their_greedy(oracle, IDS[0, :5].tolist(), 20) == greedy(model, IDS[0, :5].tolist(), 20)
    again, _, _ = load_hf(tmp_path / "ours")
    assert np.abs(logits_of(again, IDS) - logits_of(model, IDS)).max() <= 1e-6


@pytest.mark.parametrize("seed", range(10))
def test_random_configurations(tmp_path, seed):
    """Ours in transformers and back, and theirs here: sizes, heads, biases, ties and wavelengths drawn at random."""
    rng = random.Random(seed)
    heads, size, tied = rng.choice([1, 2, 3, 6]), rng.choice([4, 8, 12]), rng.random() < 0.5
    shape = {"vocab_size": rng.randint(30, 90), "n_layer": rng.randint(1, 3), "n_head": heads, "n_embd": heads * size,
             "block_size": rng.randint(24, 64), "tie_weights": tied, "ffn_dim": rng.randint(10, 70),
             "norm_eps": 10.0 ** rng.randint(-6, -2), "bias": rng.random() < 0.5}
    if seed % 2:
        shape |= MODERN | {"n_kv_head": rng.choice([n for n in (1, 2, 3, 6) if heads % n == 0]),
                           "rope_theta": 10.0 ** rng.uniform(1, 6), "qkv_bias": rng.choice([None, True])}
        shape["bias"] = shape["bias"] and shape["qkv_bias"] is None
        shape["head_size"] = rng.choice([None, 16])
    else:
        shape["activation"] = rng.choice(["gelu", "gelu_tanh", "relu", "relu2"])
    model = make_model(seed=seed, **shape)
    ids = np.random.default_rng(seed).integers(0, shape["vocab_size"], (2, 20))
    export_hf(model, tmp_path / "ours")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    expected = their_logits(oracle, ids)
    assert np.abs(expected - logits_of(model, ids)).max() <= 1e-4
    assert their_greedy(oracle, ids[0, :4].tolist(), 12) == greedy(model, ids[0, :4].tolist(), 12)
    oracle.save_pretrained(tmp_path / "theirs")
    back = load_hf(tmp_path / "theirs")[0]
    assert np.abs(logits_of(back, ids) - expected).max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_of_16_bits(tmp_path, dtype):
    kind, config = THEIRS["llama"]
    theirs(kind, **config).to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, _, _ = load_hf(tmp_path)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert np.abs(logits_of(model, IDS) - their_logits(oracle)).max() <= 1e-4


def test_openai_prefix_and_mask_buffers(tmp_path):
    oracle = theirs("GPT2", **GPT2)
    oracle.save_pretrained(tmp_path)
    tensors = tg.load(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for i in range(2):
        bare[f"h.{i}.attn.bias"] = tg.ones(1, 1, 64, 64).bool()
        bare[f"h.{i}.attn.masked_bias"] = tg.tensor(-1e4)
    tg.save(bare, tmp_path / "model.safetensors")
    model, _, _ = load_hf(tmp_path)
    assert np.abs(logits_of(model, IDS) - their_logits(oracle)).max() <= 1e-4


def test_older_config_keys(tmp_path):
    """Before transformers 5, rotary positions stood in rope_theta and rope_scaling, whose kind was called type."""
    oracle = theirs("Llama", **LLAMA, rope_parameters=LLAMA3)
    oracle.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": rope.pop("rope_type")}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _, found = load_hf(tmp_path)
    assert (found.rope_scaling, found.rope_theta, found.rope_factor) == ("llama3", 500.0, 8.0)
    assert np.abs(logits_of(model, IDS) - their_logits(oracle)).max() <= 1e-4


def test_a_sliding_window_bounds_the_block_size(tmp_path):
    theirs("Mistral", **LLAMA, sliding_window=24).save_pretrained(tmp_path)
    assert load_hf(tmp_path)[2].block_size == 24


def test_float16_export_and_padded_vocabulary(tmp_path):
    tokenizer = CharTokenizer("".join(map(chr, range(32, 122))))
    model = make_model()
    export_hf(model, tmp_path / "x", tokenizer, dtype="float16")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    assert oracle.config.vocab_size == 90
    ids = IDS % 90
    assert np.abs(their_logits(oracle, ids) - logits_of(model, ids)[..., :90]).max() < 0.02
    with pytest.raises(UserError, match="is not empty"):
        export_hf(model, tmp_path / "x")
    with pytest.raises(UserError, match="float32 or float16, not as 'int8'"):
        export_hf(model, tmp_path / "y", dtype="int8")


def test_the_tokenizer_comes_along(tmp_path):
    text = "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. " * 5
    tokenizer = BPETokenizer.train(text, 300)
    export_hf(make_model(vocab_size=tokenizer.vocab_size), tmp_path / "x", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    model, ours, config = load_with_tokenizer(tmp_path / "x")
    assert ours.encode(text) == tokenizer.encode(text) and config.vocab_size == tokenizer.vocab_size
    path = load(tmp_path / "x")[1]
    assert path == tmp_path / "x" / "tokenizer.json"
    assert shape_of(tmp_path / "x")["n_embd"] == 32


@pytest.mark.parametrize("changes, reason", [
    ({"norm_position": "post"}, "norm_position post"),
    ({"norm": "rmsnorm"}, "norm rmsnorm with position learned"),
    ({"activation": "swiglu"}, "activation swiglu with position learned"),
    ({"n_kv_head": 2}, "grouped queries with position learned"),
    ({"qk_norm": True}, "qk_norm with position learned"),
    ({"head_size": 16}, "head_size other than"),
    ({"position": "rotary"}, "norm layernorm with rotary positions, activation gelu_tanh"),
    (MODERN | {"qk_norm": True, "bias": True}, "biases with normalized queries and keys"),
])
def test_what_fits_no_architecture_is_refused(tmp_path, changes, reason):
    with pytest.raises(UserError, match="cannot be exported") as error:
        export_hf(make_model(**changes), tmp_path / "x")
    assert reason in str(error.value) and not (tmp_path / "x").exists()


def folder_with(tmp_path, tensors=None, **config):
    export_hf(make_model(**MODERN), tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors:
        file = tmp_path / "x" / "model.safetensors"
        tg.save(tensors(tg.load(file)), file)
    return tmp_path / "x"


def test_all_misfits_are_listed(tmp_path):
    def tensors(found):
        del found["model.norm.weight"]
        found["model.layers.0.mlp.up_proj.weight"] = tg.zeros(3, 4)
        return found | {"model.layers.0.moe.weight": tg.zeros(2)}

    with pytest.raises(UserError) as error:
        load_hf(folder_with(tmp_path, tensors))
    for part in ("missing: model.norm.weight", "unexpected: model.layers.0.moe.weight",
                 "of another shape: model.layers.0.mlp.up_proj.weight (3, 4), not ("):
        assert part in str(error.value)


@pytest.mark.parametrize("config, message", [
    ({"model_type": "mamba"}, "models of type 'mamba' are not read here"),
    ({"model_type": None}, "model_type is missing"),
    ({"hidden_size": "32"}, "hidden_size is '32', not of type int"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is a computation that is not done here"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "type 'yarn' are not done here"),
    ({"rope_parameters": [1]}, "not a table"),
    ({"num_hidden_layers": 10**9}, "do not belong together"),
    ({"vocab_size": 10**12}, "do not belong together"),
    ({"intermediate_size": 10**12}, "do not belong together"),
    ({"num_attention_heads": 0}, "n_head must be a whole number of at least 1"),
    ({"rms_norm_eps": -1.0}, "norm_eps must be above 0"),
])
def test_hostile_and_foreign_configurations(tmp_path, config, message):
    with pytest.raises(UserError) as error:
        load_hf(folder_with(tmp_path, **config))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_names_that_are_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no name of a model on the hub"):
        load("no such thing")
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    for name in ("../gone", "./gone", "a/b.git", "a--b/c", "gone/" + "b" * 99, "a/..", "~/gone"):
        with pytest.raises(UserError, match="no name of a model on the hub"):
            load(name)
    with pytest.raises(UserError, match="nobody/nothing-at-all: no such file or folder, and the hub gives none"):
        load("nobody/nothing-at-all")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="is a pickle"):
        load(tmp_path / "model.bin")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="give the folder"):
        load(tmp_path / "model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run folder"):
        load(tmp_path / "empty")

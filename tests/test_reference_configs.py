"""The configurations of the reference systems: their hyper-parameters, and that each trains, samples and resumes."""
from pathlib import Path

import pytest
from text_data import use_tiktoken_files
from tiny_run import flags

from gpt.cli import sample, train
from gpt.training import TrainConfig, read_metrics
from gpt.training.settings import read_toml

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "reference"
TEXT = "the list of the names is sorted by the name of the function.\nit returns the names of the list.\n" * 60
PLAIN = {"gradient_accumulation_steps": 1}
SYSTEM_3 = {"tokenizer": "word:2000", "block_size": 512, "sequence_length": 128, "dropout": 0.1, "batch_size": 32,
            "position": "sinusoidal", "activation": "relu", "learning_rate": 1e-4, "weight_decay": 0.01,
            "schedule": "cosine", "optimizer": "adamw", "grad_clip": 1.0, "n_head": 8}
STATED = {  # what the systems' own texts and code state
    "0": {"n_layer": 6, "n_head": 8, "n_embd": 64, "norm_position": "post", "activation": "relu", "position": "learned",
          "tie_weights": True, "tokenizer": "char", "block_size": 64, "batch_size": 32, "max_iters": 5000,
          "warmup_iters": 100, "min_lr": 3e-5 * 2048, "learning_rate": 3e-4 * 2048, "optimizer": "sgd", "beta1": 0.0,
          "weight_decay": 0.0},
    "0_lora": {"lora_r": 8, "lora_alpha": 1.0, "lora_targets": "q_proj,v_proj", "lora_dropout": 0.0, "optimizer": "sgd",
               "schedule": "linear", "beta1": 0.0},
    "1": {"tokenizer": "cl100k_base", "position": "sinusoidal", "activation": "relu", "optimizer": "adamw"},
    "1_pairs": {"data": "pairs", "position": "sinusoidal", "activation": "relu", "optimizer": "adamw"},
    "2": {"tokenizer": "gpt2", "activation": "gelu", "ffn_dim": None},
    "3": SYSTEM_3 | {"n_embd": 256, "n_layer": 6, "ffn_dim": 1024},
    "3_small": SYSTEM_3 | {"n_embd": 128, "n_layer": 3},
    "3_large": SYSTEM_3 | {"n_embd": 512, "n_layer": 12},
    "4": {"n_layer": 12, "n_head": 8, "n_embd": 256, "block_size": 128, "batch_size": 16, "learning_rate": 3e-4,
          "dropout": 0.1, "activation": "relu", "max_iters": 10000, "eval_interval": 50, "eval_iters": 20,
          "tokenizer": "cl100k_base", "tie_weights": False, "ffn_dim": None},
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.toml")))
def test_hyper_parameters_are_those_stated(name):
    config = TrainConfig(**read_toml(FOLDER / f"{name}.toml", TrainConfig))
    for field, value in (PLAIN | STATED[name]).items():
        assert getattr(config, field) == (pytest.approx(value) if isinstance(value, float) else value), field
    assert config.warmup_iters in (0, 100) and config.out_dir == "out-reference-" + name.replace("_", "-")


@pytest.mark.parametrize("name", [name for name in STATED if name != "0_lora"])
def test_it_trains_samples_and_resumes(tmp_path, monkeypatch, capfd, name):
    config = read_toml(FOLDER / f"{name}.toml", TrainConfig)
    if config["tokenizer"] in ("gpt2", "cl100k_base"):
        use_tiktoken_files(monkeypatch, tmp_path / "tiktoken")
    (tmp_path / "text.txt").write_text(TEXT)
    # its own model but for width and depth, on any text
    changes = {"n_layer": 2, "n_embd": 16, "ffn_dim": 48, "n_head": 2, "batch_size": 2, "max_iters": 2,
               "eval_interval": 10, "eval_iters": 1, "log_interval": 1, "block_size": min(config["block_size"], 64),
               "sequence_length": min(config["block_size"], 32), "out_dir": tmp_path / "out"}
    changes |= {} if name == "1_pairs" else {"data": tmp_path / "text.txt"}
    toml = str(FOLDER / f"{name}.toml")
    assert train([toml, *flags(changes)]) == 0, capfd.readouterr().err
    assert train(["--resume", str(tmp_path / "out"), "--max_iters", "3"]) == 0, capfd.readouterr().err
    records = read_metrics(tmp_path / "out/metrics.jsonl")
    assert [r["iter"] for r in records if "loss" in r] == list(range(3))
    if name == "0":
        changes = {"init_from": tmp_path / "out", "data": tmp_path / "text.txt", "out_dir": tmp_path / "tuned",
                   "max_iters": 2, "eval_interval": 10, "eval_iters": 1}
        assert train([str(FOLDER / "0_lora.toml"), *flags(changes)]) == 0, capfd.readouterr().err
        assert train(["--resume", str(tmp_path / "tuned"), "--max_iters", "3"]) == 0, capfd.readouterr().err
    capfd.readouterr()
    prompt = "1" if name == "1_pairs" else "the"
    for run in ("out", "tuned") if name == "0" else ("out",):
        assert sample(["--init_from", str(tmp_path / run), "--prompt", prompt, "--max_new_tokens", "5"]) == 0
        assert capfd.readouterr().out.startswith(prompt)


def test_the_toy_pairs_are_learned(tmp_path, capfd):
    assert train([str(FOLDER / "1_pairs.toml"), "--out_dir", str(tmp_path / "out")]) == 0, capfd.readouterr().err
    capfd.readouterr()
    assert sample(["--init_from", str(tmp_path / "out"), "--prompt", "1", "--max_new_tokens", "8",
                   "--temperature", "0"]) == 0
    assert capfd.readouterr().out.split() == "1 5 2 6 3 7 4 8 9".split()

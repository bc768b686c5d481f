"""Fine-tuning with adapters: what is learned, what is kept, resuming, merging, and the command line."""
import json

import numpy as np
import pytest
from tiny_run import TEXT, flags, tiny_config

import tensorgrad as tg
from gpt.cli import train as train_program
from gpt.errors import UserError
from gpt.model.lora import adapter_names, adapter_state
from gpt.training import TrainConfig, load_run, read_metrics, train
from gpt.training.config import resolve

LORA = {"lora_r": 4, "lora_alpha": 8.0, "lora_targets": "c_attn,c_fc", "learning_rate": 2e-2, "dropout": 0.1}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def base(tmp_path):
    """A trained run in tmp_path/base."""
    train(tiny_config(tmp_path, out_dir=str(tmp_path / "base"), max_iters=60, eval_interval=60), say=quiet)
    return tmp_path / "base"


def quiet(text):
    pass


def tune(base, out, **changes):
    values = json.loads(json.dumps(vars(tiny_config(base.parent)))) | LORA | {
        "data": str(other_text(base.parent)), "init_from": str(base), "out_dir": str(out)}
    return TrainConfig(**values | changes)


def other_text(folder):
    """What the base has not seen: the same signs in other places."""
    path = folder / "other.txt"
    path.write_text("".join(line[::-1] + "\n" for line in TEXT.splitlines()))
    return path


def run(config):
    said = []
    trainer = train(config, say=said.append)
    return trainer, "\n".join(said)


def test_the_adapter_learns_and_is_all_that_is_kept(base, tmp_path):
    before = {name: t.numpy().copy() for name, t in load_run(base)[0].state_dict().items()}
    trainer, said = run(tune(base, tmp_path / "tuned", max_iters=60, eval_interval=20))
    losses = [r["val_loss"] for r in read_metrics(tmp_path / "tuned/metrics.jsonl") if "val_loss" in r]
    assert losses[-1] < 0.8 * losses[0]
    for name, tensor in trainer.model.state_dict().items():
        if name in before:
            np.testing.assert_array_equal(tensor.numpy(), before[name])
    assert "LoRA of rank 4 on 2 projections" in said and "adapter.safetensors" in said
    for folder in (tmp_path / "tuned", tmp_path / "tuned/last"):
        assert not (folder / "model.safetensors").exists()
        assert set(tg.load(folder / "adapter.safetensors")) == set(adapter_state(trainer.model))
    state = json.loads((tmp_path / "tuned/last/train_state.json").read_text())["optimizer"]
    assert len(state) == 4  # two layers, A and B


def test_a_run_with_an_adapter_is_opened_on_its_base(base, tmp_path):
    run(tune(base, tmp_path / "tuned"))
    model, tokenizer, _ = load_run(tmp_path / "tuned")
    assert adapter_names(model) == ["default"] and tokenizer.name == "char"
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no longer there"):
        load_run(tmp_path / "tuned")


@pytest.mark.parametrize("changes, kept", [({"use_dora": True}, 6), ({"lora_targets": "wte,c_attn"}, 4)])
def test_lengths_and_embeddings_learn_and_are_kept(base, tmp_path, changes, kept):
    trainer, _ = run(tune(base, tmp_path / "tuned", max_iters=40, eval_interval=20, **changes))
    losses = [r["val_loss"] for r in read_metrics(tmp_path / "tuned/metrics.jsonl") if "val_loss" in r]
    assert losses[-1] < 0.9 * losses[0]
    assert len(tg.load(tmp_path / "tuned/adapter.safetensors")) == kept
    model = load_run(tmp_path / "tuned")[0]
    state = adapter_state(trainer.model)
    assert all((tensor.numpy() == state[name].numpy()).all() for name, tensor in adapter_state(model).items())


def test_resuming_repeats_the_bits(base, tmp_path):
    whole, _ = run(tune(base, tmp_path / "whole", lora_dropout=0.2))
    run(tune(base, tmp_path / "parts", lora_dropout=0.2, max_iters=4, lr_decay_iters=12))
    resumed, _ = run(resolve({"resume": str(tmp_path / "parts"), "max_iters": 12}))
    assert resumed.iteration == whole.iteration == 12
    state = adapter_state(resumed.model)
    for name, tensor in adapter_state(whole.model).items():
        np.testing.assert_array_equal(state[name].numpy(), tensor.numpy())


def test_merging_gives_a_plain_run(base, tmp_path):
    run(tune(base, tmp_path / "tuned", lora_merge=True))
    adapted, plain = load_run(tmp_path / "tuned")[0], load_run(tmp_path / "tuned/merged")[0]
    assert not adapter_names(plain)
    x = tg.randint(0, 10, (2, 16))
    with tg.no_grad():
        np.testing.assert_allclose(plain(x, x)[0].numpy(), adapted(x, x)[0].numpy(), rtol=0, atol=2e-5)
    run(tune(tmp_path / "tuned/merged", tmp_path / "again", lora_r=0, data=str(other_text(tmp_path))))


def test_overwriting_takes_all_of_a_run_and_nothing_else(base, tmp_path):
    out = tmp_path / "tuned"
    (out / "merged").mkdir(parents=True)
    (out / "merged/mine.txt").write_text("mine")
    run(tune(base, out, max_iters=1))
    assert (out / "merged/mine.txt").exists()
    (out / "merged/mine.txt").unlink()
    run(tune(base, out, max_iters=1, lora_merge=True, overwrite=True))
    run(tune(base, out, max_iters=1, lora_r=0, overwrite=True))
    assert not (out / "merged").exists() and not (out / "adapter.safetensors").exists()


def test_an_adapter_can_be_the_base_of_another(base, tmp_path):
    run(tune(base, tmp_path / "one"))
    run(tune(base, tmp_path / "two", init_from=str(tmp_path / "one"), lora_targets="lm_head"))
    model = load_run(tmp_path / "two")[0]
    assert list(adapter_state(model)) == ["lm_head.lora_A.weight", "lm_head.lora_B.weight"]
    run(tune(base, tmp_path / "all", init_from=str(tmp_path / "one"), lora_r=0))  # and of all weights
    assert (tmp_path / "all/model.safetensors").exists()


@pytest.mark.parametrize("changes, words", [
    ({"init_from": "scratch"}, "--init_from"), ({"lora_targets": "c_atn"}, "did you mean c_attn"),
    ({"dropout": 0.3}, "dropout = 0.3, but .* has 0.1"), ({"lora_r": -1}, "lora_r"),
    ({"lora_targets": ""}, "target_modules is empty"), ({"block_size": 32}, "block_size = 32"),
])
def test_settings_that_do_not_fit(base, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        run(tune(base, tmp_path / "tuned", **changes))
    assert not (tmp_path / "tuned").exists()


def test_from_the_command_line_on_examples(base, tmp_path, capfd):
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a} and {b} ", "completion": "is less less\n"}) + "\n"
                            for a in range(12) for b in range(5)))
    given = {"init_from": base, "data": data, "out_dir": tmp_path / "tuned", "lora_r": 4, "max_iters": 20,
             "eval_interval": 10, "batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
             "warmup_iters": 1, "lora_targets": "regex:.*c_attn", "lora_merge": "true"}
    assert train_program(flags(given)) == 0
    said = capfd.readouterr().out
    assert "60 examples" in said and "54 to train on, 6 for validation" in said
    losses = [r["val_loss"] for r in read_metrics(tmp_path / "tuned/metrics.jsonl") if "val_loss" in r]
    assert losses[-1] < 0.9 * losses[0]
    assert json.loads((tmp_path / "tuned/peft/adapter_config.json").read_text())["target_modules"] == ["attn.c_attn"]
    assert (tmp_path / "tuned/merged/model.safetensors").exists()
    assert train_program(["--resume", str(tmp_path / "tuned"), "--max_iters", "22"]) == 0


def test_examples_need_a_model(tmp_path, capfd):
    data = tmp_path / "x.jsonl"
    data.write_text('{"text": "a"}\n')
    assert train_program(["--data", str(data), "--out_dir", str(tmp_path / "out")]) == 2
    assert "--init_from" in capfd.readouterr().err

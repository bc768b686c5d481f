"""scripts/finetune.py on all kinds of data, with LoRA and all weights; activation checkpointing; what counts how."""
import json
import mmap

import numpy as np
import pytest
from interop_tools import MODERN, make_model
from text_data import data_file
from tiny_run import flags, tiny_config, tiny_trainer

import tensorgrad as tg
from gpt.cli import finetune as finetune_program
from gpt.errors import UserError
from gpt.interop import export_hf, load_with_tokenizer
from gpt.model.lora import LoRAConfig, inject
from gpt.model.lora_layers import LoRALinear
from gpt.text.finetune import load_examples
from gpt.text.tokenizers import BPETokenizer
from gpt.training import Trainer, read_metrics
from gpt.training.checkpoints import load_weights
from gpt.training.config import TrainConfig, read_run
from gpt.training.run import make_trainer
from tensorgrad import nn

TEXT = "the quick brown fox jumps over the lazy dog. who jumps? the quick brown fox. " * 40
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TOKENIZER = BPETokenizer.train(TEXT, 300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
TOKENIZER.chat_template = TEMPLATE
QUICK = {"max_iters": 12, "eval_interval": 6, "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 2e-2,
         "warmup_iters": 1, "log_interval": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def base(tmp_path):
    export_hf(make_model(**MODERN, vocab_size=TOKENIZER.vocab_size), tmp_path / "base", TOKENIZER)
    return tmp_path / "base"


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def data_of(kind, folder):
    """Forty examples of a kind, or a text."""
    if kind == "plain":
        (folder / "plain.txt").write_text(TEXT)
        return folder / "plain.txt"
    answers = [("who jumps?", "the quick brown fox."), ("over whom?", "the lazy dog.")] * 20
    return lines(folder / f"{kind}.jsonl", [
        {"text": f"{q} {a}"} if kind == "text" else {"prompt": q, "completion": f" {a}"} if kind == "prompts" else
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in answers])


@pytest.mark.parametrize("kind", ["plain", "text", "prompts", "chat"])
@pytest.mark.parametrize("lora", [True, False])
def test_every_kind_of_data(base, tmp_path, capfd, kind, lora):
    if kind == "chat":
        pytest.importorskip("jinja2", reason="chat templates need jinja2 (extra hf)")
    out = tmp_path / "out"
    given = QUICK | {"init_from": base, "data": data_of(kind, tmp_path), "out_dir": out} | ({} if lora else {
        "lora_r": 0, "learning_rate": 5e-3})
    if kind == "plain":
        given["sequence_length"] = 16
    assert finetune_program(flags(given)) == 0, capfd.readouterr().err
    said = capfd.readouterr().out
    losses = [r["val_loss"] for r in read_metrics(out / "metrics.jsonl") if "val_loss" in r]
    assert len(losses) == 3 and min(losses) < 0.8 * losses[0]
    assert f"perplexity {np.exp(losses[0]):.3f} before, {np.exp(min(losses)):.3f} after" in said
    assert (out / "peft/adapter_model.safetensors").exists() == lora
    assert (out / "adapter.safetensors").exists() == lora and (out / "model.safetensors").exists() != lora
    model, tokenizer, config = load_with_tokenizer(out)
    assert tokenizer.chat_template == TEMPLATE and config.activation_checkpointing
    assert config.block_size == 48 and config.window == (16 if kind == "plain" else 48)


def test_the_best_adapter_is_kept(base, tmp_path, capfd):
    """What is held out says something else than what is learned: it gets likelier at first, and then less so."""
    rows = [{"prompt": "who jumps?", "completion": " the quick brown fox. " if n < 18 else " the lazy dog. "}
            for n in range(20)]
    given = QUICK | {"init_from": base, "data": lines(tmp_path / "x.jsonl", rows), "out_dir": tmp_path / "out",
                     "max_iters": 30, "eval_interval": 3, "schedule": "constant"}
    assert finetune_program(flags(given)) == 0, capfd.readouterr().err
    losses = {r["iter"]: r["val_loss"] for r in read_metrics(tmp_path / "out/metrics.jsonl") if "val_loss" in r}
    best = min(losses, key=losses.get)
    assert 0 < best < 30 and losses[30] > losses[best] + 0.1
    model, tokenizer, config = load_with_tokenizer(tmp_path / "out")
    dataset = load_examples(config.data, tokenizer, config.window)
    trainer = Trainer(model, config, dataset)
    assert trainer.evaluate().loss == pytest.approx(losses[best], abs=1e-5)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_base_in_fewer_bits(base, tmp_path, capfd, kind):
    """The frozen matrices are packed while the adapter learns, and after a resume; the result works on any base."""
    out = tmp_path / "out"
    given = QUICK | {"init_from": base, "data": data_of("prompts", tmp_path), "out_dir": out, "base_dtype": kind}
    assert finetune_program(flags(given | {"max_iters": 6, "lr_decay_iters": 12})) == 0, capfd.readouterr().err
    assert finetune_program(["--resume", str(out), "--max_iters", "12"]) == 0, capfd.readouterr().err
    losses = [r["val_loss"] for r in read_metrics(out / "metrics.jsonl") if "val_loss" in r]
    assert min(losses) < 0.8 * losses[0]
    config = TrainConfig(**read_run(out))
    assert config.base_dtype == kind
    trainer = make_trainer(config, lambda text: None, load_with_tokenizer)
    weights = [layer.weight for layer in trainer.model.modules() if isinstance(layer, LoRALinear)]
    assert weights and all(isinstance(weight, nn.PackedWeight) for weight in weights)
    load_weights(trainer.model, out)
    assert trainer.evaluate().loss == pytest.approx(min(losses), abs=1e-5)
    plain, _, _ = load_with_tokenizer(out)  # on the base as it is stored
    assert Trainer(plain, config, trainer.dataset).evaluate().loss == pytest.approx(min(losses), abs=0.1)


@pytest.mark.parametrize("changes", [{"lora_r": 0}, {"dtype": "float64"}, {"device": "cuda"}])
def test_fewer_bits_are_for_frozen_weights_on_a_cpu(base, tmp_path, capfd, changes):
    given = QUICK | {"init_from": base, "data": data_of("plain", tmp_path), "out_dir": tmp_path / "x",
                     "base_dtype": "int8"} | changes
    assert finetune_program(flags(given)) == 2 and "base_dtype = int8 is for" in capfd.readouterr().err


def test_short_sequences_leave_the_model_its_length(base, tmp_path, capfd):
    """All weights of a model that reads 48 tokens, trained on 8 at a time: it still reads 48."""
    given = QUICK | {"init_from": base, "data": data_of("prompts", tmp_path), "out_dir": tmp_path / "x",
                     "max_iters": 1, "lora_r": 0, "sequence_length": 8}
    assert finetune_program(flags(given)) == 0, capfd.readouterr().err
    assert "cut to 8 tokens" in capfd.readouterr().out
    model, _, config = load_with_tokenizer(tmp_path / "x")
    assert model.config.block_size == config.block_size == 48 and config.window == 8


@pytest.mark.parametrize("line, words", [
    ('{"prompt": "a"}', "each line must be one of"), ("{", "no JSON"), ('{"text": 3}', "'text' must be text"),
    ('{"messages": [{"role": "robot", "content": ""}]}', '"messages" must be a list'),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no message of the assistant"),
])
def test_errors_name_file_and_line(base, tmp_path, capfd, line, words):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    assert finetune_program(["--init_from", str(base), "--data", str(tmp_path / "bad.jsonl")]) == 2
    said = capfd.readouterr().err
    assert words in said and "bad.jsonl, line 3" in said and said.count("\n") == 1


def test_something_is_left_to_train_on(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"text": "the lazy dog"}] * 3)
    assert [len(split) for split in (load_examples(path, TOKENIZER, 48, 0.99).train,
                                     load_examples(path, TOKENIZER, 48, 1e-9).val)] == [1, 1]
    with pytest.raises(UserError, match="has 1 usable examples; at least 2"):
        load_examples(lines(tmp_path / "x.jsonl", [{"text": "the lazy dog"}]), TOKENIZER, 48)


def test_help_shows_the_defaults_of_fine_tuning(capsys):
    with pytest.raises(SystemExit) as stop:
        finetune_program(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "--lora_targets STR" in shown and "(default: all-linear)" in shown and "(default: out-finetune)" in shown


def test_the_published_weights_of_reference_system_0(tmp_path, capfd):
    """An adapter of its queries and values learns the text that its own was made for."""
    characters = set(json.loads(data_file("reference0/vocab.json").read_text())["chars"])
    text = data_file("reference0/python_fundamentals.txt").read_text(encoding="utf-8")[:100_000]
    (tmp_path / "text.txt").write_text("".join(c for c in text if c in characters))
    given = {"init_from": data_file("reference0/my_model.npz"), "data": tmp_path / "text.txt",
             "out_dir": tmp_path / "out", "lora_targets": "q_proj,v_proj", "sequence_length": 64, "batch_size": 8,
             "gradient_accumulation_steps": 1, "max_iters": 30, "eval_interval": 30, "learning_rate": 2e-2}
    assert finetune_program(flags(given)) == 0, capfd.readouterr().err
    losses = [r["val_loss"] for r in read_metrics(tmp_path / "out/metrics.jsonl") if "val_loss" in r]
    assert losses[-1] < 0.9 * losses[0]
    assert load_with_tokenizer(tmp_path / "out")[1].vocab_size == 131


def test_a_model_is_needed(tmp_path, capfd):
    assert finetune_program(["--data", "x.jsonl"]) == 2
    assert "--init_from" in capfd.readouterr().err


@pytest.mark.parametrize("lora", [True, False])
def test_checkpointing_gives_the_same_bits_in_less_memory(tmp_path, lora):
    """With dropout in the model and in the adapter; the kept activations are what shrinks."""
    found, kept = [], []
    for checkpointing in (False, True):
        config = tiny_config(tmp_path, activation_checkpointing=checkpointing, n_layer=4, batch_size=8, max_iters=3)
        trainer = tiny_trainer(config)
        if lora:
            inject(trainer.model, LoRAConfig(r=2, target_modules="all-linear", lora_dropout=0.1))
            trainer = Trainer(trainer.model, config, trainer.dataset)
        trainer.model.train()
        x = tg.zeros(8, 16, dtype=tg.int64)
        _, loss = trainer.model(x, x)
        kept.append(sum(1 for _ in nodes_of(loss)))
        del loss
        trainer.fit()
        found.append({name: p.numpy() for name, p in trainer.model.state_dict().items()})
    for name, plain in found[0].items():
        np.testing.assert_array_equal(found[1][name], plain)
    assert kept[1] < kept[0] / 3


def nodes_of(tensor):
    """The operations of the graph behind a tensor."""
    from tensorgrad.engine import Leaf
    from tensorgrad.walk import parents_of

    seen, stack = set(), [tensor.node]
    while stack:
        node = stack.pop()
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            if not isinstance(node, Leaf):
                yield node
            stack.extend(parents_of(node))


def test_every_target_counts_alike(base, tmp_path):
    """Batches of different numbers of learned tokens, accumulated, are one batch of them all."""
    data = lines(tmp_path / "x.jsonl", [{"prompt": "who", "completion": " the quick brown fox jumps over the dog"},
                                        {"prompt": "whom over the lazy", "completion": " dog"}] * 2)
    gradients = []
    for parts in (1, 2):
        model, tokenizer, _ = load_with_tokenizer(base)
        config = tiny_config(tmp_path, batch_size=2 // parts, gradient_accumulation_steps=parts, block_size=48)
        trainer = Trainer(model, config, load_examples(data, tokenizer, 48, 0.5))
        for p in model.parameters():
            p.requires_grad_(True)
        loss = trainer._accumulate_gradients()
        gradients.append((float(loss), {name: p.grad.numpy().copy() for name, p in model.named_parameters()}))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for name, whole in gradients[0][1].items():
        np.testing.assert_allclose(gradients[1][1][name], whole, atol=1e-5 * max(1, np.abs(whole).max()))


def test_frozen_weights_stay_mapped_from_the_file(base, tmp_path):
    """After training steps, too; they have no gradient, and the optimizer keeps nothing for them."""
    model, tokenizer, _ = load_with_tokenizer(base)
    config = tiny_config(tmp_path, block_size=48)
    inject(model, LoRAConfig(r=2, target_modules="all-linear"))
    trainer = Trainer(model, config, load_examples(data_of("prompts", tmp_path), tokenizer, 48))
    trainer.model.train()
    for _ in range(2):
        trainer._train_step()
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 16 and all(p.grad is None for p in frozen.values())
    assert not any(is_mapped(p.array) for p in trained)
    for name in ("transformer.wte.weight", "transformer.h.1.attn.c_proj.weight", "transformer.h.0.mlp.c_proj.weight"):
        assert is_mapped(frozen[name].array), name
    kept = sum(t.numel() for state in trainer.optimizer.state_dict()["state"].values() for t in state.values()
               if hasattr(t, "numel") and t.ndim)
    assert kept == 2 * sum(p.numel() for p in trained)  # AdamW's two moments


def is_mapped(array):
    while array is not None and not isinstance(array, mmap.mmap):
        array = array.obj if isinstance(array, memoryview) else array.base
    return array is not None

"""The programs with models of others: sample, convert, and training from them."""
import json

import numpy as np
import pytest
from interop_tools import MODERN, logits_of, make_model

from gpt.cli import convert_model, finetune, sample, train
from gpt.interop import export_gguf, export_hf, load, load_with_tokenizer, shape_of
from gpt.text.tokenizers import BPETokenizer

pytest.importorskip("gguf", reason="the package gguf is not installed")

TEXT = "the quick brown fox jumps over the lazy dog\n" * 60
TOKENIZER = BPETokenizer.train(TEXT, 280)


@pytest.fixture
def sources(tmp_path):
    """{format: path} of one model."""
    model = make_model(**MODERN, vocab_size=TOKENIZER.vocab_size)
    export_hf(model, tmp_path / "hf", TOKENIZER)
    export_gguf(model, tmp_path / "x.gguf", TOKENIZER)
    return model, {"hf": tmp_path / "hf", "gguf": tmp_path / "x.gguf"}


def test_sample_reads_all(sources, capsys):
    _, paths = sources
    texts = []
    for path in paths.values():
        assert sample(["--init_from", str(path), "--prompt", "the", "--temperature", "0", "--max_new_tokens", "9"]) == 0
        texts.append(capsys.readouterr().out)
    assert len(texts) == 2 and texts[0] == texts[1] and texts[0].startswith("the")


@pytest.mark.parametrize("source", ["hf", "gguf"])
def test_training_goes_on_from_it(sources, tmp_path, capsys, source):
    model, paths = sources
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--data", str(tmp_path / "text.txt"), "--init_from", str(paths[source]), "--out_dir",
             str(tmp_path / "run"), "--max_iters", "5", "--eval_interval", "5", "--eval_iters", "2",
             "--batch_size", "2", "--warmup_iters", "0", "--gradient_accumulation_steps", "1",
             "--learning_rate", "1e-2", "--block_size", "32"]
    assert train(flags) == 0, capsys.readouterr().err
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = [line["val_loss"] for line in losses if "val_loss" in line]
    assert values[-1] < values[0] - 0.2
    trained, _, config = load_with_tokenizer(tmp_path / "run")
    assert (config.n_kv_head, config.position, config.block_size) == (2, "rotary", 32)
    ids = [TOKENIZER.encode("the quick")]
    assert np.abs(logits_of(trained, ids) - logits_of(model, ids)).max() > 0.1


def test_convert_between_all_formats(sources, tmp_path, capsys):
    model, paths = sources
    ids = [TOKENIZER.encode("the quick")]
    expected = logits_of(model, ids)
    hf, run, gguf = str(paths["hf"]), str(tmp_path / "run"), str(tmp_path / "y.gguf")
    for source, target, flags in ((hf, run, ["--to", "run"]), (run, gguf, []), (gguf, str(tmp_path / "again"), []),
                                  (run, str(tmp_path / "half.gguf"), ["--dtype", "float16"])):
        assert convert_model([source, target, *flags]) == 0, capsys.readouterr().err
        found, tokenizer, _ = load_with_tokenizer(target)
        assert np.abs(logits_of(found, ids) - expected).max() <= (1e-2 if "float16" in flags else 1e-5)
        assert tokenizer.encode("fox") == TOKENIZER.encode("fox")
        assert "wrote" in capsys.readouterr().out
    assert load(run)[1] == tmp_path / "run" / "tokenizer.json"


def test_convert_says_what_is_wrong(sources, tmp_path, capsys):
    _, paths = sources
    for words, message in (([str(paths["hf"])], "give a source and a target"),
                           ([str(paths["hf"]), str(paths["hf"])], "is not empty"),
                           ([str(paths["hf"]), str(tmp_path / "z"), "--to", "run", "--dtype", "float16"], "as float32"),
                           ([str(paths["hf"]), str(tmp_path / "z"), "--lora", "x.npz"], "x.npz is no PEFT folder"),
                           ([str(paths["hf"]), str(tmp_path / "z"), "--to", "peft"], "has no adapter"),
                           ([str(paths["hf"]), str(tmp_path / "z.npz")], "name of a file, and hf makes a folder"),
                           ([str(tmp_path / "no"), str(tmp_path / "z")], "no such file or folder")):
        assert convert_model(words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "z").exists() and not (tmp_path / "z.npz").exists()


def test_adapters_are_sources_and_targets(sources, tmp_path, capsys):
    """A run that trained an adapter, its PEFT folder, the base with that folder: the same model, everywhere."""
    model, paths = sources
    (tmp_path / "text.txt").write_text(TEXT)
    run, peft = str(tmp_path / "run"), str(tmp_path / "run/peft")
    assert finetune(["--init_from", str(paths["hf"]), "--data", str(tmp_path / "text.txt"), "--out_dir", run,
                     "--max_iters", "3", "--eval_interval", "3", "--eval_iters", "1", "--sequence_length", "16"]) == 0
    ids = [TOKENIZER.encode("the quick")]
    expected = logits_of(load(run)[0], ids)
    assert np.abs(expected - logits_of(model, ids)).max() > 1e-2
    hf, gguf, again = str(tmp_path / "merged"), str(tmp_path / "merged.gguf"), str(tmp_path / "again")
    for source, target, flags in ((peft, hf, []), (str(paths["gguf"]), gguf, ["--lora", peft]),
                                  (run, again, ["--to", "peft"]), (peft, str(tmp_path / "more"), ["--to", "peft"])):
        assert convert_model([source, target, *flags]) == 0, capsys.readouterr().err
        found, tokenizer, _ = load_with_tokenizer(target)
        assert np.abs(logits_of(found, ids) - expected).max() <= 1e-5
        assert tokenizer.encode("fox") == TOKENIZER.encode("fox")
    assert shape_of(peft)["n_embd"] == model.config.n_embd
    config = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(paths["hf"])
    assert sample(["--init_from", peft, "--prompt", "the", "--max_new_tokens", "3"]) == 0


@pytest.mark.parametrize("content, message", [
    ("{", "not readable as JSON"), ("[]", "no object"), ('{"peft_type": "LORA"}', "which model the adapter belongs to"),
    ('{"peft_type": "LORA", "base_model_name_or_path": 3}', "which model"),
    ('{"peft_type": "LORA", "base_model_name_or_path": "."}', "is an adapter as well"),
    ('{"peft_type": "LORA", "base_model_name_or_path": "gone"}', "no such file or folder"),
])
def test_adapters_without_a_base(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "adapter_config.json").write_text(content)
    assert sample(["--init_from", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1

"""The programs train.py and sample.py: a run from the first step to a sample, Ctrl-C, and every wrong input."""
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import FIELDS, TEXT, environment, flags, losses

import tensorgrad as tg
from gpt import cli
from gpt.errors import UserError
from gpt.text import prepare
from gpt.training import read_metrics

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORGRAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fields(tmp_path):
    (tmp_path / "sums.txt").write_text(TEXT)
    return FIELDS | {"data": tmp_path / "sums.txt", "out_dir": tmp_path / "out"}


def start(script, *arguments, folder):
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=environment(folder))


def run(script, *arguments, folder):
    process = start(script, *arguments, folder=folder)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_train_resume_and_sample(fields, tmp_path, capsys):
    """The scripts as a user calls them, from another folder: 8 of 12 steps, the other 4, a text; and the run that was
    resumed has the metrics of one that was not."""
    code, out, err = run("train.py", *flags(fields | {"max_iters": 8, "lr_decay_iters": 12}), folder=tmp_path)
    assert (code, err) == (0, "")
    for word in ("parameters", "64 tokens", "sums", "sha256", str(tmp_path / "out"), "max_iters=8", "best val loss"):
        assert word in out, word
    assert "bias=" not in out  # only what differs from the defaults
    assert f"sample.py --init_from {tmp_path / 'out'}" in out

    code, out, err = run("train.py", "--resume", tmp_path / "out", "--max-iters=12", folder=tmp_path)
    assert (code, err) == (0, "")

    whole = fields | {"out_dir": tmp_path / "whole", "lr_decay_iters": 12}
    code, out, err = run("train.py", *flags(whole), folder=tmp_path)
    assert (code, err) == (0, "")
    resumed, uninterrupted = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("out", "whole"))
    assert losses(resumed) == losses(uninterrupted)

    code, out, err = run("sample.py", "--init_from", tmp_path / "out", "--prompt", "12 and ", "--max_new_tokens", 20,
                         "--num_samples", 2, folder=tmp_path)
    assert (code, err) == (0, "")
    texts = out.split("\n---\n")
    assert len(texts) == 2 and all(text.startswith("12 and ") for text in texts)
    assert len(out.removesuffix("\n").replace("\n---\n", "")) == 2 * (len("12 and ") + 20)
    capsys.readouterr()
    again = ["--init_from", str(tmp_path / "out"), "--prompt", "12 and ", "--max_new_tokens=20", "--num_samples=2"]
    assert cli.sample(again) == 0 and capsys.readouterr().out == out  # the same seed, the same text
    greedy = set()
    for seed in (1, 2):
        assert cli.sample([*again, "--num_samples=1", "--temperature=0", f"--seed={seed}"]) == 0
        greedy.add(capsys.readouterr().out)
    assert len(greedy) == 1


def test_ctrl_c_saves_and_says_how_to_go_on(fields, tmp_path):
    process = start("train.py", *flags(fields | {"max_iters": 100000, "eval_interval": 1000000}), folder=tmp_path)
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    last = err.strip().splitlines()[-1]
    assert last.startswith("interrupted at iteration ") and last.endswith(f"train.py --resume {tmp_path / 'out'}")
    iteration = int(last.split()[3].rstrip(","))
    assert "Traceback" not in err

    done = losses(read_metrics(metrics))
    assert max(done) == iteration - 1
    assert cli.train(["--resume", str(tmp_path / "out"), f"--max_iters={iteration + 3}"]) == 0
    assert sorted(losses(read_metrics(metrics))) == list(range(iteration + 3))


def test_help_shows_every_field(tmp_path):
    from dataclasses import fields as fields_of

    from gpt.training import TrainConfig

    code, out, _ = run("train.py", "--help", folder=tmp_path)
    assert code == 0
    for field in fields_of(TrainConfig):
        assert f"--{field.name}" in out, field.name
    assert "(default: 2400)" in out or "default: 1500" in " ".join(out.split())  # of configs/default.toml


def complaint(capsys, program, arguments):
    """The one line on stderr of a program that must exit with 2."""
    capsys.readouterr()
    assert program([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


def test_wrong_flags_and_files(fields, tmp_path, capsys):
    def train(*arguments):
        return complaint(capsys, cli.train, arguments)

    assert "unknown flag --learning_rat; did you mean --learning_rate?" in train("--learning_rat", "1")
    assert "--max_iters must be an integer, got 'many'" in train("--max-iters", "many")
    assert "--dtype must be one of float32, float64, bfloat16, float16; got 'int8'" in train("--dtype=int8")
    assert "no configuration file 'nowhere.toml'" in train("nowhere.toml")
    assert "default.toml" in train("nowhere.toml")
    config = tmp_path / "mine.toml"
    config.write_text("batch_sise = 4\n")
    assert f"{config}: unknown key batch_sise; did you mean batch_size?" in train(config)
    config.write_text('max_iters = "5"\n')
    assert f"{config}: max_iters must be an integer, got '5'" in train(config)
    assert "n_embd" in train(*flags(fields | {"n_embd": 15}))
    assert "batch_size = 0" in train(*flags(fields | {"batch_size": 0}))
    assert not (tmp_path / "out").exists()


def test_wrong_data(fields, tmp_path, capsys):
    def train(**changes):
        return complaint(capsys, cli.train, flags(fields | changes))

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("1 and 2 make 3.\n" * 4)
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    assert "nowhere.txt" in train(data=tmp_path / "nowhere.txt")
    assert "empty.txt" in train(data=tmp_path / "empty.txt")
    assert "binary.txt" in train(data=tmp_path / "binary.txt")
    assert "File name too long" in train(data="x" * 5000)
    assert "no file or folder '~nobody-here/text'" in train(data="~nobody-here/text")
    message = train(data=tmp_path / "short.txt")
    assert "shorter than a block" in message and "--block_size" in message
    assert "no tokenizer 'chr'; did you mean char?" in train(tokenizer="chr")
    assert "vocab_size = 3 is less than the tokenizer's" in train(vocab_size=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(tg.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(fields, tmp_path, capsys):
    assert "cuda" in complaint(capsys, cli.train, flags(fields | {"device": "cuda"}))
    assert "gpu" in complaint(capsys, cli.train, flags(fields | {"device": "gpu"}))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite(fields, tmp_path):
    values = fields | {"learning_rate": 1e30, "min_lr": 1e30, "warmup_iters": 0, "max_iters": 100, "grad_clip": 0.0}
    code, _, err = run("train.py", *flags(values), folder=tmp_path)
    message, = err.splitlines()  # and no warnings of NumPy's
    assert code == 2 and message.startswith("error: the ")
    assert "at iteration" in message and "learning rate 1e+30" in message and "--learning_rate" in message
    assert f"--resume {tmp_path / 'out'}" in message
    assert cli.sample([f"--init_from={tmp_path / 'out'}", "--max_new_tokens=5"]) == 0  # what was saved is still good


def test_a_run_is_not_overwritten_by_accident(fields, tmp_path, capsys):
    assert cli.train(flags(fields | {"max_iters": 4})) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    message = complaint(capsys, cli.train, flags(fields))
    assert "holds a run already" in message and "--resume" in message and "--overwrite" in message
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert "nowhere" in complaint(capsys, cli.train, [*flags(fields | {"data": "nowhere"}), "--overwrite"])
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert cli.train([*flags(fields | {"max_iters": 5}), "--overwrite"]) == 0
    assert max(losses(read_metrics(tmp_path / "out" / "metrics.jsonl"))) == 4


def test_a_folder_with_files_of_somebody_else_is_refused(fields, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.toml").write_text("mine = true\n")
    assert "is not a run folder but holds a config.toml" in complaint(capsys, cli.train, flags(fields))
    assert (tmp_path / "out" / "config.toml").read_text() == "mine = true\n"


def test_a_checkpoint_of_another_shape(fields, tmp_path, capsys):
    assert cli.train(flags(fields | {"max_iters": 4})) == 0
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for option in ("--resume", "--init_from"):
        message = complaint(capsys, cli.train, [option, out, "--n_embd=24", "--max_iters=6", "--data", fields["data"],
                                                "--out_dir", out if option == "--resume" else tmp_path / "other"])
        assert "transformer.wte.weight" in message and "16)" in message and "24)" in message
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_of_another_optimizer(fields, tmp_path, capsys):
    for optimizer, other in (("adamw", "sgd"), ("adamw", "muon"), ("sgd", "adamw"), ("muon", "adamw"), ("muon", "sgd")):
        assert cli.train(flags(fields | {"max_iters": 2, "optimizer": optimizer, "overwrite": True})) == 0
        message = complaint(capsys, cli.train, ["--resume", tmp_path / "out", "--optimizer", other])
        assert f"optimizer state is not one of {other}" in message and "--init_from" in message


def test_fine_tuning_starts_from_the_weights_of_a_run(fields, tmp_path, capsys):
    assert cli.train(flags(fields | {"max_iters": 40, "eval_interval": 40})) == 0
    trained = read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["val_loss"]
    other = tmp_path / "other"
    training = {"data", "batch_size", "eval_iters"}
    tuned = {name: fields[name] for name in training} | {"max_iters": 2, "init_from": tmp_path / "out"}
    tuned["out_dir"] = other
    assert cli.train(flags(tuned)) == 0  # its shape is the run's
    assert read_metrics(other / "metrics.jsonl")[0]["val_loss"] == pytest.approx(trained, abs=1e-6)
    (tmp_path / "greek.txt").write_text("μῆνιν ἄειδε θεά " * 50)
    message = complaint(capsys, cli.train, ["--init_from", tmp_path / "out", "--data", tmp_path / "greek.txt"])
    assert "vocabulary" in message and "U+03BC" in message


def test_eval_only_writes_nothing(fields, tmp_path, capsys):
    assert cli.train(flags(fields | {"max_iters": 4})) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert cli.train(["--resume", str(tmp_path / "out"), "--eval_only"]) == 0
    assert "eval at 4: val loss" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_resume_auto(fields, tmp_path):
    arguments = [*flags(fields | {"max_iters": 4}), "--resume=auto"]
    assert cli.train(arguments) == 0  # nothing there yet: a new run
    assert cli.train([*arguments, "--max_iters=6"]) == 0
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert sorted(losses(records)) == list(range(6)) and sum(r.get("event") == "resume" for r in records) == 1


def test_a_prepared_folder(fields, tmp_path, capsys):
    prepare(fields["data"], "char", tmp_path / "tokens")
    curves = []
    for name, data in (("a", fields["data"]), ("b", tmp_path / "tokens")):
        assert cli.train(flags(fields | {"data": data, "out_dir": tmp_path / name})) == 0
        curves.append(losses(read_metrics(tmp_path / name / "metrics.jsonl")))
    assert curves[0] == curves[1]
    (tmp_path / "other.txt").write_text(TEXT + "!")
    prepare(tmp_path / "other.txt", "char", tmp_path / "other")
    message = complaint(capsys, cli.train, ["--resume", tmp_path / "a", "--data", tmp_path / "other"])
    assert "prepared with another tokenizer" in message


def test_a_resumed_run_says_that_its_text_is_another(fields, tmp_path, capsys):
    assert cli.train(flags(fields | {"max_iters": 2})) == 0
    assert cli.train(["--resume", str(tmp_path / "out"), "--max_iters=3"]) == 0
    assert "note" not in capsys.readouterr().out
    fields["data"].write_text(TEXT[:-100])
    assert cli.train(["--resume", str(tmp_path / "out"), "--max_iters=4"]) == 0
    assert "the text is not the one this run began with" in capsys.readouterr().out


def test_samples_while_training(fields, tmp_path, capsys):
    assert cli.train(flags(fields | {"sample_interval": 6, "sample_tokens": 10, "sample_prompt": "7 and "})) == 0
    samples = (tmp_path / "out" / "samples.txt").read_text()
    assert samples.startswith("--- iteration 6\n7 and ") and "\n--- iteration 12\n7 and " in samples
    assert "--- sample at 6\n7 and " in capsys.readouterr().out
    changed = fields | {"sample_interval": 6, "sample_prompt": "ж", "overwrite": True}
    message = complaint(capsys, cli.train, flags(changed))
    assert "U+0436" in message


def test_without_a_prompt_only_what_the_model_wrote_is_shown(fields, tmp_path, capsys):
    assert cli.train(flags(fields | {"max_iters": 2})) == 0
    capsys.readouterr()
    assert cli.sample([f"--init_from={tmp_path / 'out'}", "--max_new_tokens=9", "--top_k=1"]) == 0
    assert len(capsys.readouterr().out) == 9 + len("\n")


def test_a_text_without_line_ends_can_be_sampled(fields, tmp_path):
    (tmp_path / "line.txt").write_text(TEXT.replace("\n", " "))
    assert cli.train(flags(fields | {"data": tmp_path / "line.txt", "max_iters": 2, "sample_interval": 1})) == 0
    assert cli.sample([f"--init_from={tmp_path / 'out'}", "--max_new_tokens=5"]) == 0


def test_the_library_needs_none_of_the_programs_parts(tmp_path):
    """tyro draws the help, rich the live line, matplotlib the curve: importing the library imports none of them."""
    program = ("import sys, gpt.training, gpt.inference; "
               "print(sorted({'tyro', 'rich', 'matplotlib', 'tiktoken', 'cupy', 'torch'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(tmp_path), text=True,
                          capture_output=True, check=True)
    assert done.stdout == "[]\n"


def test_wrong_input_to_sample(fields, tmp_path, capsys):
    def sample(*arguments):
        return complaint(capsys, cli.sample, arguments)

    assert "not a run folder" in sample("--init_from", tmp_path)
    assert "unexpected argument 'Hello'" in sample("Hello")
    assert "did you mean --temperature" in sample("--temprature", "1")
    assert "temperature = -1.0" in sample("--temperature", "-1")
    assert "top_p = 2.0" in sample("--top_p=2")
    assert cli.train(flags(fields | {"max_iters": 2})) == 0
    message = sample("--init_from", tmp_path / "out", "--prompt", "1 и 2")
    assert "U+0438" in message
    (tmp_path / "out" / "model.safetensors").write_bytes(b"damaged")
    assert "model.safetensors" in sample("--init_from", tmp_path / "out")


def test_a_padded_vocabulary_can_be_sampled(fields, tmp_path):
    assert cli.train(flags(fields | {"max_iters": 1, "vocab_size": 64, "sample_interval": 1})) == 0
    assert cli.sample([f"--init_from={tmp_path / 'out'}", "--temperature=9", "--top_k=0"]) == 0


@pytest.mark.parametrize("error, code, line", [
    (None, 0, ""),
    (UserError("wrong\nin two lines"), 2, "error: wrong in two lines\n"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 2, "error: a.txt: no such file or folder\n"),
    (PermissionError(errno.EACCES, "Permission denied", "a.txt"), 2, "error: a.txt: Permission denied\n"),
    (OSError(errno.ENOSPC, "No space left on device", "a.txt"), 2,
     "error: a.txt: No space left on device; free some space and run again\n"),
    (MemoryError("Unable to allocate 9 TiB"), 2,
     "error: out of memory: Unable to allocate 9 TiB; lower --batch_size or --block_size\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (KeyboardInterrupt("saved"), 130, "saved\n"),
])
def test_exit_codes(error, code, line, capsys):
    def main(argv):
        if error:
            raise error

    assert cli.run_cli(main, []) == code
    assert capsys.readouterr().err == line


def test_a_fault_of_ours_keeps_its_traceback():
    for error in (ZeroDivisionError, KeyError, ValueError, OSError(errno.EIO, "I/O error")):
        def main(argv, error=error):
            raise error

        with pytest.raises(error if isinstance(error, type) else OSError):
            cli.run_cli(main, [])


def test_a_full_disk_while_the_metrics_are_written(fields, tmp_path, capsys, monkeypatch):
    assert cli.train(flags(fields | {"max_iters": 4})) == 0
    real = os.fsync

    def fsync(handle):
        if json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])["iter"] > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    before = (tmp_path / "out" / "last" / "train_state.json").read_bytes()
    message = complaint(capsys, cli.train, ["--resume", tmp_path / "out", "--max_iters=6", "--eval_interval=6"])
    assert "No space left on device" in message and "what was saved before is unharmed" in message
    assert (tmp_path / "out" / "last" / "train_state.json").read_bytes() == before

"""Settings: TOML in and out, checked values, and how files, flags and earlier runs make up a TrainConfig."""
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.cli import parse_flags
from gpt.errors import UserError
from gpt.training.config import TrainConfig, resolve, run_toml
from gpt.training.settings import convert, differences, read_toml, to_toml

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.toml"))


@dataclass
class Settings:
    count: int = 3
    rate: float = 0.5
    flag: bool = False
    name: str = "x"
    kind: Literal["a", "b"] = "a"
    limit: int | None = None


def write(folder, text):
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_toml_values_have_the_types_of_the_fields(tmp_path):
    path = write(tmp_path, 'count = 7\nrate = 1e-3\nflag = true\nname = "é"\nkind = "b"\nlimit = 4\n')
    values = read_toml(path, Settings)
    assert values == {"count": 7, "rate": 1e-3, "flag": True, "name": "é", "kind": "b", "limit": 4}
    rate = read_toml(write(tmp_path, "rate = 2\n"), Settings)["rate"]
    assert rate == 2.0 and type(rate) is float


@pytest.mark.parametrize("text, message", [
    ("coutn = 7", "unknown key coutn; did you mean count?"),
    ("zzz = 7", "unknown key zzz; --help lists all"),
    ('count = "7"', "count must be an integer, got '7'"),
    ("count = 7.0", "count must be an integer, got 7.0"),
    ("count = true", "count must be an integer, got True"),
    ("flag = 1", "flag must be true or false, got 1"),
    ('rate = "fast"', "rate must be a number, got 'fast'"),
    ("name = 3", "name must be a string, got 3"),
    ('kind = "c"', "kind must be one of a, b; got 'c'"),
    ("limit = [1]", "limit must be an integer, got [1]"),
    ("[model]\ncount = 7", "[model] is a table; keys are flat"),
    ("count = ", "not a TOML file"),
])
def test_a_wrong_toml_file_is_one_line_that_names_file_and_key(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_toml(path, Settings)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_a_user_error(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_bytes(b"count = \xff\xfe")
    with pytest.raises(UserError, match="not a TOML file"):
        read_toml(path, Settings)


@given(st.builds(Settings, count=st.integers(-2**63, 2**63 - 1), rate=st.floats(allow_nan=False), flag=st.booleans(),
                 name=st.text(st.characters(exclude_categories=["Cs"])), kind=st.sampled_from("ab"),
                 limit=st.none() | st.integers(0, 99)))
def test_what_is_written_is_read_back(settings):
    values = tomllib.loads(to_toml(settings))
    assert Settings(**values) == settings


@pytest.mark.parametrize("words, values", [
    (["--count", "5"], {"count": 5}),
    (["--count=5"], {"count": 5}),
    (["--count", "-5"], {"count": -5}),
    (["--rate", "1e-3"], {"rate": 1e-3}),
    (["--rate", "3"], {"rate": 3.0}),
    (["--flag"], {"flag": True}),
    (["--flag", "--count", "5"], {"flag": True, "count": 5}),
    (["--flag=false"], {"flag": False}),
    (["--flag", "0"], {"flag": False}),
    (["--flag", "True"], {"flag": True}),
    (["--no_flag"], {"flag": False}),
    (["--no-flag"], {"flag": False}),
    (["--limit", "none"], {"limit": None}),
    (["--limit", "8"], {"limit": 8}),
    (["--name="], {"name": ""}),
    (["--name=--x"], {"name": "--x"}),
    (["--kind", "b"], {"kind": "b"}),
    (["--count", "1", "--count", "2"], {"count": 2}),
])
def test_flags(words, values):
    assert parse_flags(words, Settings) == (values, [])


def test_dashes_and_underscores_are_the_same():
    for spelling in ("--max_iters", "--max-iters"):
        assert parse_flags([spelling, "5"], TrainConfig) == ({"max_iters": 5}, [])
        assert parse_flags([f"{spelling}=5"], TrainConfig) == ({"max_iters": 5}, [])


def test_words_that_are_no_flags_are_returned_wherever_they_stand():
    assert parse_flags(["a.toml", "--flag", "b.toml", "--count", "5", "c.toml"], Settings) == (
        {"flag": True, "count": 5}, ["a.toml", "b.toml", "c.toml"])


@pytest.mark.parametrize("words, message", [
    (["--coutn", "5"], "unknown flag --coutn; did you mean --count?"),
    (["--count", "five"], "--count must be an integer, got 'five'"),
    (["--count", "5.5"], "--count must be an integer, got '5.5'"),
    (["--count"], "--count needs a value"),
    (["--count", "--flag"], "--count needs a value"),
    (["--flag=maybe"], "--flag must be true or false, got 'maybe'"),
    (["--rate", "fast"], "--rate must be a number, got 'fast'"),
    (["--kind", "c"], "--kind must be one of a, b; got 'c'"),
    (["--no_count"], "unknown flag --no_count"),
])
def test_wrong_flags(words, message):
    with pytest.raises(UserError) as caught:
        parse_flags(words, Settings)
    assert message in str(caught.value)


def test_convert_does_not_take_a_bool_for_a_number():
    with pytest.raises(UserError):
        convert(True, float, "rate")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_our_configurations_are_valid(path):
    config = TrainConfig(**{"init_from": "what --init_from names"} | read_toml(path, TrainConfig))
    assert config.model_config(65).vocab_size in (65, 50304)
    assert path.read_text().startswith("# ")  # what it is, what it costs, what it reaches


def test_every_field_has_a_docstring():
    from gpt.model.config import GPTConfig

    for cls in (GPTConfig, TrainConfig):
        lines = Path(__import__(cls.__module__, fromlist=["x"]).__file__).read_text().splitlines()
        for name in cls.__annotations__:
            at = next(i for i, line in enumerate(lines) if line.startswith(f"    {name}: "))
            assert lines[at + 1].startswith('    """') and len(lines[at + 1]) > 15, name


def test_defaults_are_nanogpts():
    config = TrainConfig()
    expected = {"batch_size": 12, "block_size": 1024, "gradient_accumulation_steps": 40, "n_layer": 12, "n_head": 12,
                "n_embd": 768, "dropout": 0.0, "bias": False, "learning_rate": 6e-4, "max_iters": 600000,
                "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "warmup_iters": 2000,
                "min_lr": 6e-5, "eval_interval": 2000,
                "log_interval": 1, "eval_iters": 200, "always_save_checkpoint": True}
    assert {name: getattr(config, name) for name in expected} == expected
    assert differences(config) == {}
    assert differences(TrainConfig(max_iters=5, bias=True)) == {"bias": True, "max_iters": 5}


@pytest.mark.parametrize("changes, message", [
    ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
    ({"learning_rate": -1.0}, "learning_rate = -1.0: must be 0 or more"),
    ({"beta2": 1.0}, "beta2 = 1.0"),
    ({"val_fraction": 0.0}, "val_fraction = 0.0"),
    ({"n_embd": 100, "n_head": 3}, "n_embd"),
    ({"dropout": 1.5}, "dropout"),
])
def test_impossible_values(changes, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**changes)


def test_vocabulary_is_the_tokenizers_or_larger():
    assert TrainConfig().model_config(65).vocab_size == 65
    assert TrainConfig(vocab_size=128).model_config(65).vocab_size == 128
    with pytest.raises(UserError, match="vocab_size = 64 is less than the tokenizer's 65"):
        TrainConfig(vocab_size=64).model_config(65)


def make_run(folder, **values):
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(run_toml(TrainConfig(**values)))
    (folder / "last").mkdir()
    return folder


def test_flags_win_over_files_and_files_over_the_fallback():
    config = resolve({"max_iters": 5, "n_layer": 2}, fallback={"n_layer": 3, "batch_size": 7})
    assert (config.max_iters, config.n_layer, config.batch_size, config.n_head) == (5, 2, 7, 12)


def test_resume_takes_the_runs_values_and_flags_win(tmp_path):
    run = make_run(tmp_path / "run", n_layer=5, max_iters=10, out_dir="somewhere", overwrite=True)
    for spelling in (run, run / "last"):
        config = resolve({"resume": str(spelling), "max_iters": 20}, fallback={"n_layer": 3, "batch_size": 7})
        assert (config.n_layer, config.max_iters, config.batch_size, config.overwrite) == (5, 20, 12, False)
        assert (config.resume, config.out_dir) == (str(run), str(run))
    assert resolve({"resume": str(run), "out_dir": "elsewhere"}).out_dir == "elsewhere"


def test_resume_auto_is_a_new_run_until_there_is_one(tmp_path):
    out = tmp_path / "run"
    assert resolve({"resume": "auto", "out_dir": str(out)}).resume == ""
    make_run(out, n_layer=5)
    config = resolve({"resume": "auto", "out_dir": str(out)}, fallback={"n_layer": 3})
    assert (config.resume, config.n_layer) == (str(out), 5)


def test_init_from_takes_the_models_shape_only(tmp_path):
    run = make_run(tmp_path / "run", n_layer=5, max_iters=10)
    config = resolve({"init_from": str(run), "dropout": 0.1}, fallback={"n_layer": 3, "max_iters": 7})
    assert (config.n_layer, config.max_iters, config.dropout, config.out_dir) == (5, 7, 0.1, "out")


def test_a_folder_that_is_no_run(tmp_path):
    for name in ("resume", "init_from"):
        with pytest.raises(UserError, match="not a run folder"):
            resolve({name: str(tmp_path)})


def test_every_field_is_a_flag():
    for field in fields(TrainConfig):
        assert parse_flags([f"--{field.name}={field.default}"], TrainConfig) == ({field.name: field.default}, [])

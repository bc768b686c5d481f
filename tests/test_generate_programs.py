"""scripts/sample.py, scripts/chat.py and scripts/inspect_model.py: what they show, and every wrong input."""
import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from serving_tools import writing_model
from tiny_run import tiny_config, tiny_trainer

import tensorgrad as tg
from gpt import cli
from gpt.inference.chat import Chat, ChatConfig, chat
from gpt.inference.processors import Sampling
from gpt.inference.prompts import conversation_ids
from gpt.inference.sample import SampleConfig, sample
from gpt.model.lora import LoRAConfig, inject
from gpt.text import CharTokenizer
from gpt.training import write_text
from gpt.training.checkpoints import load_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORGRAD_CACHE", str(folder / "cache"))
        config = tiny_config(folder, max_iters=3, block_size=64)
        trainer = tiny_trainer(config)
        from gpt.training.checkpoints import save_best, start_run
        start_run(config.out_dir, config, trainer.dataset.tokenizer)
        save_best(config.out_dir, trainer.model)
    return folder / "out"


def call(capsys, program, *arguments):
    """(exit code, output, errors) of a program of the command line."""
    code = program([str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_sample(run_folder, capsys, tmp_path, monkeypatch):
    one = ["--init_from", run_folder, "--max_new_tokens", 12, "--seed=4"]
    code, out, err = call(capsys, cli.sample, *one, "--prompt=1 and 2", "--num_samples=3")
    texts = out.removesuffix("\n").split("\n---\n")
    assert (code, err, len(texts)) == (0, "", 3) and all(text.startswith("1 and 2") for text in texts)
    for n, text in enumerate(texts):  # text n of seed 4 is the text of seed 4 + n
        assert call(capsys, cli.sample, *one, f"--seed={4 + n}", "--prompt=1 and 2")[1] == text + "\n"
    (tmp_path / "prompt.txt").write_text("\ufeff1 and 2", encoding="utf-8")
    assert call(capsys, cli.sample, *one, "--prompt_file", tmp_path / "prompt.txt")[1] == texts[0] + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 and 2"))
    assert call(capsys, cli.sample, *one, "--prompt_file=-")[1] == texts[0] + "\n"

    lines = call(capsys, cli.sample, *one, "--prompt=1 and 2", "--num_samples=3", "--json")[1].splitlines()
    told = [json.loads(line) for line in lines]
    assert ["1 and 2" + t["text"] for t in told] == texts
    assert all(len(t["ids"]) == len(t["logprobs"]) == 12 and t["finish_reason"] == "length" for t in told)
    [beam] = call(capsys, cli.sample, *one, "--prompt=1", "--num_beams=3", "--json")[1].splitlines()
    greedy = json.loads(call(capsys, cli.sample, *one, "--prompt=1", "--temperature=0", "--json")[1])
    assert json.loads(beam)["score"] * 12 >= sum(greedy["logprobs"]) - 1e-4
    assert call(capsys, cli.sample, *one, "--prompt=1", "--num_samples=0")[:2] == (0, "")
    assert call(capsys, cli.sample, *one, "--prompt=1", "--max_new_tokens=0", "--num_samples=2")[1] == "1\n---\n1\n"
    cold = [call(capsys, cli.sample, *one, "--prompt=1", f"--temperature={t}")[1] for t in (0, 1e-9, 1e-300)]
    assert cold[0] == cold[1] == cold[2]
    stopped = call(capsys, cli.sample, *one, "--prompt=1 and 2", f"--stop={texts[0][9:11]}".replace("\n", "\\n"))[1]
    assert stopped == texts[0][:texts[0].index(texts[0][9:11], 7)] + "\n"


def test_sample_is_what_the_trainer_shows(run_folder, capsys):
    model, tokenizer, _ = load_run(run_folder)
    tg.manual_seed(0)
    expected = write_text(model, tokenizer, "1 and", 30, temperature=0)
    assert call(capsys, cli.sample, "--init_from", run_folder, "--prompt=1 and", "--max_new_tokens=30",
                "--temperature=0")[1] == expected + "\n"


@pytest.mark.parametrize("program, arguments, message", [
    (cli.sample, ["--prompt=a", "--prompt_file=b"], "either --prompt or --prompt_file"),
    (cli.sample, ["--prompt_file=missing.txt"], "missing.txt: no such file"),
    (cli.sample, ["--min_p=2"], "min_p in [0, 1]"), (cli.sample, ["--num_beams=0"], "num_beams = 0"),
    (cli.sample, ["--num_beams=2", "--num_samples=3"], "more than num_beams"),
    (cli.sample, ["--repetition_penalty=0"], "repetition_penalty must be above 0"),
    (cli.sample, ["--presence_penalty=nan"], "must be finite"), (cli.sample, ["--frequency_penalty=inf"], "be finite"),
    (cli.sample, ["--num_beams=2", "--length_penalty=1000"], "length_penalty must be"),
    (cli.sample, ["--num_beams=2", "--length_penalty=nan"], "length_penalty must be"),
    (cli.sample, ["--device=tpu"], "tpu"), (cli.chat, ["hello"], "unexpected argument 'hello'"),
    (cli.chat, ["--max_new_tokens=0"], "max_new_tokens = 0"), (cli.chat, ["--top_p=0"], "top_p in"),
    (cli.chat, ["--init_from=nowhere"], "nowhere"), (cli.inspect, [], "--text or --text_file"),
    (cli.inspect, ["--text=1", "--top=0"], "top = 0"), (cli.inspect, ["--text=" + "1" * 65], "1 to 64"),
    (cli.inspect, ["--text=1", "--pictures=p", "--layer=1"], "layers 0 to 0"), (cli.inspect, ["x"], "unexpected"),
], ids=lambda value: getattr(value, "__name__", str(value)))
def test_wrong_input(run_folder, capsys, monkeypatch, tmp_path, program, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda prompt: "hello")
    if not any(a.startswith("--init_from") for a in arguments):
        arguments = [f"--init_from={run_folder}", *arguments]
    code, _, err = call(capsys, program, *arguments)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and message in err


def test_interrupted(run_folder, capsys, monkeypatch):
    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert call(capsys, cli.chat, "--init_from", run_folder)[0] == 130


def talk(run_folder, *lines, **changes):
    """What a conversation shows, piece by piece, and a list of the lines asked for."""
    shown, lines = [], list(lines)

    def read(prompt):
        if not lines:
            raise EOFError
        shown.append(None)
        return lines.pop(0)

    chat(ChatConfig(str(run_folder), max_new_tokens=10, **changes), read, shown.append)
    answers, part = [], []
    for piece in shown[1:]:
        if piece is None:
            answers.append("".join(part))
            part = []
        else:
            part.append(piece)
    return [*answers, "".join(part)][1:]


def test_chat(run_folder):
    first = talk(run_folder, "1 and 2", "make 3", "/quit")[:2]
    assert len(first) == 2 and all(answer.endswith("\n") for answer in first)
    again = talk(run_folder, "1 and 2", "/reset", "1 and 2", "make 3", "/quit", "unseen")
    assert again[:5] == [first[0], "forgotten\n", *first, ""] and first[0] != first[1]
    assert talk(run_folder, "/temp 1e-300", "1 and 2")[1] == talk(run_folder, "/temp 0", "1 and 2")[1]
    cold = talk(run_folder, "/temp 0", "1 and 2", "/temp x", "/nothing", "/help", "", "/adapter pirate", "ж")
    assert cold[0] == "temperature 0\n" and "/temp needs a number, not 'x'" in cold[2]
    assert "there is no /nothing" in cold[3] and "/reset" in cold[4] and cold[5] == ""
    assert cold[6].startswith("error: ") and "U+0436" in cold[7]


class Talker(CharTokenizer):
    """Letters with two special tokens and a template."""

    chat_template = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
                     "{% endif %}{{ m.content }}|{% endfor %}")
    special_tokens = {"b": 0}
    bos_id = 0


def test_sample_answers_a_question():
    """--chat: one answer, which ends with the turn; the question is read as scripts/chat.py reads it."""
    tokenizer = CharTokenizer("".join(sorted(set("User: hi\nAssistant: yes no"))))
    model = writing_model(tokenizer, "User: hi\nAssistant: yes\nUser: no\n")
    config = SampleConfig(prompt="hi", chat=True, temperature=0, max_new_tokens=12)
    assert sample(config, lambda text: None, lambda *_, **__: (model, tokenizer)) == [" yes"]
    pytest.importorskip("jinja2", reason="chat templates are Jinja")
    talker, told = Talker("bcde|"), []
    model = writing_model(talker, "bcd|eeee")
    sample(replace(config, prompt="cb", json=True), told.append, lambda *_, **__: (model, talker))
    assert json.loads(told[0])["prompt_tokens"] == len("bcb|")


def test_a_template_is_used_in_a_sandbox():
    pytest.importorskip("jinja2", reason="chat templates are Jinja")
    from gpt.errors import UserError

    tokenizer = Talker("bcde|")
    messages = [{"role": "user", "content": "cd"}, {"role": "assistant", "content": "e"}]
    assert tokenizer.decode(conversation_ids(tokenizer, messages)) == "bcd|e|"
    with pytest.raises(UserError, match="refuses this conversation: no"):
        conversation_ids(tokenizer, [{"role": "system", "content": "c"}])
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UserError, match="unsafe"):
        conversation_ids(tokenizer, messages)


def test_a_conversation_is_reread_only_where_it_changed(run_folder):
    """History, forgetting of old messages, adapters: answers are those of a new reading of the whole."""
    model, tokenizer, _ = load_run(run_folder)
    tokenizer = CharTokenizer("".join(sorted(set(tokenizer.characters) | set("UserAssistant:"))))
    with tg.no_grad():  # a model for the larger vocabulary
        config = model.config
        config.vocab_size = tokenizer.vocab_size
        tg.manual_seed(1)
        model = type(model)(config).eval()
        for p in model.parameters():
            p.add_(tg.randn(*p.shape) * 0.2)
    conversation = Chat(model, tokenizer, Sampling(max_new_tokens=6, seed=3))
    cold = Sampling(max_new_tokens=6, temperature=0, seed=3)
    conversation.settings = cold
    for number in range(6):
        answer = "".join(conversation.say(f"{number} and 2"))
        history = conversation.messages[:-2]
        fresh = Chat(model, tokenizer, cold)
        fresh.messages = list(history)
        assert "".join(fresh.say(f"{number} and 2")) == answer
        assert conversation.messages[-1] == {"role": "assistant", "content": answer.strip()}
        assert len(conversation_ids(tokenizer, conversation.messages[:-1])) <= 58
    assert 2 <= len(conversation.messages) < 12  # the first ones are forgotten
    conversation.messages = [{"role": "user", "content": "1" * 40}, {"role": "assistant", "content": "2"}]
    assert list(conversation.say("3")) and conversation.messages[0] == {"role": "user", "content": "3"}  # in pairs
    inject(model, LoRAConfig(r=2), "pirate")
    with tg.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(tg.randn(*p.shape))
    answers = []
    for name in ("pirate", None, "pirate"):
        conversation.reset()
        conversation.adapter(name)
        answers.append("".join(conversation.say("1 and 2 make 3")))
        assert answers[-1] == "".join(Chat(model, tokenizer, cold).say("1 and 2 make 3"))
    assert answers[0] == answers[2] != answers[1]


def test_adapters_and_storage(run_folder, tmp_path, capsys, monkeypatch):
    """Adapters by name: the first counts, /adapter takes another; weights in fewer bits say the same greedily."""
    from gpt.interop.peft import save_peft

    for seed, name in enumerate(("pirate", "lawyer")):
        model, *_ = load_run(run_folder)
        inject(model, LoRAConfig(r=2, target_modules="all-linear"))
        tg.manual_seed(seed)
        with tg.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(tg.randn(*p.shape))
        save_peft(model, tmp_path / name)
    one = ["--init_from", run_folder, "--max_new_tokens=10", "--temperature=0"]
    texts = [call(capsys, cli.sample, *one, "--prompt=1 and 2", *more) for more in (
        [], ["--dtype=bfloat16"], [f"--adapters=p={tmp_path}/pirate"],
        [f"--adapters=l={tmp_path}/lawyer,p={tmp_path}/pirate", "--dtype=float16"],
        [f"--adapters=l={tmp_path}/lawyer"])]
    assert {code for code, *_ in texts} == {0} and {err for *_, err in texts} == {""}
    plain, narrow, pirate, both, lawyer = (text for _, text, _ in texts)
    assert plain == narrow and both == lawyer and len({plain, pirate, lawyer}) == 3
    lines = iter(["1 and 2", "/reset", "/adapter l", "1 and 2", "/reset", "/adapter", "1 and 2", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    talk = [*one, "--dtype=int8", f"--adapters=p={tmp_path}/pirate, l={tmp_path}/lawyer"]
    code, out, _ = call(capsys, cli.chat, *talk)
    assert code == 0 and "adapter l\n" in out and "adapter none\n" in out
    answers = [part.splitlines()[-1] for part in out.split("forgotten")]
    assert len(answers) == 3 and answers[0] not in answers[1:]
    code, _, err = call(capsys, cli.sample, *one, "--adapters=pirate")
    assert code == 2 and "'pirate' should read NAME=FOLDER" in err


def test_inspect(run_folder, capsys, tmp_path):
    arguments = ["--init_from", run_folder, "--text=1 and 2 make", "--top=3"]
    code, out, _ = call(capsys, cli.inspect, *arguments)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2 + len("1 and 2 make") and lines[2].startswith("\u2423")
    told = json.loads(call(capsys, cli.inspect, *arguments, "--json")[1])
    assert np.shape(told["attention"]) == (1, 2, 12, 12) and np.shape(told["lens"]) == (1, 12, 3, 2)
    assert lines[-1].startswith(f"mean loss {np.mean(told['losses']):.4f} nats")
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib")
    (tmp_path / "text.txt").write_text("1 and 2")
    out = call(capsys, cli.inspect, "--init_from", run_folder, "--text_file", tmp_path / "text.txt", "--pictures",
               tmp_path / "p", "--head=1")[1]
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["attention.png", "attention_LallH1.png",
                                                                       "lens.png", "losses.png"]
    assert all((tmp_path / "p" / name).read_bytes().startswith(b"\x89PNG") for name in ("lens.png", "losses.png"))
    assert out.splitlines()[-1].startswith("pictures: ")

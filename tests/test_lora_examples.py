"""JSONL examples: what is learned of each, what is refused, and the batches."""
import json

import numpy as np
import pytest

from gpt.errors import UserError
from gpt.text import IGNORE_INDEX, CharTokenizer
from gpt.text.finetune import RandomExamples, load_examples

SIGNS = "".join(map(chr, range(32, 127))) + "\n"


class Marked(CharTokenizer):
    """Characters with an end-of-text id, 200, and a beginning, 201."""

    eot_id, bos_id, adds_bos = 200, 201, True


CHATML = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
          "{% if add_generation_prompt %}<assistant>{% endif %}")


def load(path, lines, tokenizer=None, block_size=64, **options):
    """The dataset of a file with these lines, and one more that is for validation."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (path / "d.jsonl").write_text("\n".join([*lines, '{"text": "last"}', ""]), encoding="utf-8")
    return load_examples(path / "d.jsonl", tokenizer or CharTokenizer(SIGNS), block_size, **options)


def shown(dataset, number=0):
    """(what is read, what is learned with . for what is not) of a training example."""
    x, y = dataset.train.batch([number])

    def text(row):
        return "".join(chr(i) if i >= 200 else "." if i == IGNORE_INDEX else SIGNS_SORTED[i] for i in row)

    return text(x[0]), text(y[0])


SIGNS_SORTED = CharTokenizer(SIGNS).characters


def test_text_is_learned_whole(tmp_path):
    assert shown(load(tmp_path, [{"text": "abc"}])) == ("ab", "bc")


def test_a_prompt_is_read_but_not_learned(tmp_path):
    example = {"prompt": "ask:", "completion": "yes"}
    assert shown(load(tmp_path, [example])) == ("ask:ye", "...yes")
    assert shown(load(tmp_path, [example], Marked(SIGNS))) == ("\xc9ask:yes", "....yes\xc8")


def test_only_answers_of_a_conversation_are_learned(tmp_path):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "u"},
                {"role": "assistant", "content": "A"}, {"role": "user", "content": "v"},
                {"role": "assistant", "content": "BC"}]
    x, y = shown(load(tmp_path, [{"messages": messages}]))
    whole = "S\nUser: u\nAssistant: A\nUser: v\nAssistant: BC\n"
    assert x == whole[:-1]
    assert y == "." * 19 + " A\n" + "." * 18 + " BC\n"

    pytest.importorskip("jinja2", reason="chat templates need Jinja")
    tokenizer = Marked(SIGNS)
    tokenizer.chat_template = CHATML
    x, y = shown(load(tmp_path, [{"messages": messages[1:3]}], tokenizer))
    assert (x, y) == ("<user>u</>\n<assistant>A</>", "." * 21 + "A</>\n")


def test_a_template_that_rewrites_history_is_refused(tmp_path):
    pytest.importorskip("jinja2", reason="chat templates need Jinja")
    tokenizer = CharTokenizer(SIGNS)
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(UserError, match="line 1: the model's chat template changes"):
        load(tmp_path, [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
             tokenizer)


@pytest.mark.parametrize("line, words", [
    ("{", "line 2: no JSON"), ("[" * 100_000, "line 2: no JSON"), ("3", "line 2: each line must be"),
    ({"txt": "a"}, "each line must be one of"), ({"text": "a", "messages": []}, "each line must be one of"),
    ({"text": 3}, "'text' must be text, not 3"), ({"prompt": "a", "completion": None}, "'completion' must be text"),
    ({"messages": []}, "must be a list"), ({"messages": [{"role": "robot", "content": "a"}]}, "roles system, user"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
    ({"text": "\u00e4"}, "line 2: the character vocabulary"),
])
def test_errors_name_file_and_line(tmp_path, line, words):
    with pytest.raises(UserError, match=words) as error:
        load(tmp_path, [{"text": "fine"}, line])
    assert "d.jsonl" in str(error.value)


def test_what_is_too_long_is_cut_and_what_teaches_nothing_left_out(tmp_path):
    dataset = load(tmp_path, [{"text": "a" * 30}, {"prompt": "p" * 30, "completion": "c"}, {"text": "bc"}],
                   block_size=10)
    assert dataset.meta["description"] == "3 examples (2 cut to 10 tokens, 1 left out, with nothing to learn)"
    assert len(dataset.train) == 2 and dataset.train.tokens == 13
    with pytest.raises(UserError, match="2 usable examples|1 usable examples"):
        load(tmp_path, [{"prompt": "p" * 30, "completion": "c"}], block_size=10)


def test_rows_are_filled_up_with_what_is_not_learned(tmp_path):
    dataset = load(tmp_path, [{"text": "abcdef"}, {"text": "xy"}])
    x, y = dataset.train.batch([0, 1])
    assert x.shape == y.shape == (2, 5) and x.dtype == y.dtype == np.int64
    assert (y[1, 1:] == IGNORE_INDEX).all() and (y[0] != IGNORE_INDEX).all()


def test_the_end_of_the_file_is_held_out(tmp_path):
    dataset = load(tmp_path, [{"text": f"number {i}"} for i in range(19)], val_fraction=0.25)
    assert (len(dataset.train), len(dataset.val)) == (15, 5)
    assert sum(len(x) for x, _ in dataset.val.in_order(2)) == 5


def test_each_pass_sees_every_example_once_and_resumes(tmp_path):
    examples = load(tmp_path, [{"text": chr(65 + i) * 2} for i in range(7)]).train
    batches = RandomExamples(examples, 3, seed=5)
    seen = [batches.next()[0][:, 0].tolist() for _ in range(14)]
    numbers = [number for batch in seen for number in batch]
    passes = [numbers[i:i + 7] for i in range(0, 42, 7)]
    assert all(len(set(order)) == 7 for order in passes) and len({tuple(order) for order in passes}) == 6
    again = RandomExamples(examples, 3, seed=6)
    again.load_state_dict({"seed": 5, "step": 4})
    assert [again.next()[0][:, 0].tolist() for _ in range(10)] == seen[4:]
    assert again.state_dict() == {"seed": 5, "step": 14}

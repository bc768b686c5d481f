"""Examples to fine-tune on: a JSONL file, one object per line, each of which is

    {"text": "..."}                                   every token is learned
    {"prompt": "...", "completion": "..."}            the completion is learned, the prompt is only read
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
                                                      a conversation; the assistant's parts are learned

Batches are rows of one example each, filled up at the right: what follows a token has no influence on it. What is not
learned is IGNORE_INDEX among the targets.
"""
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import UserError
from .batches import IGNORE_INDEX
from .corpora import Corpus, decode_text
from .templates import render

FORMATS = '{"text"}, {"prompt", "completion"} or {"messages"}'
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """Token ids (tokens,) int64 and, for each, whether it is learned (tokens,) bool."""

    ids: np.ndarray
    learned: np.ndarray


class Examples:
    """The examples of one split. len() is their number."""

    def __init__(self, examples):
        self._examples = list(examples)

    def __len__(self):
        return len(self._examples)

    @cached_property
    def tokens(self):
        """Tokens of all examples together, learned or not."""
        return sum(len(example.ids) for example in self._examples)

    def batch(self, numbers):
        """Inputs and targets of the examples `numbers`, each (len(numbers), longest) int64."""
        chosen = [self._examples[number] for number in numbers]
        shape = len(chosen), max(len(example.ids) for example in chosen) - 1
        inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE_INDEX)
        for row, example in enumerate(chosen):
            length = len(example.ids) - 1
            inputs[row, :length] = example.ids[:-1]
            targets[row, :length] = np.where(example.learned[1:], example.ids[1:], IGNORE_INDEX)
        return inputs, targets

    def in_order(self, batch_size):
        """All examples once, as batches of at most `batch_size`."""
        for first in range(0, len(self), batch_size):
            yield self.batch(range(first, min(first + batch_size, len(self))))


class RandomExamples:
    """Training batches: all examples in a random order, then all in another one, and so on.

    The order of pass number p is a function of (seed, p) alone, so the state is two integers, and a resumed run
    continues bit for bit."""

    def __init__(self, examples, batch_size, seed):
        self._examples, self._batch_size, self._seed, self._step = examples, batch_size, seed, 0
        self._order = (None, None)  # the latest pass and its order

    def next(self):
        """Inputs and targets, each (batch_size, longest) int64."""
        first = self._step * self._batch_size
        self._step += 1
        return self._examples.batch([self._number(place) for place in range(first, first + self._batch_size)])

    def _number(self, place):
        """The example at `place` of the endless sequence."""
        number, within = divmod(place, len(self._examples))
        if self._order[0] != number:
            generator = np.random.Generator(np.random.Philox(key=self._seed % 2**64, counter=number << 192))
            self._order = (number, generator.permutation(len(self._examples)))
        return int(self._order[1][within])

    def state_dict(self):
        """{"seed", "step"}: which batch comes next."""
        return {"seed": self._seed, "step": self._step}

    def load_state_dict(self, state):
        self._seed, self._step = int(state["seed"]), int(state["step"])
        self._order = (None, None)


@dataclass(frozen=True)
class ExampleDataset:
    """The examples of a file: `train`, and `val` from its end; `meta` has text (the file's name), description,
    text_bytes, text_sha256."""

    meta: dict
    tokenizer: object
    train: Examples
    val: Examples


def is_examples(data):
    """Is this the path of a JSONL file?"""
    return str(data).endswith(".jsonl")


def load_examples(path, tokenizer, block_size, val_fraction=0.1):
    """The ExampleDataset of a JSONL file; the last `val_fraction` of its lines, at least one and not all, are for
    validation.

    Examples longer than block_size + 1 tokens lose their end; those in which nothing is left to learn are left out,
    and meta's description counts both. Raises UserError naming file and line for what is no example."""
    path = Path(os.path.expanduser(path))
    try:
        text = decode_text(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    examples, cut, left_out = [], 0, 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        example = _example(line, f"{path}, line {number}", tokenizer)
        if len(example.ids) > block_size + 1:
            cut += 1
            example = Example(example.ids[:block_size + 1], example.learned[:block_size + 1])
        if example.learned[1:].any():
            examples.append(example)
        else:
            left_out += 1
    held_out = max(1, min(round(len(examples) * val_fraction), len(examples) - 1))
    if len(examples) < 2:
        reason = f"; {left_out} have nothing to learn within {block_size} tokens" if left_out else ""
        raise UserError(f"{path} has {len(examples)} usable examples; at least 2 are needed, one to train on and one "
                        f"for validation{reason}")
    notes = [f"{count} {what}" for count, what in ((cut, f"cut to {block_size} tokens"),
                                                   (left_out, "left out, with nothing to learn")) if count]
    about = f"{len(examples)} examples" + (f" ({', '.join(notes)})" if notes else "")
    corpus = Corpus(text, path.stem, about)
    meta = {"text": path.stem, "description": about, "text_bytes": corpus.size, "text_sha256": corpus.sha256}
    return ExampleDataset(meta, tokenizer, Examples(examples[:-held_out]), Examples(examples[-held_out:]))


def _example(line, where, tokenizer):
    """The Example in a line of JSON; `where` is how errors begin."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON: {error}") from None
    keys = [keys for keys in (("text",), ("prompt", "completion"), ("messages",))
            if isinstance(entry, dict) and all(key in entry for key in keys)]
    if len(keys) != 1:
        raise UserError(f"{where}: each line must be one of {FORMATS}")
    if keys[0] == ("messages",):
        pieces = _conversation(entry["messages"], where, tokenizer)
    else:
        for key in keys[0]:
            if not isinstance(entry[key], str):
                raise UserError(f"{where}: {key!r} must be text, not {json.dumps(entry[key])[:40]}")
        pieces = [(entry[key], key != "prompt") for key in keys[0]]
    special = "all" if keys[0] == ("messages",) and tokenizer.chat_template else ()
    ids, learned = [], []
    if tokenizer.adds_bos and not special:  # a template has it within
        ids, learned = [tokenizer.bos_id], [False]
    try:
        for text, is_learned in pieces:
            new = tokenizer.encode(text, special)
            ids += new
            learned += [is_learned] * len(new)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    end = tokenizer.eot_id if tokenizer.eos_id is None else tokenizer.eos_id
    if end is not None and not special:  # a template has its own end of an answer
        ids.append(end)
        learned.append(True)
    return Example(np.array(ids, np.int64), np.array(learned, bool))


def _conversation(messages, where, tokenizer):
    """[(text, is it learned?)] of a conversation: each answer of the assistant, and what stands before it."""
    fits = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in messages)
    if not fits:
        raise UserError(f'{where}: "messages" must be a list of {{"role": "...", "content": "..."}}, the roles '
                        f"{', '.join(ROLES)}")
    pieces, done = [], ""
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                before = render(tokenizer, messages[:number])
                after = render(tokenizer, messages[:number + 1], add_generation_prompt=False)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            if not (before.startswith(done) and after.startswith(before)):
                raise UserError(f"{where}: the model's chat template changes what was said before; give prompt and "
                                "completion instead")
            pieces += [(before[len(done):], False), (after[len(before):], True)]
            done = after
    if not pieces:
        raise UserError(f"{where}: no message of the assistant, so nothing to learn")
    return pieces

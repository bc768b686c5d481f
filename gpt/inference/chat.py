"""A conversation in the terminal, as `scripts/chat.py` leads it.

A model that was published for chat brings a template (Jinja, run in a sandbox). For any other the conversation is
written down as a dialogue, "User: ...", "Assistant: ...", which a plain language model continues; where its vocabulary
cannot spell these names (a character model), as lines in turn.
"""
from dataclasses import dataclass, replace

from ..errors import UserError
from ..model.lora import set_adapters
from ..model.storage import check_storage
from ..training.checkpoints import load_run
from .decoder import Decoder, Writing
from .generate import follow
from .processors import Sampling
from .prompts import conversation_ids, dialogue_stops, ends

HELP = ("/reset forgets the conversation, /temp 0.7 sets the temperature, /adapter NAME takes a LoRA adapter (none: "
        "the model alone), /help shows this, /quit leaves")


@dataclass
class ChatConfig:
    """What to talk to, and how. Raises UserError for impossible values."""

    init_from: str = "out"
    """Folder of a run (its last/ folder for the latest instead of the best weights), Hugging Face folder or name on its
    hub, or .gguf file."""
    system: str = ""
    """What the model is told before the conversation."""
    max_new_tokens: int = 300
    """Tokens per answer at most."""
    temperature: float = 0.8
    """Below 1 safer, above 1 wilder, 0 = the likeliest token always (greedy)."""
    top_k: int = 200
    """Choose among this many likeliest tokens; 0 = all."""
    top_p: float = 0.95
    """Choose among the likeliest tokens that together have this probability; 1 = all."""
    min_p: float = 0.0
    """Choose among tokens at least this many times as likely as the likeliest; 0 = all."""
    repetition_penalty: float = 1.0
    """Above 1 makes every token so far less likely; 1 = off."""
    seed: int = 1337
    """The same seed and the same words give the same conversation."""
    device: str = "cpu"
    """"cpu", "cuda" or "cuda:N"."""
    adapters: str = ""
    """LoRA adapters to load onto the model, "NAME=FOLDER, NAME=FOLDER": PEFT folders, or runs that trained one. The
    first counts from the start, /adapter NAME takes another."""
    dtype: str = "float32"
    """How weights lie in memory on a CPU: float32, bfloat16, float16 or int8. Fewer bits are read faster; 16-bit files
    stay as they are."""

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {self.max_new_tokens}: must be 1 or more")
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k}: must be 0 or more")
        check_storage(self.dtype, self.device)
        self.sampling()

    def sampling(self):
        """These settings as a Sampling."""
        return Sampling(max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_k=self.top_k or None,
                        top_p=self.top_p, min_p=self.min_p, repetition_penalty=self.repetition_penalty, seed=self.seed)


class Chat:
    """A conversation with a model: `say(text)` streams the answer, `messages` is the history, a list of
    {"role": "system" | "user" | "assistant", "content": text}."""

    def __init__(self, model, tokenizer, settings, system=""):
        self.model, self.tokenizer, self.settings, self.system = model, tokenizer, settings, system
        self.stops = dialogue_stops(tokenizer)
        self.decoder = Decoder(model, tokenizer, rows=1, reuse=True)  # an answer reads only what is new
        self.reset()

    def reset(self):
        """Forget the conversation, but not the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.turns = 0

    def say(self, text):
        """The answer to `text`, in pieces as they come. Where the conversation gets too long for the model, its oldest
        messages are forgotten. An answer that is broken off stays in the history as far as it came."""
        self.messages.append({"role": "user", "content": text})
        settings = replace(self.settings, stop=self.stops, stop_ids=ends(self.tokenizer),
                           seed=self.settings.seed + self.turns)
        try:
            writing = Writing(self._prompt(), settings)
        except UserError:
            self.messages.pop()
            raise
        self.turns += 1
        started = False
        try:
            for piece in follow(self.decoder, [writing]):
                shown = piece.text if started else piece.text.lstrip()
                started = started or bool(shown)
                if shown:
                    yield shown
        finally:
            self.decoder.cancel(writing)
            self.messages.append({"role": "assistant", "content": writing.text.strip()})

    def adapter(self, name):
        """Talk with the LoRA adapter `name`, or with the model alone (None). The conversation stays."""
        set_adapters(self.model, [name] if name else [])
        self.decoder = Decoder(self.model, self.tokenizer, rows=1, reuse=True)  # the old one's cache is another model's

    def _prompt(self):
        """Ids of the conversation that leave room for an answer."""
        block_size = self.model.config.block_size
        room = max(block_size - self.settings.max_new_tokens, block_size // 2)
        while True:
            ids = conversation_ids(self.tokenizer, self.messages)
            oldest = 1 if self.messages[0]["role"] == "system" else 0
            if len(ids) <= room or len(self.messages) <= oldest + 1:
                return ids
            del self.messages[oldest:oldest + 2]  # a question and its answer


def chat(config, read=None, write=None, load=load_run):
    """Talk until /quit or the end of the input. `read(prompt)` gives a line, `write` shows text (None: the terminal);
    `load` is as in `sample`."""
    read, write = read or input, write or _to_terminal
    model, tokenizer, *_ = load(config.init_from, config.device, dtype=config.dtype)
    conversation = Chat(model, tokenizer, config.sampling(), config.system)
    write(HELP + "\n")
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            write("\n")
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                write(command(conversation, line) + "\n")
            elif line:
                _answer(conversation, line, write)
        except UserError as error:
            write(f"error: {error}\n")


def command(conversation, line):
    """Do what a line that begins with "/" says; returns what to show. Raises UserError for what it does not know."""
    name, _, value = line.partition(" ")
    value = value.strip()
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.reset()
        return "forgotten"
    if name == "/temp":
        try:
            conversation.settings = replace(conversation.settings, temperature=float(value))
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"/temp needs a number, not {value!r}") from None
        return f"temperature {conversation.settings.temperature:g}"
    if name == "/adapter":
        conversation.adapter(None if value in ("", "none") else value)
        return f"adapter {value or 'none'}"
    raise UserError(f"there is no {name}; {HELP}")


def _answer(conversation, line, write):
    try:
        for text in conversation.say(line):
            write(text)
    except KeyboardInterrupt:  # ends the answer, not the conversation
        pass
    write("\n")


def _to_terminal(text):
    print(text, end="", flush=True)

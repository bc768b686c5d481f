"""Text from a run folder, as `scripts/sample.py` writes it."""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..model.storage import check_storage
from ..text.corpora import decode_text
from ..training.checkpoints import load_run
from .decoder import Decoder, Writing
from .generate import follow, generate
from .processors import Sampling
from .prompts import as_ids, conversation_ids, dialogue_stops, ends


@dataclass
class SampleConfig:
    """What to write, and how. Raises UserError for impossible values."""

    init_from: str = "out"
    """Folder of a run (its last/ folder for the latest instead of the best weights), Hugging Face folder or name on its
    hub, or .gguf file."""
    prompt: str = ""
    """Text to continue."""
    chat: bool = False
    """The prompt is a question to a chat model: it goes through the model's chat template, and the answer is shown."""
    prompt_file: str = ""
    """File with the text to continue; "-" reads standard input."""
    max_new_tokens: int = 500
    """Tokens to write per sample."""
    temperature: float = 0.8
    """Below 1 safer, above 1 wilder, 0 = the likeliest token always (greedy)."""
    top_k: int = 200
    """Choose among this many likeliest tokens; 0 = all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability; 1 = all."""
    min_p: float = 0.0
    """Choose among tokens at least this many times as likely as the likeliest; 0 = all."""
    repetition_penalty: float = 1.0
    """Above 1 makes every token so far less likely; 1 = off."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that were written already."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens once for each time they were written."""
    stop: str = ""
    """Text at which to stop; it is not shown. \\n stands for a line end."""
    num_samples: int = 1
    """Number of texts."""
    num_beams: int = 1
    """Above 1: search for the likeliest texts with so many beams instead of drawing."""
    length_penalty: float = 1.0
    """Beams are compared by log-probability / length ** length_penalty."""
    seed: int = 1337
    """The same seed gives the same texts; text n of seed s is the first of seed s + n."""
    json: bool = False
    """Print one JSON object per text, with its ids and log-probabilities, instead of the text."""
    device: str = "cpu"
    """"cpu", "cuda" or "cuda:N"."""
    adapters: str = ""
    """LoRA adapters to load onto the model, "NAME=FOLDER, NAME=FOLDER": PEFT folders, or runs that trained one. The
    first is used."""
    dtype: str = "float32"
    """How weights lie in memory on a CPU: float32, bfloat16, float16 or int8. Fewer bits are read faster; 16-bit files
    stay as they are."""

    def __post_init__(self):
        for name in ("max_new_tokens", "temperature", "top_k", "num_samples", "min_p"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} = {getattr(self, name)}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must be above 0 and at most 1")
        if self.num_beams < 1:
            raise UserError(f"num_beams = {self.num_beams}: must be 1 or more")
        if self.prompt and self.prompt_file:
            raise UserError("give either --prompt or --prompt_file")
        check_storage(self.dtype, self.device)
        self.sampling()

    def sampling(self, stop_ids=(), stops=()):
        """These settings as a Sampling; `stops` are texts that end an answer."""
        return Sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_k=self.top_k or None,
            top_p=self.top_p, min_p=self.min_p, repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty,
            stop=(*([self.stop.replace("\\n", "\n")] if self.stop else []), *stops), stop_ids=tuple(stop_ids),
            seed=self.seed, logprobs=0 if self.json and self.num_beams == 1 else None)


def sample(config, write=None, load=load_run):
    """Write `config.num_samples` texts with the model that `load(init_from, device, dtype=...)` of the config gives, a
    tuple that begins with model and tokenizer. `write` gets what is to be shown piece by piece as it comes, text by
    text (None: to standard output). Returns the texts, prompt included."""
    write = write or _to_terminal
    model, tokenizer, *_ = load(config.init_from, config.device, dtype=config.dtype)
    prompt = read_prompt(config)
    if config.chat:
        ids = conversation_ids(tokenizer, [{"role": "user", "content": prompt}])
        prompt = ""
    else:
        ids = as_ids(tokenizer, prompt)
    stops = dialogue_stops(tokenizer) if config.chat and config.num_beams == 1 else ()  # beams know no stop texts
    settings = config.sampling(ends(tokenizer), stops)
    if config.num_beams > 1:
        values = {name: getattr(settings, name) for name in Sampling.__dataclass_fields__}
        writings = generate(model, ids, tokenizer, num_beams=config.num_beams, num_samples=config.num_samples,
                            length_penalty=config.length_penalty, **values)
        pieces = []
    else:
        writings = [Writing(ids, settings, number) for number in range(config.num_samples)]
        decoder = Decoder(model, tokenizer, max(len(writings), 1), len(ids) + config.max_new_tokens)
        pieces = follow(decoder, writings)
    if config.json:
        for _ in pieces:
            pass
        for writing in writings:
            write(json.dumps(describe(writing, prompt), ensure_ascii=False) + "\n")
    else:
        show(writings, pieces, prompt, write)
    return [prompt + writing.text for writing in writings]


def show(writings, pieces, prompt, write):
    """Write the texts one after the other while all of them come: what the first says at once, then the next."""
    shown = 0  # characters of the present text
    iterator = iter(pieces)
    for number, writing in enumerate(writings):
        write(prompt if number == 0 else f"---\n{prompt}")
        shown = 0
        while True:
            if len(writing.text) > shown:
                write(writing.text[shown:])
                shown = len(writing.text)
            if writing.finish_reason:
                break
            next(iterator, None)  # nothing comes of a text that was to have no token
        write("\n")


def describe(writing, prompt):
    """A text as a JSON-able dict."""
    told = {"prompt": prompt, "text": writing.text, "finish_reason": writing.finish_reason,
            "prompt_tokens": len(writing.prompt), "ids": writing.ids}
    if writing.choices:
        told["logprobs"] = [choice.logprob for choice in writing.choices]
    if writing.score is not None:
        told["score"] = writing.score
    return told


def read_prompt(config):
    """The text of --prompt, or of the file or standard input that --prompt_file names."""
    if not config.prompt_file:
        return config.prompt
    if config.prompt_file == "-":
        return sys.stdin.read()
    return decode_text(Path(config.prompt_file).read_bytes(), config.prompt_file)


def _to_terminal(text):
    sys.stdout.write(text)
    sys.stdout.flush()

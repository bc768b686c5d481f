"""Text from a run folder."""
from dataclasses import dataclass

import tensorgrad as tg

from ..errors import UserError
from ..training.checkpoints import load_run
from ..training.sampling import write_text


@dataclass
class SampleConfig:
    """What to write, and how. Raises UserError for impossible values."""

    init_from: str = "out"
    """Folder of a run; its last/ folder for the latest instead of the best weights."""
    prompt: str = ""
    """Text to continue."""
    max_new_tokens: int = 500
    """Tokens to write per sample."""
    temperature: float = 0.8
    """Below 1 safer, above 1 wilder, 0 = the likeliest token always (greedy)."""
    top_k: int = 200
    """Choose among this many likeliest tokens; 0 = all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability; 1 = all."""
    num_samples: int = 1
    """Number of texts."""
    seed: int = 1337
    """The same seed gives the same texts."""
    device: str = "cpu"
    """"cpu", "cuda" or "cuda:N"."""

    def __post_init__(self):
        for name in ("max_new_tokens", "temperature", "top_k", "num_samples"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} = {getattr(self, name)}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must be above 0 and at most 1")


def sample(config, say=print):
    """Write `config.num_samples` texts with the model in `config.init_from`; `say` prints each. Returns them."""
    model, tokenizer, _ = load_run(config.init_from, config.device)
    tg.manual_seed(config.seed)
    top_p = config.top_p if config.top_p < 1 else None
    texts = []
    for number in range(config.num_samples):
        text = write_text(model, tokenizer, config.prompt, config.max_new_tokens, config.temperature, config.top_k,
                          top_p)
        say(text if number == 0 else f"---\n{text}")
        texts.append(text)
    return texts

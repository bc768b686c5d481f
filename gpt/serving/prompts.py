"""Log-probabilities of the tokens of a prompt, for clients that ask for an echo with them."""
import tensorgrad as tg
from tensorgrad.nn import functional as F

from ..inference.processors import Choice, largest

_POSITIONS = 64  # positions whose logits are in memory at a time


@tg.no_grad()
def prompt_choices(model, prompts, top):
    """{prompt as a tuple: a Choice for each of its tokens}: the log-probability given those before, None for the first,
    and the `top` likeliest in its place."""
    return {tuple(prompt): _choices(model, prompt, top) for prompt in prompts}


def _choices(model, prompt, top):
    device = next(model.parameters()).device
    hidden = model.hidden(tg.tensor([prompt], device=device))[0]               # (T, C)
    choices = [Choice(prompt[0])]
    for start in range(0, len(prompt) - 1, _POSITIONS):
        stop = min(start + _POSITIONS, len(prompt) - 1)
        logprobs = F.log_softmax(model.lm_head(hidden[start:stop]).to("cpu"), dim=-1)  # (positions, V)
        choices += [Choice(token, row[token].item(), tuple(largest(row, top)))
                    for token, row in zip(prompt[start + 1:stop + 1], logprobs, strict=True)]
    return choices

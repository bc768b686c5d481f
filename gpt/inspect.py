"""Looking inside a model: what attends to what, what each layer would say, how surprising each token is.

    seen = inspect_text(model, tokenizer, "To be, or not to be")
    seen.attention[3][0]               # (T, T): layer 3, head 0; row = who looks, column = at what; rows sum to 1
    seen.losses                        # (T - 1,) nats per token, from the second on
    seen.lens[2][5]                    # what layer 2 would say after token 5: [(id, probability), ...]
    seen.alternatives[5]               # the same of the whole model
    attention_map(model, seen.ids, layer=3)                          # (T, T): one head, or averaged
    next_tokens(model, seen.ids, temperature=0.8, top_k=50).tokens   # what a draw would choose from, and what is cut
    write_pngs(seen, "pictures")       # attention.png, attention_L3H0.png, losses.png, lens.png

The numbers come from a traced forward pass: attention probabilities are computed anew from queries and keys of each
layer, and each layer's residual stream goes through the final norm and the head (nostalgebraist 2020, "logit lens").
The glass-box page of the server (serving/glassbox.py) shows these numbers.
"""
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tensorgrad as tg
from tensorgrad.nn import functional as F

from .errors import UserError
from .inference.processors import largest
from .inference.prompts import as_ids
from .model.sampling import GREEDY_BELOW, check_sampling, filter_logits
from .text.corpora import decode_text
from .training.checkpoints import load_run

_LOGITS_AT_ONCE = 2**24  # 64 MB: all positions of a long text times a large vocabulary would be gigabytes


@dataclass(frozen=True)
class Inspection:
    """What `inspect_text` found. L layers, H heads, T tokens; NumPy arrays and lists."""

    ids: list[int]
    """The T token ids."""
    pieces: list[str]
    """Their texts."""
    attention: list
    """Probabilities per layer, each (H, T, T): row = query position, column = key position."""
    losses: object
    """-log p of tokens 1 ... T - 1 given those before, in nats: (T - 1,)."""
    ranks: list[int]
    """How many tokens were likelier than the actual one, for tokens 1 ... T - 1."""
    lens: list
    """Per layer (the last is the model's output), per position: the likeliest next tokens, [(id, probability)]."""

    @property
    def alternatives(self):
        """Per position, the model's likeliest next tokens, [(id, probability)]."""
        return self.lens[-1]


@tg.no_grad()
def attention_maps(model, idx):
    """Attention probabilities of idx (B, T) per layer: a list of (B, H, T, T) Tensors, zero above the diagonal."""
    return [probabilities for probabilities, _ in _trace(model, idx)]


@tg.no_grad()
def logit_lens(model, idx):
    """What the head reads from the residual stream after each layer, for idx (B, T): a list of logits (B, T, V). The
    last is the model's own output."""
    return [model.lm_head(_normed(model, stream)) for _, stream in _trace(model, idx)]


@tg.no_grad()
def token_losses(model, idx):
    """-log p of each token given those before, in nats: (B, T) -> (B, T - 1)."""
    logits = model.lm_head(model.hidden(idx))[:, :-1]                          # (B, T - 1, V)
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), idx[:, 1:].reshape(-1),
                           reduction="none").reshape(idx.size(0), -1)


@tg.no_grad()
def inspect_text(model, tokenizer, text, top=5):
    """Everything about one text (or list of ids), as an Inspection with the `top` likeliest tokens everywhere. Leaves
    the model in the mode it was in. Raises UserError for less than one token, or more than block_size."""
    ids = tokenizer.encode(text) if isinstance(text, str) else list(text)
    if not 1 <= len(ids) <= model.config.block_size:
        raise UserError(f"the text has {len(ids)} tokens; to look inside, give 1 to {model.config.block_size}, the "
                        "model's block_size")
    idx = tg.tensor([ids], device=next(model.parameters()).device)             # (1, T)
    with _evaluating(model):
        attention, lens = [], []
        for probabilities, stream in _trace(model, idx):
            attention.append(probabilities[0].cpu().numpy())                   # (H, T, T)
            losses, ranks, likeliest = [], [], []
            for start, logprobs in _told(model, _normed(model, stream)):       # (n, V), n positions at a time
                likeliest += [largest(row, top) for row in logprobs.exp()]
                _score(logprobs, ids[start + 1:], losses, ranks)
            lens.append(likeliest)
    losses = tg.tensor(losses, dtype=logprobs.dtype).numpy()                   # (T - 1,), by the last layer
    return Inspection(ids, [show_token(tokenizer, i) for i in ids], attention, losses, ranks, lens)


@tg.no_grad()
def text_losses(model, ids):
    """Loss (nats) and rank of every token of `ids` but the first, however long the text: three lists of T - 1.

    A text longer than block_size is read in windows, each of which begins with the last half of the one before, so that
    no token is predicted from less; the third list says where the window of each prediction begins."""
    size, device = model.config.block_size, next(model.parameters()).device
    losses, ranks, starts, begin = [], [], [], 0
    with _evaluating(model):
        while len(losses) < len(ids) - 1:
            known = len(losses) - begin                                        # positions that have been seen to
            hidden = model.hidden(tg.tensor([ids[begin:begin + size]], device=device))[:, known:]  # (1, n, C)
            for start, logprobs in _told(model, hidden):
                _score(logprobs, ids[begin + known + start + 1:], losses, ranks)
            starts += [begin] * (len(losses) - len(starts))
            begin = len(losses) - size // 2
    return losses, ranks, starts


@tg.no_grad()
def attention_map(model, ids, layer=None, head=None):
    """Attention among `ids`, a list of T: (T, T) NumPy array of one head of one layer, averaged over what is None.
    Raises UserError for a layer or head that is not there."""
    check_head(model.config.n_layer, model.config.n_head, layer, head)
    idx = tg.tensor([ids], device=next(model.parameters()).device)             # (1, T)
    found = []
    for number, (probabilities, _) in enumerate(_trace(model, idx)):
        if layer in (None, number):
            chosen = probabilities[0] if head is None else probabilities[0, head:head + 1]
            found.append(chosen.mean(dim=0))                                   # (T, T)
        if number == layer:
            break
    return (sum(found) / len(found)).cpu().numpy()


def check_head(n_layer, n_head, layer, head):
    """Raise UserError for a layer or head (None: all) that a model of this size does not have."""
    if not 0 <= (layer or 0) < n_layer or not 0 <= (head or 0) < n_head:
        raise UserError(f"no layer {layer}, head {head}: the model has layers 0 to {n_layer - 1} and heads 0 to "
                        f"{n_head - 1}")


@dataclass(frozen=True)
class NextTokens:
    """What may come next, and why not something else."""

    tokens: list[tuple[int, float, float, str | None]]
    """The likeliest tokens, then the one asked about if it is not among them: (id, the model's probability, its
    probability in the draw, what cuts it off: "top_k", "top_p", "min_p", "greedy", or None)."""
    kept: int
    """Number of tokens left to draw from."""
    cuts: dict[str, tuple[int, float]]
    """Of each cut that took something: how many tokens, and their probability before all cuts, at the temperature."""
    rank: int | None
    """How many tokens are likelier than the one asked about."""


@tg.no_grad()
def next_tokens(model, ids, temperature=1.0, top_k=None, top_p=None, min_p=None, top=10, token=None):
    """The `top` likeliest tokens after `ids`, and what the settings of a draw do to them, as NextTokens. `token`: an id
    that is to be among them. Settings as in `GPT.generate`, also past block_size. Raises UserError for wrong values."""
    check_sampling(temperature, top_k, top_p, min_p)
    vocab_size = model.config.vocab_size
    if token is not None and not 0 <= token < vocab_size:
        raise UserError(f"token id {token} is outside the model's vocabulary (0 to {vocab_size - 1})")
    if model.config.position in ("learned", "sinusoidal"):
        ids = ids[-model.config.block_size:]                                   # with others, attention slides by itself
    idx = tg.tensor([ids], device=next(model.parameters()).device)             # (1, T)
    logits = model.lm_head(model.hidden(idx)[:, -1]).cpu()                     # (1, V)
    p = F.softmax(logits, dim=-1)[0]                                           # (V,)
    if temperature < GREEDY_BELOW:
        warmed = p
        stages = {"greedy": tg.where(tg.arange(vocab_size) == p.argmax(), 0.0, -math.inf).unsqueeze(0)}
    else:
        warmed = F.softmax(logits / temperature, dim=-1)[0]
        stages = {"top_k": filter_logits(logits, temperature, top_k),
                  "top_p": filter_logits(logits, temperature, top_k, top_p),
                  "min_p": filter_logits(logits, temperature, top_k, top_p, min_p)}
    cut_by, cuts, kept = {}, {}, tg.ones(vocab_size, dtype=tg.bool)
    for name, scores in stages.items():                                        # each on what the one before left
        left = scores[0] > -math.inf
        out = kept & left.logical_not()
        if out.any():
            cuts[name] = (out.sum().item(), warmed[out].sum().item())
            cut_by[name] = out
        kept = left
    drawn = F.softmax(scores, dim=-1)[0]
    ids = [i for i, _ in largest(p, top)]
    if token is not None and token not in ids:
        ids.append(token)
    tokens = [(i, p[i].item(), drawn[i].item(), next((name for name, out in cut_by.items() if out[i]), None))
              for i in ids]
    return NextTokens(tokens, kept.sum().item(), cuts, None if token is None else (p > p[token]).sum().item())


def show_token(tokenizer, token):
    """A token id as text for people: line ends and blanks made visible, with the blank that it begins with within a
    text; bytes that are no whole character as \\xe2; ids without text by their number."""
    piece = tokenizer.pieces[token].decode(errors="backslashreplace") if token < tokenizer.vocab_size else ""
    return piece.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "\u2423") or f"[{token}]"


def _trace(model, idx):
    """(attention probabilities (B, H, T, T), residual stream (B, T, C)) of each layer in turn."""
    model._check_ids(idx)
    T = idx.size(1)
    past = tg.ones(T, T, dtype=tg.bool, device=idx.device).tril()              # (T, T)
    x = model.embed(idx)                                                       # (B, T, C)
    for block in model.transformer.h:
        q, k, _ = block.attn.heads(x if block.post else block.ln_1(x))         # (B, nh, T, hs), (B, nkv, T, hs)
        k = k.repeat_interleave(q.size(1) // k.size(1), 1)                     # (B, nh, T, hs)
        scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5                   # (B, nh, T, T)
        x = block(x)
        yield F.softmax(scores.masked_fill(past.logical_not(), -float("inf")), dim=-1), x


def _normed(model, stream):
    """What the head reads from a residual stream (B, T, C)."""
    return model.transformer.ln_f(stream) if model.config.norm_position == "pre" else stream


def _told(model, hidden):
    """(number of the first position, log-probabilities (n, V)) that the head gives for (1, T, C), some positions at a
    time; on the CPU."""
    n = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    for start in range(0, hidden.size(1), n):
        yield start, F.log_softmax(model.lm_head(hidden[:, start:start + n])[0].cpu(), dim=-1)


def _score(logprobs, following, losses, ranks):
    """Append the losses and ranks of the tokens that follow positions with these log-probabilities (n, V); the last
    position of a text has none."""
    following = following[:len(logprobs)]
    logprobs = logprobs[:len(following)]
    told = logprobs.gather(1, tg.tensor(following, dtype=tg.int64).reshape(-1, 1))  # (n, 1)
    losses += (-told).reshape(-1).tolist()
    ranks += (logprobs > told).sum(dim=1).tolist()


@contextmanager
def _evaluating(model):
    """The model in evaluation mode, afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ---- pictures ----

def attention_figure(seen, layer=None, head=None):
    """Heat-map of attention as a matplotlib Figure: one head of one layer, or averaged over what is None."""
    layers = seen.attention if layer is None else [seen.attention[layer]]
    maps = [probabilities if head is None else probabilities[head:head + 1] for probabilities in layers]
    shown = sum(m.mean(axis=0) for m in maps) / len(maps)                      # (T, T)
    size = 2.5 + 0.28 * len(seen.ids)
    figure = _figure(size + 0.8, size)
    axes = figure.subplots()
    image = axes.imshow(shown, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(seen.ids)), seen.pieces, rotation=90, fontsize=7)
    axes.set_yticks(range(len(seen.ids)), seen.pieces, fontsize=7)
    name = "all layers" if layer is None else f"layer {layer}"
    axes.set(title=f"Attention, {name}, {'all heads' if head is None else f'head {head}'}", xlabel="attended to",
             ylabel="token")
    figure.colorbar(image, label="probability", shrink=0.8)
    return figure


def losses_figure(seen):
    """Bars of the loss per token, with the mean."""
    figure = _figure(2.5 + 0.28 * len(seen.ids), 3.2)
    axes = figure.subplots()
    axes.bar(range(len(seen.losses)), seen.losses, color="tab:blue")
    mean = float(seen.losses.mean())
    axes.axhline(mean, color="tab:orange", label=f"mean {mean:.3f}, exp(-loss) {math.exp(-mean):.1%}")
    axes.set_xticks(range(len(seen.losses)), seen.pieces[1:], rotation=90, fontsize=7)
    axes.set(title="How surprising each token was", ylabel="loss (nats)")
    axes.legend()
    return figure


def lens_figure(seen, tokenizer):
    """Table of the likeliest next token after each token (columns) at each layer (rows), shaded by its probability."""
    best = [[position[0] for position in layer] for layer in seen.lens]
    figure = _figure(2 + 0.6 * len(seen.ids), 1.6 + 0.35 * len(best))
    axes = figure.subplots()
    image = axes.imshow([[p for _, p in layer] for layer in best], vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, layer in enumerate(best):
        for x, (token, p) in enumerate(layer):
            axes.text(x, y, show_token(tokenizer, token), ha="center", va="center", fontsize=7,
                      color="white" if p > 0.6 else "black")
    axes.set_xticks(range(len(seen.ids)), seen.pieces, rotation=90, fontsize=7)
    axes.set_yticks(range(len(best)), [f"layer {i}" for i in range(len(best))], fontsize=7)
    axes.set_title("What each layer would say next")
    figure.colorbar(image, label="probability")
    return figure


def write_pngs(seen, tokenizer, folder, heads=()):
    """Write attention.png, lens.png, losses.png (of two or more tokens), and attention_L<layer>H<head>.png for each
    (layer, head) in `heads` (None: averaged). Returns the paths. Raises UserError for a head that is not there."""
    for layer, head in heads:
        check_head(len(seen.attention), len(seen.attention[0]), layer, head)
    figures = {"attention.png": attention_figure(seen), "lens.png": lens_figure(seen, tokenizer)}
    if len(seen.ids) > 1:
        figures["losses.png"] = losses_figure(seen)
    for layer, head in heads:
        name = f"attention_L{'all' if layer is None else layer}H{'all' if head is None else head}.png"
        figures[name] = attention_figure(seen, layer, head)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
    return [folder / name for name in figures]


def _figure(width, height):
    try:
        from matplotlib.figure import Figure  # pyplot would choose a window system
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(min(width, 40), min(height, 40)), layout="constrained")


# ---- the command ----

@dataclass
class InspectConfig:
    """What to look at. Raises UserError for impossible values."""

    init_from: str = "out"
    """Folder of a run (its last/ folder for the latest instead of the best weights), Hugging Face folder or name on its
    hub, or .gguf file."""
    text: str = ""
    """What the model reads."""
    text_file: str = ""
    """File with what the model reads."""
    layer: int | None = None
    """Also draw the attention of this layer (from 0); None: with --head, the average of all layers."""
    head: int | None = None
    """Also draw the attention of this head (from 0); None: with --layer, the average of all heads."""
    top: int = 5
    """How many alternatives to show per token."""
    pictures: str = ""
    """Folder for PNGs (needs matplotlib); none if empty."""
    json: bool = False
    """Print one JSON object with all numbers, attention included, instead of a table."""
    device: str = "cpu"
    """"cpu", "cuda" or "cuda:N"."""

    def __post_init__(self):
        if self.text and self.text_file:
            raise UserError("give either --text or --text_file")
        if self.top < 1:
            raise UserError(f"top = {self.top}: must be 1 or more")


def inspect(config, say=print, load=load_run):
    """Read a text with the model that `load(config.init_from, config.device)` gives; `say` prints what was seen, a
    table or JSON, and PNGs go into `config.pictures`. Returns the Inspection."""
    if not config.text and not config.text_file:
        raise UserError("give what the model shall read, as --text or --text_file")
    model, tokenizer, *_ = load(config.init_from, config.device)
    text = config.text or decode_text(Path(config.text_file).read_bytes(), config.text_file)
    seen = inspect_text(model, tokenizer, as_ids(tokenizer, text), config.top)
    if config.json:
        say(json.dumps({"ids": seen.ids, "pieces": seen.pieces, "losses": seen.losses.tolist(), "ranks": seen.ranks,
                        "lens": seen.lens, "attention": [maps.tolist() for maps in seen.attention]}))
    else:
        for line in table(seen, tokenizer):
            say(line)
    if config.pictures:
        heads = [] if config.layer is None and config.head is None else [(config.layer, config.head)]
        paths = write_pngs(seen, tokenizer, config.pictures, heads)
        if not config.json:
            say("pictures: " + ", ".join(map(str, paths)))
    return seen


def table(seen, tokenizer):
    """Lines: token, its loss and rank, and what the model would have said instead."""
    yield f"{'token':<12} {'loss':>6} {'p':>6} {'rank':>5}  likeliest after it"
    for i, piece in enumerate(seen.pieces):
        told = ""
        if i:
            loss = float(seen.losses[i - 1])
            told = f"{loss:6.2f} {math.exp(-loss):6.1%} {seen.ranks[i - 1]:5}"
        after = "  ".join(f"{show_token(tokenizer, token)} {p:.0%}" for token, p in seen.alternatives[i])
        yield f"{piece:<12} {told:>19}  {after}"
    if len(seen.losses):
        mean = float(seen.losses.mean())
        yield f"mean loss {mean:.4f} nats per token: on average a token was given {math.exp(-mean):.2%}"

"""The glass box: the page at "/" and what it asks of the model beside text. Numbers are those of gpt/inspect.py.

    GET  /api/model          what is served: shape, adapters, whether there is a run to watch
    POST /api/prompt         {"text" or "messages"}: the ids that the model reads, for the "prompt" of /v1/completions
    POST /api/inspect        {"text" or "ids", "top"}: pieces of the text, losses, logit lens of every layer
    POST /api/attention      {"text" or "ids", "layer", "head"}: a map; null or absent averages
    POST /api/heads          {"text" or "ids"}: every head's map, small
    POST /api/losses         {"text" or "ids"}: loss and rank of every token of a text of up to MAX_TOKENS
    POST /api/alternatives   {"ids", "token", "temperature", "top_k", "top_p", "min_p", "top"}: what could come next
    GET  /api/run?mark=...   what a training run has written since that mark (see watch.py)

All that look inside also take "model" and "adapter_scale" as /v1 does. Errors have OpenAI's shape.
"""
import base64
import hashlib
import math
import re
from pathlib import Path

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import tensorgrad as tg

from ..inference.prompts import dialogue_stops
from ..inspect import attention_map, attention_maps, inspect_text, next_tokens, text_losses
from ..text.tokenizers.streaming import StreamDecoder
from .errors import ServingError, wrong
from .fields import Fields
from .http import read_json
from .requests import conversation, encode, find_adapter
from .watch import run_since, watched

PAGE = Path(__file__).parent / "page" / "index.html"
MAX_TOKENS = 2048       # of a text whose losses are asked for
MAX_LOOK = 512          # tokens of a map and a lens: what a screen can show
SMALL = 24              # cells of a small map's side


def page_routes(engine, config):
    """The Routes of the page and its endpoints. engine: an Engine; config: a ServeConfig."""
    html = PAGE.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": content_security_policy(html), "X-Content-Type-Options": "nosniff",
               "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    folder = watched(config)

    async def page(request):
        return Response(html, media_type="text/html", headers=headers)

    async def model(request):
        return JSONResponse(describe(engine.model, engine.tokenizer) | {
            "name": engine.name, "models": engine.models, "context": engine.context,
            "max_new_tokens": config.max_new_tokens, "run": folder.name if folder else None})

    async def run(request):
        if folder is None:
            raise ServingError(404, "no run to watch: serve a run's folder, or name one with --run_dir", "no_run")
        return JSONResponse(run_since(folder, request.query_params.get("mark", "")))

    async def read_prompt(request):
        fields = Fields(await read_json(request, config.max_request_bytes))
        told = prompt(fields, engine.model, engine.tokenizer, engine.context)
        fields.check_all_read()
        return JSONResponse(told)

    def ask(read):
        async def endpoint(request):
            fields = Fields(await read_json(request, config.max_request_bytes))
            adapter, scale = chosen_model(fields, engine)
            look = read(fields, engine.model, engine.tokenizer)
            fields.check_all_read()
            return JSONResponse(await engine.run(look, adapter, scale))
        return endpoint

    return [Route("/", page), Route("/api/model", model), Route("/api/run", run),
            Route("/api/prompt", read_prompt, methods=["POST"]),
            *(Route(f"/api/{read.__name__}", ask(read), methods=["POST"])
              for read in (inspect, attention, heads, losses, alternatives))]


def content_security_policy(html):
    """What the page may do: run the one script and style that are in it, and talk to this server. Nothing is loaded
    from elsewhere, and no text can become markup (Trusted Types)."""
    def hashes(tag):
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
                        for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL))
    return (f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; "
            "trusted-types 'none'; frame-ancestors 'self' https://huggingface.co")  # a Space is shown within the hub


# ---- requests ----

def chosen_model(fields, engine):
    """(adapter or None, scale) of the model that a request names; by default the first that is served."""
    adapter = find_adapter(fields.text("model", next(iter(engine.models))), engine)
    return adapter, float(fields.number("adapter_scale", 1.0, -10, 10))


def read_tokens(fields, model, tokenizer, most):
    """The ids of a request's "ids" or "text", at most the last `most`, and how many there were before those."""
    ids, text = fields.any("ids"), fields.text("text")
    if (ids is None) == (text is None):
        raise wrong("text", "give either this or ids, an array of token ids")
    if ids is None:
        ids = encode(tokenizer, text, "text")
    top = model.config.vocab_size
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < top for i in ids):
        raise wrong("ids", f"must be an array of at least one token id (0 to {top - 1})")
    skipped = max(0, len(ids) - most)
    return ids[skipped:], skipped


def read_look(fields, model, tokenizer):
    """`read_tokens` of a request that looks inside: as many as the model reads at once and a screen can show."""
    return read_tokens(fields, model, tokenizer, min(MAX_LOOK, model.config.block_size))


# ---- what can be asked: the fields of a request are read first; what comes back is then called on the engine's thread
# and gives a JSON-able dict ----

def inspect(fields, model, tokenizer):
    """Pieces, losses, ranks and logit lens of the end of a text; `skipped` tokens are before it."""
    (ids, skipped), top = read_look(fields, model, tokenizer), fields.integer("top", 5, 1, 20)

    def look(model):
        seen = inspect_text(model, tokenizer, ids, top)
        lens = [[[(piece_after(tokenizer, ids[at], i), round(p, 6), i) for i, p in said]
                 for at, said in enumerate(layer)] for layer in seen.lens]
        return {"ids": ids, "pieces": token_texts(tokenizer, ids), "skipped": skipped, "losses": seen.losses.tolist(),
                "ranks": seen.ranks, "lens": lens}
    return look


def attention(fields, model, tokenizer):
    """Rows of an attention map up to the diagonal; what lies beyond is 0."""
    ids, skipped = read_look(fields, model, tokenizer)
    layer = fields.integer("layer", None, 0, model.config.n_layer - 1)
    head = fields.integer("head", None, 0, model.config.n_head - 1)

    def look(model):
        rows = attention_map(model, ids, layer, head).tolist()
        return {"ids": ids, "pieces": token_texts(tokenizer, ids), "skipped": skipped, "layer": layer, "head": head,
                "rows": [[round(p, 6) for p in row[:at + 1]] for at, row in enumerate(rows)]}
    return look


def heads(fields, model, tokenizer):
    """A small map of every head: per layer and head at most SMALL x SMALL values, the largest of their place, 0-255."""
    ids, _ = read_look(fields, model, tokenizer)

    def look(model):
        side = -(-len(ids) // SMALL)                                           # tokens per cell
        edges, found = range(0, len(ids), side), []
        for maps in attention_maps(model, tg.tensor([ids], device=next(model.parameters()).device)):
            array = maps[0].cpu().numpy()                                      # (H, T, T)
            cells = [[array[:, top:top + side, left:left + side].max(axis=(1, 2)) * 255 for left in edges]
                     for top in edges]                                         # cells of (H,)
            found.append([[[round(float(cell[head])) for cell in row] for row in cells] for head in range(len(array))])
        return {"heads": found}
    return look


def losses(fields, model, tokenizer):
    """Loss and rank of each token of a text but the first, and from where on the model read when it predicted it."""
    ids, _ = read_tokens(fields, model, tokenizer, math.inf)
    if len(ids) > MAX_TOKENS:
        raise wrong("text", f"has {len(ids):,} tokens; at most {MAX_TOKENS:,} are measured at once")

    def look(model):
        found, ranks, starts = text_losses(model, ids)
        return {"ids": ids, "pieces": token_texts(tokenizer, ids), "losses": found, "ranks": ranks, "starts": starts}
    return look


def alternatives(fields, model, tokenizer):
    """What the model would say after the text, and what the settings of a draw make of it."""
    ids, _ = read_tokens(fields, model, tokenizer, 4 * model.config.block_size)
    settings = {"temperature": float(fields.number("temperature", 1.0, 0, 100)),
                "top_k": fields.integer("top_k", 0, 0) or None,
                "top_p": float(fields.number("top_p", 1.0, 0, 1)) or 1e-9,  # as /v1 does
                "min_p": float(fields.number("min_p", 0.0, 0, 1)), "top": fields.integer("top", 12, 1, 100),
                "token": fields.integer("token", None, 0, model.config.vocab_size - 1)}

    def look(model):
        seen = next_tokens(model, ids, **settings)
        tokens = [{"id": i, "piece": piece_after(tokenizer, ids[-1], i), "p": p, "drawn": drawn, "cut": cut}
                  for i, p, drawn, cut in seen.tokens]
        return {"tokens": tokens, "kept": seen.kept, "rank": seen.rank, "vocab_size": model.config.vocab_size,
                "cuts": {name: {"tokens": n, "p": p} for name, (n, p) in seen.cuts.items()}}
    return look


def prompt(fields, model, tokenizer, context):
    """The ids that a model reads: of a "text" its end, of "messages" the conversation up to where the answer begins,
    without its oldest turns where it is too long; and the texts that end an answer."""
    messages = fields.any("messages")
    if messages is None:
        ids, skipped = read_tokens(fields, model, tokenizer, context)
        return {"ids": ids, "skipped": skipped, "forgotten": 0, "stop": []}
    room, forgotten = context - context // 3, 0                                # leaves a third for the answer
    while len(ids := conversation(messages, tokenizer)) > room and len(messages) > 1:
        forgotten += len(messages[:2])
        messages = messages[2:] or messages[-1:]
    return {"ids": ids[-context:], "skipped": max(0, len(ids) - context), "forgotten": forgotten,
            "stop": list(dialogue_stops(tokenizer))}


# ---- texts of tokens, and the model in figures ----

def describe(model, tokenizer):
    """The model in figures."""
    config = model.config
    return {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
            "vocab_size": config.vocab_size, "block_size": config.block_size,
            "parameters": model.num_params(non_embedding=False), "tokenizer": tokenizer.name}


def token_texts(tokenizer, ids):
    """The text of every token: joined, that of all. A character that several tokens spell is with the last of them;
    special tokens are named."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    decoder = StreamDecoder(tokenizer)
    return [names.get(i) or (decoder.feed(i) if i < tokenizer.vocab_size else f"[{i}]") for i in ids]


def piece_after(tokenizer, before, token):
    """The text of a token after another; where it is no whole character, its bytes as \\xE2."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    if token in names or token >= tokenizer.vocab_size:
        return names.get(token, f"[{token}]")
    after = [before] if before < tokenizer.vocab_size else []
    piece = tokenizer.decode_bytes([*after, token])[len(tokenizer.decode_bytes(after)):]
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02X}" for byte in piece)

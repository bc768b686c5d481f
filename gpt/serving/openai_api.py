"""The routes of OpenAI's API: models, completions, chat."""
import asyncio
import time

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..inference.decoder import Writing
from .errors import ServingError
from .http import EventStream, read_json, while_connected
from .prompts import Scorer
from .replies import ChatCompletion, Completion
from .requests import find_adapter, read_chat, read_completion

GONE = 499  # for the log: the client is not there any more


def openai_routes(engine, config):
    """The list of routes."""
    started = int(time.time())

    def describe(name):
        return {"id": name, "object": "model", "created": started, "owned_by": "local"}

    async def models(request):
        return JSONResponse({"object": "list", "data": [describe(name) for name in engine.models]})

    async def model(request):
        name = request.path_params["name"]
        find_adapter(name, engine)
        return JSONResponse(describe(name))

    async def completions(request):
        return await answer(request, engine, config, read_completion, Completion)

    async def chat(request):
        return await answer(request, engine, config, read_chat, ChatCompletion)

    return [Route("/v1/models", models), Route("/v1/models/{name:path}", model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"])]


async def answer(request, engine, config, read, reply_class):
    """Write what a request asks for: `read` makes a Wanted of its JSON, `reply_class` the answer."""
    content = await read_json(request, config.max_request_bytes)
    wanted = await run_in_threadpool(read, content, engine, config)  # long prompts take their time to cut into tokens
    writings = [Writing(prompt, wanted.sampling, number) for prompt in wanted.prompts for number in range(wanted.n)]
    known = {}
    if wanted.echo and wanted.sampling.logprobs is not None:
        known = await while_connected(request.receive, score(wanted, engine, config))
        if known is None:
            return Response(status_code=GONE)
    reply = reply_class(wanted, engine, writings, known)
    loop, inbox = asyncio.get_running_loop(), asyncio.Queue()
    ticket = engine.submit(writings, lambda item: loop.call_soon_threadsafe(inbox.put_nowait, item), wanted.adapter,
                           wanted.adapter_scale)
    try:
        first = await while_connected(request.receive, inbox.get())
        if isinstance(first, ServingError):
            raise first
        pieces = follow(reply, first, inbox)
        if first is not None and wanted.stream:
            return EventStream(pieces, ticket.cancel)
        whole = first and await while_connected(request.receive, collect(reply, pieces))
    except BaseException:
        ticket.cancel()
        raise
    ticket.cancel()
    return JSONResponse(whole) if whole else Response(status_code=GONE)


async def score(wanted, engine, config):
    """{prompt as a tuple: a Choice for each of its tokens}, read in parts so that others go on meanwhile."""
    known = {}
    for prompt in wanted.prompts:
        if tuple(prompt) not in known:
            scorer = Scorer(prompt, wanted.sampling.logprobs, config.prefill_tokens)
            while not scorer.finished:
                await engine.run(scorer.read, wanted.adapter, wanted.adapter_scale)
            known[tuple(prompt)] = scorer.choices
    return known


async def follow(reply, events, inbox):
    """The pieces of a reply as the engine's events come in, `events` first; raises the ServingError that ends it."""
    for piece in reply.beginning():
        yield piece
    while True:
        if isinstance(events, ServingError):
            raise events
        for event in events:
            for piece in reply.take(event):
                yield piece
        if reply.finished:
            break
        events = await inbox.get()
    for piece in reply.ending():
        yield piece


async def collect(reply, pieces):
    """The whole answer."""
    async for _ in pieces:
        pass
    return reply.whole()

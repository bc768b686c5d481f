"""HTTP around a request: reading its JSON, noticing that its client went away, and answering as a stream of events."""
import asyncio
import json

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from .errors import ServingError

_BODY_SECONDS = 30  # for a client to send its request, or to take the next piece of an answer


async def read_json(request, limit):
    """The JSON object in the body of a request, of at most `limit` bytes. Raises ServingError for anything else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form, which any page on the web may post here without asking, is not JSON
        raise ServingError(415, "the body must be JSON: send Content-Type: application/json", "unsupported_media_type")
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise ServingError(413, f"the body has more than {limit} bytes", "request_too_large")
    except TimeoutError:
        raise ServingError(408, "the body did not arrive in time", "timeout") from None
    except ClientDisconnect:  # nobody hears it, but the count of answers does
        raise ServingError(400, "the body broke off", "incomplete_body") from None
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(content, ensure_ascii=False).encode()  # halves of surrogate pairs are not text
    except UnicodeDecodeError as error:
        raise ServingError(400, f"the body is not UTF-8 (byte {error.start})", "invalid_json") from None
    except UnicodeEncodeError:
        raise ServingError(400, "the body holds half of a surrogate pair, which is not text", "invalid_json") from None
    except RecursionError:
        raise ServingError(400, "the body is nested too deeply", "invalid_json") from None
    except ValueError as error:
        raise ServingError(400, f"the body is not JSON: {error}", "invalid_json") from None
    if not isinstance(content, dict):
        raise ServingError(400, "the body must be a JSON object", "invalid_json")
    return content


def _refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


async def while_connected(receive, work):
    """The result of the coroutine `work`, or None once the client is gone; `work` is then cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: each dict of the async iterator `events` as a line of data, then [DONE].

    A ServingError becomes a last event. `done()` is called when all is over, however it ended."""

    media_type = "text/event-stream"

    def __init__(self, events, done):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.done = events, done

    async def __call__(self, scope, receive, send):
        try:
            await while_connected(receive, self._send_all(send))
        finally:
            self.done()

    async def _send_all(self, send):
        try:
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in self.events:
                    await self._send_data(send, json.dumps(event, ensure_ascii=False, allow_nan=False))
            except ServingError as error:
                await self._send_data(send, json.dumps(error.content()))
            await self._send_data(send, "[DONE]")
            await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, OSError):
            pass  # the client takes nothing any more

    async def _send_data(self, send, data):
        await self._send(send, {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        await asyncio.sleep(0)  # where many events wait, let the loop see that the client is gone

    async def _send(self, send, message):
        async with asyncio.timeout(_BODY_SECONDS):
            await send(message)

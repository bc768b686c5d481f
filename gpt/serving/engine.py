"""The engine: one thread that owns the model and writes all texts, one token of each per step.

    engine = Engine(model, tokenizer, config, name="my-model")
    engine.start()
    ticket = engine.submit([Writing(ids, Sampling(...))], deliver=queue.put)    # events come as they are written
    maps = await engine.run(lambda model: attention_maps(model, idx))           # anything else the model is wanted for
    engine.drain(30); engine.stop()                                             # running texts get 30 seconds

Texts join and leave between two steps (continuous batching). Each (adapter, scale) has a decoder of its own, as a pass
through the model is a pass with one adapter; a step goes through the decoders in turn.
"""
import asyncio
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

import tensorgrad as tg

from ..errors import UserError
from ..inference.decoder import Decoder
from ..inference.processors import Choice
from ..model.lora import active_adapters, adapter_names, set_adapters, set_scale
from .errors import ServingError
from .metrics import Metrics

log = logging.getLogger("gpt.serving")
BASE = "base"  # the model without the adapter that it was trained with
_IDLE_DECODERS = 4  # decoders without texts that are kept for the next one with the same adapter


@dataclass(frozen=True)
class Event:
    """What one step did to text number `index` of a request: its token (None where none was asked for), the text that
    is certain now, and why it ended if it did."""

    index: int
    choice: Choice | None
    text: str
    finish_reason: str | None


class Ticket:
    """A request at the engine. `cancel()` may be called from any thread, and when all is over."""

    def __init__(self, engine, writings, adapter, scale, deliver, deadline):
        self.engine, self.writings, self.key, self.deadline = engine, writings, (adapter, scale), deadline
        self.open = set(writings)  # those that are not finished; the engine's thread alone changes it
        self.cancelled, self.arrived, self.begun = False, time.monotonic(), False
        self._deliver = deliver

    def cancel(self):
        """Stop writing and free the rows; nothing more is delivered."""
        self.cancelled = True
        self.engine.wake()

    def deliver(self, item):
        """Hand a list of Events, or a ServingError, to whoever waits for them."""
        if not self.cancelled:
            self._deliver(item)


class Engine:
    """A model that writes many texts at once. `models` are the names that clients can ask for, {name: adapter}."""

    def __init__(self, model, tokenizer, config, name="model"):
        self.model, self.tokenizer, self.config, self.name = model, tokenizer, config, name
        own = active_adapters(model)
        self.models = {name: own[0] if own else None}
        self.models |= {f"{name}:{adapter}": adapter for adapter in adapter_names(model)}
        if own:
            self.models[f"{name}:{BASE}"] = None
        self.context = min(config.context or model.config.block_size, model.config.block_size)
        self.metrics = Metrics()
        self._changed = threading.Condition()
        self._waiting, self._calls, self._running = deque(), deque(), {}       # (Ticket, Writing); Writing: Ticket
        self._decoders, self._selected = {}, None                              # (adapter, scale): Decoder
        self._stop_at, self._thread = None, None

    # ---- from any thread ----

    def start(self):
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self):
        """Does the engine take requests?"""
        return self._thread is not None and self._thread.is_alive() and self._stop_at is None

    @property
    def waiting(self):
        """Number of texts that wait for a row."""
        return len(self._waiting)

    @property
    def running(self):
        """Number of texts that are being written."""
        return len(self._running)

    def submit(self, writings, deliver, adapter=None, scale=1.0, timeout=None):
        """Have `writings` written with an adapter (None: the model alone). `deliver` is called on the engine's thread
        with lists of Events, or once with a ServingError. Returns a Ticket. Raises ServingError where there is no
        room (429) and while the server stops (503)."""
        deadline = time.monotonic() + (timeout or self.config.timeout)
        ticket = Ticket(self, list(writings), adapter, scale, deliver, deadline)
        with self._changed:
            self._refuse_when_stopping()
            if len(self._waiting) + len(self._running) + len(ticket.writings) > self.config.rows + self.config.queue:
                self.metrics.refused += 1
                raise full()
            self._waiting.extend((ticket, writing) for writing in ticket.writings)
            self._changed.notify()
        return ticket

    def call(self, function, adapter=None, scale=1.0):
        """Have `function(model)` called between two steps. Returns a concurrent.futures.Future of its result. Raises
        ServingError as `submit` does."""
        future = Future()
        with self._changed:
            self._refuse_when_stopping()
            if len(self._calls) > self.config.queue:
                raise full()
            self._calls.append((function, (adapter, scale), future))
            self._changed.notify()
        return future

    async def run(self, function, adapter=None, scale=1.0):
        """`call` for coroutines: the result itself."""
        return await asyncio.wrap_future(self.call(function, adapter, scale))

    def wake(self):
        with self._changed:
            self._changed.notify()

    def drain(self, seconds):
        """Take no more requests; tell those who wait; let running texts finish, for `seconds` at most."""
        with self._changed:
            if self._stop_at is None:
                self._stop_at = time.monotonic() + seconds
            self._changed.notify()

    def stop(self):
        """End the thread; texts that are still being written are told."""
        with self._changed:
            self._stop_at = 0.0
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _refuse_when_stopping(self):
        if not self.healthy:
            raise stopping()

    # ---- the engine's thread ----

    def _work(self):
        try:
            while self._has_work():
                self._end_what_is_over()
                self._answer_call()
                self._admit()
                self._step()
        except BaseException:
            log.exception("the engine failed")
        finally:
            with self._changed:
                self._stop_at = 0.0
            self._end_what_is_over()
            for _, _, future in self._calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(stopping())

    def _has_work(self):
        """Wait until there is something to do; False where there never will be."""
        with self._changed:
            while not (self._waiting or self._calls or self._running) and self._stop_at is None:
                self._changed.wait()
            return self._stop_at is None or bool((self._running or self._calls) and time.monotonic() < self._stop_at)

    def _end_what_is_over(self):
        """Take out what was cancelled, what is late, and what a stopping server does not finish."""
        now = time.monotonic()
        with self._changed:
            waiting = {ticket for ticket, _ in self._waiting}
            stop_at = self._stop_at
        for ticket in waiting | set(self._running.values()):
            if ticket.cancelled:
                self._close(ticket)
            elif now >= ticket.deadline:
                self._close(ticket, ServingError(504, "the request took longer than this server allows", "timeout"))
            elif stop_at is not None and (now >= stop_at or ticket in waiting):
                self._close(ticket, stopping())

    def _close(self, ticket, error=None):
        """Forget a request; with `error`, tell it."""
        with self._changed:
            self._waiting = deque(entry for entry in self._waiting if entry[0] is not ticket)
        for writing in ticket.open:
            if self._running.pop(writing, None) and ticket.key in self._decoders:
                self._decoders[ticket.key].cancel(writing)
        ticket.open = set()
        if error is None:
            self.metrics.cancelled += 1
        else:
            self.metrics.failed += 1
            self._tell(ticket, error)

    def _answer_call(self):
        with self._changed:
            if not self._calls:
                return
            function, key, future = self._calls.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            self._select(key)
            future.set_result(function(self.model))
        except BaseException as error:
            future.set_exception(error)

    def _admit(self):
        """Read the next prompts in the queue, as many as may be read in one go, or a part of a long one."""
        batch, longest, prompts = [], 0, set()
        if not self._has_read_ahead():
            return
        with self._changed:
            while self._waiting and len(self._running) + len(batch) < self.config.rows:
                ticket, writing = self._waiting[0]
                prompt = tuple(writing.prompt)
                longest = max(longest, len(prompt))
                more = batch and prompt not in prompts and longest * (len(prompts) + 1) > self.config.prefill_tokens
                if more or (batch and ticket.key != batch[0][0].key):
                    break
                prompts.add(prompt)
                batch.append(self._waiting.popleft())
            for ticket, writing in batch:
                self._running[writing] = ticket
        if batch:
            self._advance(batch[0][0].key, lambda decoder: decoder.add([writing for _, writing in batch]),
                          [writing for _, writing in batch])

    def _has_read_ahead(self):
        """Is little enough of the first prompt in the queue left to be read? If not, read a part."""
        with self._changed:
            if not self._waiting or len(self._running) >= self.config.rows:
                return False
            ticket, writing = self._waiting[0]
        most, ready = self.config.prefill_tokens, []
        if len(writing.prompt) <= most or not writing.settings.max_new_tokens:
            return True
        self._advance(ticket.key, lambda decoder: ready.append(decoder.read_ahead(writing.prompt, most)) or [],
                      reading=ticket)
        return bool(ready and ready[0])

    def _step(self):
        """One more token of every text."""
        for key, decoder in list(self._decoders.items()):
            if decoder.active:
                self._advance(key, lambda decoder: decoder.step())

    @tg.no_grad()
    def _advance(self, key, act, new=(), reading=None):
        """Let the decoder of an adapter act, and deliver what came of it. `new` are the Writings that are added by it,
        `reading` the Ticket whose prompt it reads a part of."""
        began = time.monotonic()
        try:
            decoder = self._decoder(key)
            self._select(key)
            pieces = act(decoder)
        except Exception as error:
            fault = not isinstance(error, UserError)
            if fault:
                log.exception("a step failed")
                self._decoders.pop(key, None)
            told = (ServingError(500, "the server failed at this request; its log says why", "internal_error") if fault
                    else ServingError(400, str(error), "invalid_value"))
            hit = {ticket for writing, ticket in self._running.items()
                   if writing in new or (fault and ticket.key == key)}
            for ticket in hit | ({reading} if reading else set()):
                self._close(ticket, told)
            return
        events = {}
        for piece in pieces:
            events.setdefault(self._running[piece.writing], []).append(
                (piece.writing, piece.choice, piece.text, piece.finish_reason))
        for writing in new:  # those that asked for no token
            if not writing.choices:
                events.setdefault(self._running[writing], []).append((writing, None, "", writing.finish_reason))
        now = time.monotonic()
        self.metrics.step(now - began, len(pieces), sum(map(len, {tuple(writing.prompt) for writing in new})))
        for ticket, told in events.items():
            if not ticket.begun:
                ticket.begun = True
                self.metrics.first_token(now - ticket.arrived)
            for writing, _, _, finish_reason in told:
                if finish_reason:
                    ticket.open.discard(writing)
                    del self._running[writing]
            self._tell(ticket, [Event(ticket.writings.index(writing), *rest) for writing, *rest in told])

    def _tell(self, ticket, item):
        try:
            ticket.deliver(item)
        except RuntimeError:  # the event loop that waited is gone
            ticket.cancelled = True

    def _decoder(self, key):
        if key not in self._decoders:
            idle = [k for k, decoder in self._decoders.items() if not decoder.active]
            for k in idle[:len(idle) - _IDLE_DECODERS + 1]:
                del self._decoders[k]
            self._decoders[key] = Decoder(self.model, self.tokenizer, self.config.rows, self.context, reuse=True)
        return self._decoders[key]

    def _select(self, key):
        if key != self._selected and adapter_names(self.model):
            adapter, scale = key
            set_adapters(self.model, [adapter] if adapter else [])
            if adapter:
                set_scale(self.model, scale, adapter)
        self._selected = key


def full():
    """The error for whom there is no room."""
    return ServingError(429, "too many requests are waiting already; try again later", "queue_full",
                        headers={"Retry-After": "1"})


def stopping():
    """The error for whom a stopping server leaves."""
    return ServingError(503, "the server is shutting down", "shutting_down", headers={"Retry-After": "10"})

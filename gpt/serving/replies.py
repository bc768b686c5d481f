"""The shapes of answers: OpenAI's objects for completions and chat, whole and in pieces."""
import secrets
import time

from .tokens import Speller, Track


class Reply:
    """What has come of a request, as the client gets it; one subclass per endpoint.

    `take(event)` turns an Event into pieces for a stream, and keeps what `whole` needs."""

    prefix = kind = chunk_kind = ""

    def __init__(self, wanted, engine, writings, prompt_choices=None):
        self.wanted, self.tokenizer, self.writings = wanted, engine.tokenizer, writings
        self.wants_tokens = wanted.sampling.logprobs is not None
        self.id, self.created = self.prefix + secrets.token_hex(12), int(time.time())
        self.tracks = [Track(engine.tokenizer, writing.prompt, writing.settings.stop_ids) for writing in writings]
        self.texts, self.tokens = ["" for _ in writings], [[] for _ in writings]
        self.reasons, self.completion_tokens = [None for _ in writings], 0
        self._prompt_choices = prompt_choices

    def take(self, event):
        """The pieces of the stream that an Event makes, dicts."""
        told = self.tracks[event.index].take(event) if self.wants_tokens else []
        self.completion_tokens += event.choice is not None
        self.reasons[event.index] = event.finish_reason
        return self._pieces(event.index, event.text, told, event.finish_reason)

    def _pieces(self, index, text, told, reason):
        self.texts[index] += text
        self.tokens[index] += told
        if text or told or reason:
            yield self.chunk([self.piece(index, text, told, reason)])

    @property
    def finished(self):
        return all(self.reasons)

    def usage(self):
        prompt = sum(len(prompt) for prompt in self.wanted.prompts)
        return {"prompt_tokens": prompt, "completion_tokens": self.completion_tokens,
                "total_tokens": prompt + self.completion_tokens}

    def _object(self, kind, choices):
        return {"id": self.id, "object": kind, "created": self.created, "model": self.wanted.model, "choices": choices}

    def chunk(self, choices, usage=None):
        """A piece of the stream."""
        chunk = self._object(self.chunk_kind, choices)
        return chunk | {"usage": usage} if self.wanted.include_usage else chunk

    def beginning(self):
        """The pieces that come before the first token."""
        return []

    def ending(self):
        """The pieces that come after the last token."""
        return [self.chunk([], self.usage())] if self.wanted.include_usage else []

    def whole(self):
        """The answer in one object."""
        choices = [self.choice(i, *parts) for i, parts in enumerate(zip(self.texts, self.tokens, self.reasons,
                                                                        strict=True))]
        return self._object(self.kind, choices) | {"usage": self.usage()}


class Completion(Reply):
    """/v1/completions."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def beginning(self):
        """The echo of the prompts."""
        if not self.wanted.echo:
            return
        for index, writing in enumerate(self.writings):
            speller = Speller(self.tokenizer)
            text = self.tokenizer.decode([token for token in writing.prompt if speller.has_text(token)])
            choices = self._prompt_choices[tuple(writing.prompt)] if self.wants_tokens else []
            self.tracks[index].begin_at(len(text))
            yield from self._pieces(index, text, [speller.tell(choice) for choice in choices], None)

    def piece(self, index, text, told, reason):
        return {"index": index, "text": text, "logprobs": self._logprobs(told) if self.wants_tokens else None,
                "finish_reason": reason}

    choice = piece

    def _logprobs(self, told):
        """Log-probabilities in the shape of this endpoint; token_ids and bytes are ours."""
        return {"tokens": [token.text for token in told], "token_logprobs": [token.logprob for token in told],
                "top_logprobs": [self._top(token) for token in told], "text_offset": [token.offset for token in told],
                "token_ids": [token.id for token in told], "bytes": [list(token.bytes) for token in told]}

    def _top(self, token):
        if token.logprob is None:
            return None
        top = {}
        for _, text, _, logprob in (*token.top, (token.id, token.text, token.bytes, token.logprob)):
            top[text] = max(logprob, top.get(text, logprob))  # two ids may have one text
        return top


class ChatCompletion(Reply):
    """/v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def _pieces(self, index, text, told, reason):
        if not self.texts[index] and not self.tokenizer.chat_template:  # "Assistant:" is followed by a blank
            text, told = text.lstrip(), [token for token in told if token.text.strip()]
        yield from super()._pieces(index, text, told, None)
        if reason:
            yield self.chunk([self.piece(index, "", [], reason)])

    def beginning(self):
        for index in range(len(self.writings)):
            delta = {"role": "assistant", "content": ""}
            yield self.chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def piece(self, index, text, told, reason):
        return {"index": index, "delta": {} if reason else {"content": text},
                "logprobs": self._logprobs(told) if self.wants_tokens and not reason else None,
                "finish_reason": reason}

    def choice(self, index, text, told, reason):
        return {"index": index, "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._logprobs(told) if self.wants_tokens else None, "finish_reason": reason}

    def _logprobs(self, told):
        def entry(text, data, logprob):
            return {"token": text, "logprob": logprob, "bytes": list(data)}

        return {"content": [entry(token.text, token.bytes, token.logprob)
                            | {"top_logprobs": [entry(*top) for _, *top in token.top]} for token in told],
                "refusal": None}

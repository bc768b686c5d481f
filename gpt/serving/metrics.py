"""Counters of the server, in the text format of Prometheus."""
from collections import Counter

_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """How many values were at most each of some bounds, with their sum."""

    def __init__(self, bounds=_BOUNDS):
        self.bounds, self.counts, self.sum, self.total = bounds, [0] * len(bounds), 0.0, 0

    def add(self, value):
        self.sum += value
        self.total += 1
        for i, bound in enumerate(self.bounds):
            if value <= bound:
                self.counts[i] += 1

    def lines(self, name):
        for bound, count in zip(self.bounds, self.counts, strict=True):
            yield f'{name}_bucket{{le="{bound:g}"}} {count}'
        yield f'{name}_bucket{{le="+Inf"}} {self.total}'
        yield f"{name}_sum {self.sum:.9g}"
        yield f"{name}_count {self.total}"


class Metrics:
    """What the engine and the application count. Each counter is changed by one thread only."""

    def __init__(self):
        self.steps = self.tokens = self.prompt_tokens = self.refused = self.cancelled = self.failed = 0
        self.step_seconds, self.first_token_seconds, self.responses = Histogram(), Histogram(), Counter()

    def step(self, seconds, tokens, prompt_tokens):
        """One pass through the model, in which `tokens` were written and `prompt_tokens` read."""
        self.steps += 1
        self.tokens += tokens
        self.prompt_tokens += prompt_tokens
        self.step_seconds.add(seconds)

    def first_token(self, seconds):
        """A request has its first token, so long after it came."""
        self.first_token_seconds.add(seconds)

    def response(self, path, status):
        """A request to `path` was answered."""
        self.responses[path, status] += 1

    def text(self, engine):
        """All of it, with the state of `engine`, as Prometheus reads it."""
        lines = []
        for name, kind, meaning, value in (
            ("gpt_texts_running", "gauge", "Texts that are being written", engine.running),
            ("gpt_texts_waiting", "gauge", "Texts that wait for a row", engine.waiting),
            ("gpt_rows", "gauge", "Texts that can be written at once", engine.config.rows),
            ("gpt_tokens_total", "counter", "Tokens written", self.tokens),
            ("gpt_prompt_tokens_total", "counter", "Prompt tokens read", self.prompt_tokens),
            ("gpt_refused_total", "counter", "Requests sent away because the queue was full", self.refused),
            ("gpt_cancelled_total", "counter", "Requests whose client went away", self.cancelled),
            ("gpt_failed_total", "counter", "Requests that ended in an error after they were taken", self.failed),
        ):
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", f"{name} {value}"]
        for name, meaning, histogram in (
            ("gpt_step_seconds", "Time of one pass through the model", self.step_seconds),
            ("gpt_first_token_seconds", "Time from request to first token", self.first_token_seconds),
        ):
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} histogram", *histogram.lines(name)]
        lines += ["# HELP gpt_responses_total Responses by path and status", "# TYPE gpt_responses_total counter"]
        lines += [f'gpt_responses_total{{path="{path}",status="{status}"}} {count}'
                  for (path, status), count in sorted(self.responses.items())]
        return "\n".join(lines) + "\n"

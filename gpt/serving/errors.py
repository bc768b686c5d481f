"""Errors as OpenAI's API tells them: {"error": {"message", "type", "param", "code"}} and a status."""

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ServingError(Exception):
    """What a client is told instead of an answer. `param` names the field that is wrong, `code` is for programs,
    `headers` go with the response."""

    def __init__(self, status, message, code=None, param=None, headers=None):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}

    def content(self):
        """The body, a dict."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param, message, code=None):
    """The error for a field that is not as it should be."""
    return ServingError(400, f"{param}: {message}", code or "invalid_value", param)

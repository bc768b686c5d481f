"""Reading the fields of a request, each checked; what is wrong is told by name."""
import difflib
import math

from .errors import ServingError, wrong


class Fields:
    """The fields of a JSON object. A getter takes a field out; null counts as absent. `check_all_read` then refuses
    what is left."""

    def __init__(self, content, within=""):
        self._content, self._within, self._known = dict(content), within, []

    def _take(self, name):
        self._known.append(name)
        return self._content.pop(name, None)

    def _wrong(self, name, message, code=None):
        return wrong(self._within + name, message, code)

    def number(self, name, default, low=-math.inf, high=math.inf):
        """A finite number between two bounds."""
        value = self._take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, f"must be a number, not {kind(value)}", "invalid_type")
        if not low <= value <= high or not abs(value) < 1e300:
            raise self._wrong(name, f"must be {span(low, high)}, not {shown(value)}")
        return value

    def integer(self, name, default, low=-math.inf, high=math.inf):
        """A whole number between two bounds."""
        value = self._take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, f"must be a whole number, not {kind(value)}", "invalid_type")
        if not low <= value <= high:
            raise self._wrong(name, f"must be {span(low, high)}, not {shown(value)}")
        return value

    def boolean(self, name, default):
        value = self._take(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, f"must be true or false, not {kind(value)}", "invalid_type")
        return default if value is None else value

    def text(self, name, default=None):
        value = self._take(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, f"must be a string, not {kind(value)}", "invalid_type")
        return default if value is None else value

    def any(self, name):
        """A value of any kind, for the caller to check."""
        return self._take(name)

    def object(self, name):
        """The Fields of an object, or None."""
        value = self._take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, f"must be an object, not {kind(value)}", "invalid_type")
        return Fields(value, f"{self._within}{name}.")

    def ignore(self, *names):
        """Fields that change nothing here, whatever they hold."""
        for name in names:
            self._take(name)

    def unsupported(self, **neutral):
        """Fields of OpenAI's that are not offered here: only the values that ask for nothing are taken."""
        for name, values in neutral.items():
            value = self._take(name)
            if value is not None and value not in values:
                raise self._wrong(name, "is not supported by this server", "unsupported_parameter")

    def check_all_read(self):
        for name in self._content:
            near = difflib.get_close_matches(name, self._known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ServingError(400, f"unknown field {self._within}{name[:100]}{hint}", "unknown_parameter",
                               self._within + name[:100])


def kind(value):
    """The JSON type of a value, in words."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array",
             dict: "an object", type(None): "null"}
    return names[type(value)]


def shown(value):
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "so large a number"
    return text if len(text) < 100 else text[:100] + "..."


def span(low, high):
    if high == math.inf:
        return f"at least {low:g}"
    return f"at most {high:g}" if low == -math.inf else f"between {low:g} and {high:g}"

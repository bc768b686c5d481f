"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """Wrong input, not a fault of ours. The message is one line that names the thing and the remedy; the command-line
    programs print it without a traceback and exit with code 2."""

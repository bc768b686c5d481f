"""The glass-box page and what it asks the server for."""


def page_routes(engine, config):
    """The list of routes."""
    return []

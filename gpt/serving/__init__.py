"""Serving a model over HTTP: OpenAI's API, a page that looks inside, many texts at once.

    serve(ServeConfig(init_from="out"))                        # until Ctrl-C
    app = create_app(Engine(model, tokenizer, config, "name"), config)      # from .app: a Starlette application
"""
from .config import ServeConfig
from .run import serve

__all__ = ["ServeConfig", "serve"]

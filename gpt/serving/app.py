"""The application: OpenAI's API, the page, health and metrics, behind one gate."""
import hmac
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from ..errors import UserError
from .config import listed
from .errors import ServingError
from .glassbox import page_routes
from .openai_api import openai_routes

OPEN = ("/", "/health")  # what needs no key: the page is empty without what it asks for with one
_LOCAL = ("localhost", "127.0.0.1", "::1")


def create_app(engine, config):
    """The Starlette application for an Engine; the engine starts and stops with it."""

    async def health(request):
        status = 200 if engine.healthy else 503
        return JSONResponse({"status": "ok" if engine.healthy else "stopping", "model": engine.name,
                             "running": engine.running, "waiting": engine.waiting, "rows": config.rows}, status)

    async def metrics(request):
        return PlainTextResponse(engine.metrics.text(engine), media_type="text/plain; version=0.0.4")

    @asynccontextmanager
    async def lifespan(app):
        engine.start()
        yield
        engine.stop()

    routes = [*openai_routes(engine, config), *page_routes(engine, config), Route("/health", health),
              Route("/metrics", metrics)]
    middleware = [Middleware(Gate, engine=engine, config=config, paths={route.path for route in routes})]
    if config.cors_origins:
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=listed(config.cors_origins),
                                        allow_methods=["GET", "POST"], allow_headers=["*"]))
    return Starlette(routes=routes, middleware=middleware, exception_handlers=HANDLERS, lifespan=lifespan)


# ---- errors ----

def respond(error):
    """The response that tells a ServingError."""
    return JSONResponse(error.content(), error.status, error.headers)


async def _serving_error(request, error):
    return respond(error)


async def _user_error(request, error):
    return respond(ServingError(400, str(error), "invalid_value"))


async def _http_error(request, error):
    path = request.url.path[:200]
    texts = {404: f"there is no {path}", 405: f"{path} does not take {request.method}"}
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    return respond(ServingError(error.status_code, texts.get(error.status_code, str(error.detail)),
                                codes.get(error.status_code), headers=error.headers))


async def _fault(request, error):
    return respond(ServingError(500, "the server failed at this request; its log says why", "internal_error"))


HANDLERS = {ServingError: _serving_error, UserError: _user_error, HTTPException: _http_error, Exception: _fault}


class Gate:
    """Lets through who addresses the server by a name of its own and, where there is a key, has it. Counts answers."""

    def __init__(self, app, engine, config, paths):
        self.app, self.metrics, self.key, self.paths = app, engine.metrics, config.api_key.encode(), paths
        local = config.host in _LOCAL
        self.hosts = listed(config.allowed_hosts) or (list(_LOCAL) if local else ["*"])

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def count(message):
            if message["type"] == "http.response.start":
                self._count(scope["path"], message["status"])
            await send(message)

        headers = dict(scope["headers"])
        error = self._host_error(headers) or self._key_error(scope["path"], headers)
        try:
            await (self.app if error is None else respond(error))(scope, receive, count)
        except Exception:
            self._count(scope["path"], 500)
            raise

    def _count(self, path, status):
        """Known paths only: others would let anybody fill the memory."""
        self.metrics.response(path if path in self.paths else "other", status)

    def _host_error(self, headers):
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if "*" not in self.hosts and name.strip("[]") not in self.hosts:
            return ServingError(403, f"this server is not called {name[:100]!r}; --allowed_hosts names more",
                                "unknown_host")

    def _key_error(self, path, headers):
        if not self.key or path in OPEN:
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key):
            return None
        return ServingError(401, "send the server's key: Authorization: Bearer KEY", "invalid_api_key",
                            headers={"WWW-Authenticate": "Bearer"})

"""The glass-box page open in a browser: what its tests share. They import its fixtures by name."""
import math
import shutil
import time

import pytest

for module in ("starlette", "uvicorn"):
    pytest.importorskip(module, reason="the server needs the extra serve: starlette, uvicorn")
playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need Playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("the page's tests need Chromium: apt-get install chromium", allow_module_level=True)

from page_server import add_adapter, served, trained_run  # noqa: E402

from gpt.interop import load_with_tokenizer  # noqa: E402

PROMPT = "3 and 4 make "


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def library(run):
    """(model, tokenizer) as the server has them, but our own."""
    model, tokenizer, *_ = load_with_tokenizer(run)
    add_adapter(model)
    return model, tokenizer


@pytest.fixture(scope="module")
def server(run):
    with served(run, delay=0.015, run_dir=str(run)) as at:
        yield at


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


class Visit:
    """A page that is open; what went wrong in it is in `errors`, `expected` are the beginnings of errors that may."""

    def __init__(self, browser, address, width=1240, height=900, theme="light", scale=1):
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme,
                                           device_scale_factor=scale)
        self.page, self.errors, self.expected, self.address = self.context.new_page(), [], (), address
        self.page.set_default_timeout(20_000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text)
                     if said.type in ("error", "warning") else None)
        self.page.on("request", lambda request: None if request.url.startswith((address, "data:"))
                     else self.errors.append(f"asked elsewhere: {request.url}"))
        self.page.on("response", lambda response: self.refused.append(f"{response.status} {response.url}")
                     if response.status >= 400 else None)
        self.refused = []
        self.page.goto(address + "/")
        self.until("document.getElementById('facts').textContent !== ''")

    def until(self, condition, seconds=20):
        """Wait for a JavaScript expression. Not Playwright's wait_for_function: the page forbids its eval."""
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, f"never came true: {condition}; error: {self.text('#error')}"
            time.sleep(0.02)

    def text(self, selector):
        return self.page.text_content(selector).replace("\u00a0", " ").strip()

    def set(self, **fields):
        for name, value in fields.items():
            self.page.fill(f"#{name}-field" if name != "seed" else "#seed", str(value))

    def written(self):
        self.until("document.getElementById('stop').getAttribute('aria-disabled') === 'true'")

    def tokens(self, box="#out"):
        return self.page.eval_on_selector_all(f"{box} .tok", "all => all.map(one => one.textContent)")

    def write(self, prompt=PROMPT, **fields):
        self.set(**fields)
        self.page.fill("#prompt", prompt)
        self.page.click("#go")
        self.until("document.querySelectorAll('#out .tok').length > 0")
        self.written()


@pytest.fixture
def visit(browser, server):
    visits = []

    def open_page(**how):
        visits.append(Visit(browser, server[0], **how))
        return visits[-1]

    yield open_page
    for one in visits:
        one.context.close()
        unexpected = [error for error in one.errors if not error.startswith(one.expected or "\0")]
        assert not unexpected, unexpected + one.refused


def percent(p):
    """As the page writes it."""
    x = 100 * p
    if 0 < x < 0.01:
        return "<0.01 %"
    return f"{x:.0f} %" if x >= 99.95 else f"{x:.1f} %" if x >= 10 else f"{js_precision(x)} %"


def js_precision(x):
    """Number.toPrecision(2) of x below 10."""
    if x == 0:
        return "0.0"
    digits = max(0, 1 - math.floor(math.log10(float(f"{x:.1e}"))))
    return f"{x:.{digits}f}"

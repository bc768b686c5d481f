"""The glass-box page in a real browser: writing, chatting, alternatives; by keyboard; and nothing it should not do."""
import json
import math
import time

import numpy as np
from page_server import ADAPTER, served
from page_tools import PROMPT, browser, library, percent, run, server, visit

from gpt.inference import generate
from gpt.inference.prompts import conversation_ids, dialogue_stops
from gpt.inference.sample import ends
from gpt.inspect import next_tokens
from gpt.model.lora import set_adapters, set_scale

CUTS = {"top_k": "top-k", "top_p": "top-p", "min_p": "min-p", "greedy": "temperature 0"}

WATCH = """() => {
  window.grown = []; window.shifts = []; window.said = [];
  new MutationObserver(() => window.grown.push([performance.now(), document.querySelectorAll('#out .tok').length]))
    .observe(document.getElementById('out'), {childList: true, subtree: true});
  new MutationObserver(() => window.said.push(document.getElementById('say').textContent))
    .observe(document.getElementById('say'), {childList: true, characterData: true, subtree: true});
  new PerformanceObserver(list => list.getEntries().forEach(shift => window.shifts.push(
      [shift.value, shift.hadRecentInput, ...shift.sources.map(source => source.node?.id || source.node?.nodeName)])))
    .observe({type: 'layout-shift', buffered: true});
}"""


def test_writes_token_by_token(visit, library):
    """What arrives is what the library writes with these settings; it comes bit by bit, and nothing else moves."""
    model, tokenizer = library
    here = visit()
    page = here.page
    page.type("#prompt", PROMPT)
    page.evaluate(WATCH)
    for name, key, times in (("temperature", "ArrowRight", 4), ("top_k", "ArrowRight", 8), ("top_p", "ArrowLeft", 5),
                             ("min_p", "ArrowRight", 1)):
        page.focus(f"#{name}")  # sliders, moved by the keyboard
        for _ in range(times):
            page.keyboard.press(key)
    here.set(max_tokens=90, seed=5)
    shown = {name: page.input_value(f"#{name}-field") for name in ("temperature", "top_k", "top_p", "min_p")}
    assert shown == {"temperature": "1", "top_k": "8", "top_p": "0.95", "min_p": "0.01"}
    page.click("#go")
    here.until("document.querySelectorAll('#out .tok').length > 0")
    here.written()
    [expected] = generate(model, PROMPT, tokenizer, max_new_tokens=90, temperature=1.0, top_k=8, top_p=0.95, min_p=0.01,
                          seed=5, stop_ids=ends(tokenizer), logprobs=0)
    assert "".join(here.tokens()) == expected.text and page.text_content("#out .given") == PROMPT
    shades = page.eval_on_selector_all("#out .tok", "all => all.map(one => Number(one.style.getPropertyValue('--t')))")
    np.testing.assert_allclose(shades, [min(1, -choice.logprob / 5) for choice in expected.choices], atol=2e-3)
    labels = page.eval_on_selector_all("#out .tok", "all => all.map(one => one.getAttribute('aria-label'))")
    assert labels[7].replace("\u00a0", " ").endswith(f"probability {percent(math.exp(expected.choices[7].logprob))}")

    grown = page.evaluate("window.grown")
    counts = [count for _, count in grown]
    assert counts == sorted(counts) and counts[-1] == 90
    assert len(set(counts)) > 30 and max(np.diff(sorted({0, *counts}))) < 30, counts
    assert grown[-1][0] - grown[0][0] > 300, "all tokens came at once"
    mean = -np.mean([choice.logprob for choice in expected.choices])
    assert f"loss {mean:.3f} nats, exp(−loss) {percent(math.exp(-mean))}" in here.text("#status")
    shifts = page.evaluate("window.shifts.filter(([value, recent]) => !recent)")
    assert shifts == [], "the layout jumped"
    said = page.evaluate("window.said")
    assert said[0] == "Writing" and said[-1].startswith("Reached the length. 90 tokens: ") and len(said) <= 3


def test_alternatives_and_cuts(visit, library):
    model, tokenizer = library
    here = visit()
    page = here.page
    here.write(max_tokens=12, temperature=1, seed=1)
    ids = tokenizer.encode(PROMPT + "".join(here.tokens()))
    start, at = len(tokenizer.encode(PROMPT)), 4
    token = ids[start + at]

    def check(**settings):
        seen = next_tokens(model, ids[:start + at], top=12, token=token, **settings)
        expected = []
        for i, p, share, cut in seen.tokens:
            piece = tokenizer.decode([i]).replace(" ", "␣").replace("\n", "↵")
            kind = " ".join(["cut"] * bool(cut) + ["chosen"] * (i == token))
            expected.append([kind, piece, percent(p), CUTS[cut] if cut else percent(share)])
        lines = [f"{seen.kept} tokens are left to draw from",
                 *(f"{CUTS[name]} cuts off {n}, which were {percent(p)} of all draws"
                   for name, (n, p) in seen.cuts.items())]
        deadline = time.monotonic() + 10
        while True:  # the card follows a little later
            rows = page.eval_on_selector_all("#alts li:not(.heads)", """all => all.map(li => [li.className,
                ...[...li.querySelectorAll('.piece, .n')].map(part => part.textContent.replaceAll('\\u00a0', ' '))])""")
            said = [line.replace("\u00a0", " ") for line in page.locator("#cuts li").all_text_contents()]
            if (rows, said) == (expected, lines) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        assert rows == expected and said == lines
        return rows

    page.locator("#out .tok").nth(at).click()
    check()
    here.set(top_k=3)  # the card follows the settings
    assert sum(row[0].startswith("cut") for row in check(top_k=3)) >= 9
    here.set(top_k=0, top_p=0.6, temperature=1.4)
    check(top_p=0.6, temperature=1.4)
    here.set(top_p=1, min_p=0.2)
    check(min_p=0.2, temperature=1.4)
    here.set(min_p=0, temperature=0)
    check(temperature=0)

    before = here.tokens()  # another way from here: the token is replaced and the text goes on after it
    other = page.locator("#alts li:not(.heads):not(.chosen) .piece").nth(1).text_content().replace("␣", " ")
    other = other.replace("↵", "\n")
    page.locator("#alts li:not(.heads):not(.chosen) button").nth(1).click()
    here.until("document.querySelectorAll('#out .tok').length === 12")
    here.written()
    after = here.tokens()
    assert after[:at] == before[:at] and after[at] == other != before[at]
    ids = ids[:start + at] + tokenizer.encode(other)
    [rest] = generate(model, ids, tokenizer, max_new_tokens=12 - at - 1, temperature=0)
    assert "".join(after[at + 1:]) == rest.text


def test_chat(visit, library):
    model, tokenizer = library
    here = visit()
    page = here.page
    page.get_by_text("Chat", exact=True).click()
    here.set(max_tokens=15, temperature=0)
    messages = []
    for said in ("1 and 2 make", "3 less 1 is"):
        count = page.locator(".turn").count()
        page.fill("#prompt", said)
        page.press("#prompt", "Enter")
        here.until(f"document.querySelectorAll('.turn').length === {count + 2}")
        here.written()
        messages.append({"role": "user", "content": said})
        ids = conversation_ids(tokenizer, messages)
        [answer] = generate(model, ids, tokenizer, max_new_tokens=15, temperature=0, stop=dialogue_stops(tokenizer),
                            stop_ids=ends(tokenizer))
        shown = "".join(page.locator(".turn").last.locator(".tok").all_text_contents())
        assert shown.strip() == answer.text.strip()
        messages.append({"role": "assistant", "content": answer.text.strip()})
    assert page.locator(".turn b").all_text_contents() == ["You", "sums", "You", "sums"]
    page.locator(".turn .tok").first.click()  # an earlier answer can be looked at, but not written anew
    here.until("document.getElementById('alts') !== null")
    assert "Choose one of these" not in here.text("#token")
    here.expected = ("Failed to load resource",)
    page.route("**/v1/completions", lambda route: route.fulfill(status=429, json={"error": {"message": "too many"}}))
    page.fill("#prompt", "2 and 2 make")
    page.press("#prompt", "Enter")
    here.until("!document.getElementById('error').hidden")
    assert here.text("#error span") == "too many"
    assert page.locator(".turn").count() == 4 and page.input_value("#prompt") == "2 and 2 make"  # nothing is lost
    page.click("#clear")
    assert page.locator(".turn").count() == 0


def test_adapter_and_scale(visit, library):
    model, tokenizer = library
    here = visit()
    page = here.page
    page.select_option("#model", label=ADAPTER)
    here.set(adapter_scale=0.5)
    here.write(max_tokens=20, temperature=0)
    texts = ["".join(here.tokens())]
    page.locator("#out .tok").nth(2).click()
    here.until("document.getElementById('alts') !== null")
    ids = tokenizer.encode(PROMPT)
    try:  # the card follows the scale
        for scale in (0.5, 1.5, 0):
            here.set(adapter_scale=scale)
            set_adapters(model, [ADAPTER])
            set_scale(model, scale, ADAPTER)
            if scale == 0.5:
                [adapted] = generate(model, ids, tokenizer, max_new_tokens=20, temperature=0)
                ids += adapted.ids[:3]
            told = next_tokens(model, ids[:-1], token=ids[-1])
            p = next(percent(p) for i, p, *_ in told.tokens if i == ids[-1])
            here.until(f"document.querySelector('#alts li.chosen .n').textContent.replace('\u00a0', ' ') === {p!r}")
    finally:
        set_adapters(model, [])
    page.select_option("#model", label="none")
    page.click("#go")
    here.until("document.getElementById('stop').getAttribute('aria-disabled') === 'false'")
    here.written()
    texts.append("".join(here.tokens()))
    [plain] = generate(model, PROMPT, tokenizer, max_new_tokens=20, temperature=0)
    assert texts == [adapted.text, plain.text] and adapted.text != plain.text


def test_stop_and_errors(visit, server):
    here = visit()
    here.expected = ("Failed to load resource",)  # what Chromium says about the 400 that is asked for
    page = here.page
    here.set(max_tokens=400)
    page.fill("#prompt", PROMPT)
    page.click("#go")
    here.until("document.querySelectorAll('#out .tok').length > 5")
    page.click("#stop")
    here.written()
    count = len(here.tokens())
    page.wait_for_timeout(200)
    assert 5 < len(here.tokens()) == count < 400
    here.until("true")
    deadline = time.monotonic() + 5
    while server[1].running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server[1].running == 0  # the server stopped too
    page.fill("#prompt", "3 ü 4")  # no such character in the vocabulary
    page.click("#go")
    here.until("!document.getElementById('error').hidden")
    error = here.text("#error span")
    assert "ü" in error and "\n" not in error and len(error) < 300
    here.written()
    page.click("#error button")
    assert page.is_hidden("#error")


def test_answers_that_are_empty_or_break_off(visit):
    """A text without a token says so; one that breaks off stays as far as it came, with a word on why."""
    here = visit()
    page, answers = here.page, []
    page.route("**/v1/completions", lambda route: route.fulfill(content_type="text/event-stream", body=answers.pop(0)))
    tokens = {"token_ids": [5], "token_logprobs": [-1], "bytes": [[97]]}
    for said in ("data: {\"choices\": [{\"finish_reason\": \"stop\"}]}\n\ndata: [DONE]\n\n",
                 f"data: {json.dumps({'choices': [{'logprobs': tokens}]})}\n\n"):
        answers.append(said)
        page.fill("#prompt", PROMPT)
        page.click("#go")
        here.written()
        if not here.tokens():
            assert here.text("#status") == "The model ended at once: no token." and page.is_hidden("#error")
    assert here.tokens() == ["a"] and here.text("#error span") == "The answer broke off. Is the server still running?"
    assert here.text("#status") == "1 token · loss 1.000 nats, exp(−loss) 36.8 %"


def test_lines_read_in_their_own_direction(visit):
    """Hebrew from the right, English from the left, in one text."""
    page = visit().page
    page.fill("#prompt", "שלום\nThe end")
    lines = page.evaluate("""() => {
        const box = document.getElementById('out'), range = document.createRange();
        box.textContent = 'שלום\\nThe end';
        return [[0, 4], [5, 12]].map(([from, to]) => {
          range.setStart(box.firstChild, from); range.setEnd(box.firstChild, to);
          return range.getBoundingClientRect().left - box.getBoundingClientRect().left;
        });
    }""")
    assert lines[0] > 300 > 50 > lines[1]


def test_by_keyboard_alone(visit):
    here = visit()
    page = here.page

    def tab_to(selector):
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
                return
        raise AssertionError(f"Tab never came to {selector}")

    tab_to("#prompt")
    page.keyboard.type(PROMPT)
    tab_to("#max_tokens-field")
    page.keyboard.press("Control+a")
    page.keyboard.type("200")
    page.keyboard.press("Shift+Tab")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    here.until("document.querySelectorAll('#out .tok').length > 4")
    page.keyboard.press("Escape")
    here.written()
    count = len(here.tokens())
    assert 4 < count < 200 and page.evaluate("document.activeElement.id") == "prompt"
    tab_to(".tok")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[...document.querySelectorAll('.tok')].indexOf(document.activeElement)") == 2
    page.keyboard.press("Enter")
    here.until("document.getElementById('alts') !== null && document.querySelectorAll('.tok.on').length === 1")
    page.focus("#tab-write")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-inside" and page.is_visible("#inside")
    tab_to("#read")
    page.keyboard.type("1 and 2")
    tab_to("#look")
    page.keyboard.press("Enter")
    here.until("document.getElementById('map').dataset.tokens === '7'")
    tab_to("#map")
    page.keyboard.press("ArrowLeft")
    assert "looks at" in here.text("#trace")
    tab_to("#lens td")
    page.keyboard.press("ArrowDown")
    assert "layer 1 would say" in here.text("#lens-told")
    unnamed = page.evaluate("""[...document.querySelectorAll('input, select, textarea, button')].filter(one =>
        !(one.labels?.length || one.getAttribute('aria-label') || one.textContent.trim())).map(one => one.id)""")
    assert unnamed == []


def test_text_is_never_markup(visit, server):
    """Markup in a prompt stays text, scripts that were not served are refused, and the page is told so by header."""
    here = visit()
    page = here.page
    here.expected = ("Failed to load resource", "This document requires", "Executing inline", "Refused", "Connecting",
                     "Fetch API")
    headers = page.request.get(server[0] + "/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "require-trusted-types-for 'script'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    page.fill("#prompt", "<img src=x onerror=document.title=1>")  # refused, as the vocabulary has no such characters
    page.click("#go")
    here.until("document.querySelector('#error span').textContent.includes(\"'<'\")")
    assert page.evaluate("document.images.length") == 0 and page.title() == "sums"
    tried = page.evaluate("""() => {
        const attempts = {
          html: () => { document.body.innerHTML = '<b>x</b>'; },
          script: () => { document.body.appendChild(document.createElement('script')).textContent = 'window.bad = 1'; },
          handler: () => { document.body.setAttribute('onclick', 'window.bad = 1'); document.body.click(); },
        };
        return Object.fromEntries(Object.entries(attempts).map(([name, go]) => {
          try { go(); return [name, window.bad ? 'done' : 'refused']; } catch { return [name, 'refused']; }
        }));
    }""")
    assert set(tried.values()) == {"refused"}, tried
    outside = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'done', () => 'refused')")
    assert outside == "refused" and page.evaluate("typeof window.bad") == "undefined"
    here.errors = [error for error in here.errors if not error.startswith("asked elsewhere: http://127.0.0.1:9/")]


def test_key(browser, run):
    """A server with a key asks for it once."""
    with served(run, api_key="open sesame") as (address, _):
        context = browser.new_context()
        page = context.new_page()
        page.goto(address + "/")
        page.locator("#ask-key").wait_for(state="visible")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.locator("#ask-key").wait_for(state="visible")
        page.fill("#key", "open sesame")
        page.press("#key", "Enter")
        page.get_by_text("layers of 2 heads").wait_for()
        page.reload()
        page.get_by_text("layers of 2 heads").wait_for()
        context.close()


"""The glass-box page in a real browser: attention, lens, losses and training runs against the library's numbers; how it
looks on a phone, in the dark, and to weak eyes."""
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from page_server import served
from page_tools import PROMPT, Visit, browser, library, percent, run, server, visit
from tiny_run import FIELDS, environment, flags, tiny_config

from gpt.inspect import attention_map, inspect_text, text_losses

ROOT = Path(__file__).resolve().parents[1]

PIXELS = """() => {
  const map = document.getElementById('map'), {side, left, top, tokens, low, high} = map.dataset;
  const {data} = map.getContext('2d').getImageData(0, 0, map.width, map.height);
  const device = x => Math.floor(x * devicePixelRatio);
  const at = (x, y) => [0, 1, 2].map(i => data[4 * (device(y) * map.width + device(x)) + i]);
  const numbers = Array.from({length: +tokens}, (_, i) => i);
  return {low: low.split(',').map(Number), high: high.split(',').map(Number),
    found: numbers.map(i => numbers.map(j => at(+left + (j + .5) * side, +top + (i + .5) * side)))};
}"""


@pytest.mark.parametrize("theme, scale", [("light", 1), ("dark", 2)])
def test_heat_map_pixels(theme, scale, visit, library):
    """Every cell of the picture has the colour of the library's number."""
    model, tokenizer = library
    here = visit(theme=theme, scale=scale)
    here.expected = ("Canvas2D: Multiple readback",)  # a hint to us who read the pixels
    page = here.page
    page.click("#tab-inside")
    page.fill("#read", "2 and 3 make 5; 3 less 2 is 1.\n4 and 1")
    page.click("#look")
    here.until("document.getElementById('map').dataset.tokens === '38'")
    ids = tokenizer.encode("2 and 3 make 5; 3 less 2 is 1.\n4 and 1")
    seen_colours = set()
    for layer, head in ((None, None), (1, 0), (0, 1), (1, None), (None, 1)):
        with page.expect_response("**/api/attention"):
            page.select_option("#layer", "" if layer is None else str(layer))
        with page.expect_response("**/api/attention"):
            page.select_option("#head", "" if head is None else str(head))
        page.wait_for_timeout(150)
        drawn, expected = page.evaluate(PIXELS), attention_map(model, ids, layer, head)
        low, high = np.array(drawn["low"][:3]), np.array(drawn["high"][:3])
        found, past = np.array(drawn["found"]), np.tril(np.ones((38, 38), dtype=bool))
        colours = low + (high - low) * np.sqrt(expected)[..., None]
        np.testing.assert_allclose(found[past], colours[past], atol=1.01)
        assert (found[~past] == 0).all(), "something is drawn beyond the diagonal"
        seen_colours.add(found[past].tobytes())
    assert len(seen_colours) == 5 and (np.abs(low - high) > 60).any()

    box = page.locator("#map").bounding_box()  # hover to trace
    side, left, top = (float(page.get_attribute("#map", f"data-{name}")) for name in ("side", "left", "top"))
    page.mouse.move(box["x"] + left + 7.5 * side, box["y"] + top + 20.5 * side)
    expected = attention_map(model, ids, None, 1)
    piece = tokenizer.decode([ids[7]]).replace(" ", "␣")
    assert f"(20) looks at “{piece}” (7): {percent(expected[20, 7])}" in here.text("#trace")
    assert page.locator("#ribbon .row-token").count() == page.locator("#ribbon .column-token").count() == 1
    page.focus("#map")  # and by keyboard
    page.mouse.move(0, 0)
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    piece = tokenizer.decode([ids[35]]).replace(" ", "␣")
    assert f"(36) looks at “{piece}” (35): {percent(expected[36, 35])}" in here.text("#trace")


def test_logit_lens_and_small_maps(visit, library):
    model, tokenizer = library
    here = visit()
    page = here.page
    here.write(max_tokens=9, seed=2)
    page.click("#to-inside")  # the written text is taken along
    here.until("document.querySelectorAll('#lens tbody tr').length === 2")
    text = PROMPT + "".join(page.eval_on_selector_all("#out .tok", "all => all.map(one => one.textContent)"))
    assert page.input_value("#read") == text
    seen = inspect_text(model, tokenizer, text)
    cells = page.eval_on_selector_all("#lens tbody td", """all => all.map(td => [td.getAttribute('aria-label')
        .replaceAll('\\u00a0', ' '), Number(td.style.getPropertyValue('--t')), td.className])""")
    expected = [(said[0], at) for layer in seen.lens for at, said in enumerate(layer)]
    for (label, t, kind), ((token, p), at) in zip(cells, expected, strict=True):
        piece = tokenizer.decode([token]).replace(" ", "␣").replace("\n", "↵")
        assert label.endswith(f": {piece}, {percent(round(p, 6))}") and abs(t - p) < 1e-3
        assert kind == ("right" if at + 1 < len(seen.ids) and token == seen.ids[at + 1] else "")
    page.locator("#lens tbody td").nth(3).hover()
    told = here.text("#lens-told")
    assert "layer 0 would say" in told and told.count("%") == 5
    mean = seen.losses.mean()
    assert f"loss {mean:.3f} nats, exp(−loss) {percent(math.exp(-mean))}" in here.text("#look-status")
    here.until("document.getElementById('heads').dataset.step !== undefined")  # a click on a small map chooses it
    step, margin = (float(page.get_attribute("#heads", f"data-{name}")) for name in ("step", "margin"))
    page.locator("#heads").click(position={"x": margin + 0.5 * step, "y": 1.5 * step})
    assert (page.input_value("#layer"), page.input_value("#head")) == ("1", "0")


def test_losses_of_a_pasted_text(visit, library):
    model, tokenizer = library
    here = visit()
    page = here.page
    page.click("#tab-loss")
    text = "5 and 6 make 11; 6 less 5 is 1.\n7 and 9 make 12; 9 is less.\n" * 2
    page.fill("#paste", text)
    page.click("#measure")
    here.until("document.querySelectorAll('#loss-out .tok').length > 0")
    ids = tokenizer.encode(text)
    losses, ranks, starts = text_losses(model, ids)
    assert len(ids) > model.config.block_size and "".join(here.tokens("#loss-out")) == text
    shades = page.eval_on_selector_all("#loss-out .tok", "all => all.map(one => one.style.getPropertyValue('--t'))")
    np.testing.assert_allclose([float(t) for t in shades[1:]], np.clip(np.array(losses) / 5, 0, 1), atol=2e-3)
    tiles = here.text("#loss-tiles")
    mean = np.mean(losses)
    assert f"Mean loss{mean:.3f}" in tiles and f"exp(−loss){percent(math.exp(-mean))}" in tiles
    at = len(ids) - 8  # predicted from a window that begins within the text
    page.locator("#loss-out .tok").nth(at).click()
    here.until("document.querySelector('#token .soft')?.textContent.startsWith('loss')")
    loss = losses[at - 1]
    assert f"loss {loss:.3f} nats, exp(−loss) {percent(math.exp(-loss))}" in here.text("#token")
    assert f"rank {ranks[at - 1] + 1} of {model.config.vocab_size}" in here.text("#token")
    assert "exp(−loss)" in here.text("#loss-chart .read")


def test_watches_a_run(browser, run, tmp_path):
    """Numbers that a run writes while the page is open appear; a run that begins anew replaces the old one."""
    folder = tmp_path / "live"
    shutil.copytree(run, folder)
    metrics = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(metrics[:6]))
    samples = (folder / "samples.txt").read_text()
    (folder / "samples.txt").unlink()
    with served(run, run_dir=str(folder)) as (address, _):
        here = Visit(browser, address)
        page = here.page
        page.click("#tab-training")
        before = json.loads(metrics[5])
        here.until(f"document.getElementById('run-tiles').textContent.includes('Iteration{before['iter']}')")
        assert "of 300" in here.text("#run-tiles") and here.text("#run-state") == "live"
        picture = page.locator("#charts canvas").first.screenshot()
        with open(folder / "metrics.jsonl", "a") as file:
            file.writelines(metrics[6:-3])
            file.write(metrics[-3][:7])  # a line that is not whole yet
            file.flush()
            last = [json.loads(line) for line in metrics[6:-3] if '"loss"' in line][-1]
            here.until(f"document.getElementById('run-tiles').textContent.includes('Training loss{last['loss']:.3f}')")
            assert f"exp(−loss) {percent(math.exp(-last['loss']))}" in here.text("#run-tiles")
            assert page.locator("#charts canvas").first.screenshot() != picture
            (folder / "samples.txt").write_text(samples)
            file.write(metrics[-3][7:])
            file.writelines(metrics[-2:])
        best = min(json.loads(line)["val_loss"] for line in metrics if "val_loss" in line)
        here.until(f"document.getElementById('run-tiles').textContent.includes('Best validation loss{best:.3f}')")
        here.until("document.querySelectorAll('#samples .sample').length === 3")
        assert here.text("#samples .sample b") == "iteration 300" and "1 and " in here.text("#samples .sample")
        page.focus("#charts canvas")  # a place of the curve, read by keyboard
        page.keyboard.press("ArrowLeft")
        assert re.match(r"at \d+: training [\d.]+, exp\(−loss\) .* · validation", here.text("#charts .read"))
        (folder / "new").write_text('{"iter": 0, "loss": 9.5, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 10.0}\n')
        (folder / "new").replace(folder / "metrics.jsonl")
        here.until("document.getElementById('run-tiles').textContent.includes('Training loss9.500')")
        assert "Best validation loss–" in here.text("#run-tiles")
        here.context.close()
        assert here.errors == []


def test_watches_a_run_from_its_beginning(browser, run, tmp_path):
    """scripts/train.py in a process of its own, seen from before its first number to its last."""
    changes = {"max_iters": 1500, "eval_interval": 500, "sample_interval": 500, "sample_tokens": 20, "block_size": 48,
               "batch_size": 16, "log_interval": 10}
    config = tiny_config(tmp_path, **changes)
    fields = {name: getattr(config, name) for name in {**FIELDS, **changes, "data": 0, "out_dir": 0}}
    with served(run, run_dir=config.out_dir) as (address, _):
        here = Visit(browser, address)
        here.page.click("#tab-training")
        here.until("document.getElementById('run-state').textContent === 'waiting for its first numbers'")
        command = [sys.executable, "scripts/train.py", *flags(fields)]
        training = subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path), stdout=subprocess.DEVNULL)
        seen, deadline = [], time.monotonic() + 120
        while (not seen or seen[-1] < 1500) and time.monotonic() < deadline:
            now = here.page.evaluate("document.getElementById('run-progress').value")
            if not seen or now != seen[-1]:
                seen.append(now)
            time.sleep(0.1)
        assert training.wait(60) == 0 and seen == sorted(seen) and len(seen) > 3 and seen[-1] == 1500, seen
        here.until("document.querySelectorAll('#samples .sample').length === 3")
        records = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
        best = min(record["val_loss"] for record in records if "val_loss" in record)
        assert f"Best validation loss{best:.3f}" in here.text("#run-tiles")
        here.context.close()
        assert here.errors == []


def test_phone(visit):
    """At 375 px nothing sticks out to the right, and what is chosen is brought into view."""
    here = visit(width=375, height=700, theme="dark")
    page = here.page
    fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    here.write(max_tokens=60, seed=3)
    assert page.evaluate(fits)
    page.locator("#out .tok").first.click()
    here.until("document.getElementById('alts') !== null")
    box = page.locator("#token").bounding_box()
    assert box["y"] < 700 and page.evaluate(fits)
    page.click("#to-inside")
    here.until("document.querySelectorAll('#lens td').length > 0 && document.getElementById('map').dataset.tokens > 0")
    assert page.evaluate(fits)
    page.click("#tab-loss")
    page.fill("#paste", PROMPT * 9)
    page.click("#measure")
    here.until("document.querySelectorAll('#loss-out .tok').length > 0")
    assert page.evaluate(fits)
    page.click("#tab-training")
    here.until("document.querySelectorAll('#samples .sample').length > 0")
    assert page.evaluate(fits)
    sizes = page.eval_on_selector_all("button, select", """all => all.filter(one => one.offsetParent)
        .map(one => one.offsetHeight)""")
    assert min(sizes) >= 24  # WCAG 2.2, target size


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme, visit):
    """Text on every shade, and the quiet text, can be read: WCAG AA, 4.5 : 1."""
    here = visit(theme=theme)
    colours = here.page.evaluate("""() => Object.fromEntries(['--ink', '--soft', '--paper', '--card', '--well',
        '--surprise', '--accent', '--on-accent', '--bad'].map(name => [name, colour(name).slice(0, 3)]))""")
    colours = {name: np.array(value) / 255 for name, value in colours.items()}

    def luminance(rgb):
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for t in np.linspace(0, 1, 11):
        assert contrast(colours["--ink"], colours["--well"] + t * (colours["--surprise"] - colours["--well"])) > 4.5
        lens = colours["--well"] + 0.5 * t * (colours["--accent"] - colours["--well"])  # the ribbon; the lens has less
        assert contrast(colours["--ink"], lens) > 4.5
    for text, ground in (("--soft", "--paper"), ("--soft", "--card"), ("--soft", "--well"), ("--on-accent", "--accent"),
                         ("--accent", "--card"), ("--bad", "--card")):
        assert contrast(colours[text], colours[ground]) > 4.5, (text, ground)
    assert np.abs(colours["--ink"] - colours["--card"]).sum() > 1


def test_theme_toggle(visit):
    here = visit(theme="light")
    page = here.page
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    assert here.text("#theme") == "Theme: light" and page.evaluate(ground) == light
    page.click("#theme")
    dark = page.evaluate(ground)
    assert here.text("#theme") == "Theme: dark" and dark != light
    page.reload()
    assert page.evaluate(ground) == dark  # it is remembered

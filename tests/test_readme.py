"""What the README shows works as shown."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["loss"].item() < 0.2
    assert (tmp_path / "circle.safetensors").stat().st_size > 0


def test_two_set_up_commands_on_lines_of_their_own():
    assert len(re.findall(r"^pip install .*&&.*$", README, re.MULTILINE)) == 2


def test_links_and_named_paths_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for path in re.findall(r"`((?:tensorgrad|gpt|scripts|tests|configs|docs)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path

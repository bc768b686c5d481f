"""Serve a trained model over HTTP: OpenAI's API under /v1, and a page that looks inside at /.

    python scripts/serve.py --init_from out
    python scripts/serve.py --init_from model.gguf --port 8080 --adapters pirate=adapters/pirate
    GPT_API_KEY=... python scripts/serve.py --host 0.0.0.0 --rows 16

`--help` lists every field. Exit codes: 0 done, 1 a fault of ours, 2 wrong input, 130 interrupted.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from gpt.cli import serve  # noqa: E402

if __name__ == "__main__":
    sys.exit(serve())

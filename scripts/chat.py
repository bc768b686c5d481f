"""Talk with a trained model in the terminal.

    python scripts/chat.py --init_from out
    python scripts/chat.py --init_from out --system "You answer in rhymes." --temperature 0.6
    python scripts/chat.py --init_from model.gguf --dtype int8                  # weights in 8 bits: read faster
    python scripts/chat.py --init_from out --adapters "pirate=out-pirate, legal=out-legal"

Within the conversation: /reset, /temp 0.7, /adapter NAME, /help, /quit. Ctrl-C ends an answer, at the prompt it leaves.
`--help` lists every field. Exit codes: 0 done, 1 a fault of ours, 2 wrong input, 130 interrupted.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from gpt.cli import chat  # noqa: E402

if __name__ == "__main__":
    sys.exit(chat())

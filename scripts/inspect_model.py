"""Look inside a trained model while it reads a text: loss and alternatives per token, attention, logit lens.

    python scripts/inspect_model.py --init_from out --text "To be, or not to be"
    python scripts/inspect_model.py --init_from out --text_file page.txt --pictures pictures --layer 2 --head 0
    python scripts/inspect_model.py --text "To be" --json                       # all numbers, attention included

`--help` lists every field. Exit codes: 0 done, 1 a fault of ours, 2 wrong input, 130 interrupted.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from gpt.cli import inspect  # noqa: E402

if __name__ == "__main__":
    sys.exit(inspect())

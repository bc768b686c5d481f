"""Write text with a trained model.

    python scripts/sample.py --init_from out --prompt "The list" --max_new_tokens 300
    python scripts/sample.py --init_from out/last --temperature 0        # the latest weights; greedy
    python scripts/sample.py --prompt_file book.txt --num_samples 4      # several texts; - reads standard input
    python scripts/sample.py --prompt "Once" --num_beams 4 --json        # the likeliest text, as JSON
    python scripts/sample.py --init_from gpt2 --dtype bfloat16 --adapters pirate=out-pirate   # packed, with an adapter

`--help` lists every field. Exit codes: 0 done, 1 a fault of ours, 2 wrong input, 130 interrupted.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from gpt.cli import sample  # noqa: E402

if __name__ == "__main__":
    sys.exit(sample())

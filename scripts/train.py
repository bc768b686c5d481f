"""Train a GPT on text.

    python scripts/train.py                                          # about three minutes on two cores, no download
    python scripts/train.py --data my_book.txt --out_dir out/book    # any text file or folder
    python scripts/train.py configs/shakespeare_char_cpu.toml        # nanoGPT's run for CPUs
    python scripts/train.py configs/shakespeare_char.toml --device cuda --max_iters 500
    python scripts/train.py --resume out                             # go on where a run stopped
    mpiexec -n 2 python scripts/train.py --gradient_accumulation_steps 2 --batch_size 8     # two processes (extra dist)
    python scripts/train.py --init_from out --data other.txt --out_dir out/other    # fine-tune

`--help` lists every field. Exit codes: 0 done, 1 a fault of ours, 2 wrong input, 130 interrupted (and saved).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from gpt.cli import train  # noqa: E402

if __name__ == "__main__":
    sys.exit(train())

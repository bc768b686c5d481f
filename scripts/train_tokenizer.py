"""Train a tokenizer on text and say how well it compresses text that it has not seen.

    python scripts/train_tokenizer.py --data my_book.txt --vocab_size 8192 --out_dir out/bpe
    python scripts/train_tokenizer.py --kind word --vocab_size 10000 --min_frequency 2
    python scripts/train.py --tokenizer out/bpe                     # and then train with it

Cost: about three seconds for 12 MB and 32,768 ids. `--help` lists every field. Exit codes: 0 done, 1 a fault of ours,
2 wrong input, 130 interrupted.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from gpt.cli import parse_flags, run_cli, show_help  # noqa: E402
from gpt.errors import UserError  # noqa: E402
from gpt.text.tokenizers.training import TokenizerConfig, train_tokenizer  # noqa: E402


def main(argv):
    show_help(argv, TokenizerConfig(), "Train a tokenizer on text.")
    flags, others = parse_flags(argv, TokenizerConfig)
    if others:
        raise UserError(f"unexpected argument {others[0]!r}; a text is given as --data {others[0]!r}")
    train_tokenizer(TokenizerConfig(**flags))


if __name__ == "__main__":
    sys.exit(run_cli(main))

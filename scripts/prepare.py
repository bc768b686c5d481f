"""Tokenize a text into a folder of memory-mapped token files.

    python scripts/prepare.py                       # prose from Python's own documentation, by character
    python scripts/prepare.py --data shakespeare --tokenizer gpt2 --out_dir data/shakespeare_gpt2

Cost: seconds for a few megabytes. A second run with the same text and tokenizer finds the folder and only opens it.
`--help` lists every field. Exit codes: 0 done, 1 a fault of ours, 2 wrong input, 130 interrupted.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from gpt.cli import parse_flags, run_cli, show_help  # noqa: E402
from gpt.errors import UserError  # noqa: E402
from gpt.text import load_text, prepare  # noqa: E402


@dataclass
class PrepareConfig:
    """What to tokenize, and where to."""

    data: str = "pydocs"
    """"pydocs" (documentation on this machine, no download), "shakespeare", or the path of a text file or folder."""
    tokenizer: str = "char"
    """"char", "word:10000", "bpe:4096" (made from the text), "gpt2", "cl100k_base", "o200k_base", or a path."""
    out_dir: str | None = None
    """Folder for train.bin, val.bin, meta.json and tokenizer.json; without it, one in the cache."""
    val_fraction: float = 0.1
    """Share of the characters, from the end, that is held out for validation."""


def main(argv):
    show_help(argv, PrepareConfig(), "Tokenize a text into a folder of memory-mapped token files.")
    flags, others = parse_flags(argv, PrepareConfig)
    if others:
        raise UserError(f"unexpected argument {others[0]!r}; a text is given as --data {others[0]!r}")
    config = PrepareConfig(**flags)
    corpus = load_text(config.data)
    print(f"text       {corpus.description}; {corpus.size:,} bytes, sha256 {corpus.sha256}")
    dataset = prepare(corpus, config.tokenizer, config.out_dir, config.val_fraction)
    print(f"tokenizer  {dataset.tokenizer.name}, {dataset.tokenizer.vocab_size:,} ids, {dataset.meta['dtype']}")
    for name, split in dataset.meta["splits"].items():
        per_token = f", {split['bytes'] / split['tokens']:.3f} bytes per token" if split["tokens"] else ""
        print(f"{name:<10} {split['tokens']:,} tokens{per_token}")
    print(f"folder     {dataset.folder}")


if __name__ == "__main__":
    sys.exit(run_cli(main))

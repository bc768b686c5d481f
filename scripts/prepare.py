"""Tokenize a text into a folder of memory-mapped token files.

    python scripts/prepare.py                       # prose from Python's own documentation, by character
    python scripts/prepare.py --data shakespeare --tokenizer gpt2 --out_dir data/shakespeare_gpt2

Cost: seconds for a few megabytes. A second run with the same text and tokenizer finds the folder and only opens it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone without installing

import tyro  # noqa: E402

from gpt.errors import UserError  # noqa: E402
from gpt.text import load_text, prepare  # noqa: E402


def main(
    data: str = "pydocs", tokenizer: str = "char", out_dir: Path | None = None, val_fraction: float = 0.1
) -> None:
    """Tokenize a text into a folder of memory-mapped token files.

    Args:
        data: pydocs (documentation on this machine, no download), shakespeare, or the path of a text file or folder.
        tokenizer: char, gpt2, cl100k_base, o200k_base, or the path of a tokenizer.json.
        out_dir: folder for train.bin, val.bin, meta.json and tokenizer.json; default: one in the cache.
        val_fraction: share of the characters, from the end, that is held out for validation.
    """
    corpus = load_text(data)
    print(f"text       {corpus.description}; {corpus.size:,} bytes, sha256 {corpus.sha256}")
    dataset = prepare(corpus, tokenizer, out_dir, val_fraction)
    print(f"tokenizer  {dataset.tokenizer.name}, {dataset.tokenizer.vocab_size:,} ids, {dataset.meta['dtype']}")
    for name, split in dataset.meta["splits"].items():
        per_token = f", {split['bytes'] / split['tokens']:.3f} bytes per token" if split["tokens"] else ""
        print(f"{name:<10} {split['tokens']:,} tokens{per_token}")
    print(f"folder     {dataset.folder}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

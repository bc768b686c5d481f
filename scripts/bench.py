"""Measure speed and memory beside PyTorch, each measurement in a process of its own, processes taking turns.

    python scripts/bench.py train --size S M L --level fast numpy       # the training step, beside PyTorch eager
    python scripts/bench.py train --size C --rounds 3                   # nanoGPT's shakespeare_char, dropout 0.2
    python scripts/bench.py train --size M --peers eager compile bf16   # beside all of PyTorch's forms
    python scripts/bench.py train --size M --dtype float32 bfloat16 --peers eager bf16   # products from 16 bits
    python scripts/bench.py train --size S --busy                       # and again with a busy neighbour process
    python scripts/bench.py train --size S M --against HEAD~5           # beside an earlier revision
    python scripts/bench.py curve --size C --data tinyshakespeare.txt   # 250 steps of both: their loss curves
    python scripts/bench.py ops --size M                                # every fused routine against its floor
    python scripts/bench.py generate                                    # a 124M GPT-2 beside transformers
    python scripts/bench.py storage --model out --text book.txt         # perplexity with weights in 16 and 8 bits
    python scripts/bench.py cuda --json out.json                        # on a GPU: step, decoding, kernels, PyTorch
    python scripts/bench.py import                                      # import time, cost of a small operation

Sizes, as batch x block, layers/heads/width, vocabulary: S 12 x 64, 4/4/128, 65; M 16 x 128, 6/6/384, 65; L 4 x 256,
12/12/768, 50304; C 64 x 256, 6/6/384, 65. Ratios are PyTorch's time or memory over ours, above 1 is better than
PyTorch, taken within each round and then their median. Without PyTorch its columns stay empty.

Cost: train S 1 minute, M 2, L 3; ops 2; generate 3; import 1. Tables, then one JSON object as the last line.
Exit codes: 0 done, 1 a measurement of ours failed, 2 wrong input, 130 interrupted.
"""
import argparse
import json
import sys
from pathlib import Path

from benchmarks import cuda, curve, generate, imports, ops, runner, storage, train
from benchmarks.sizes import SIZES

JOBS = {"train": train.measure, "curve": curve.measure, "ops": ops.measure, "floors": ops.floors,
        "generate": generate.measure, "overhead": imports.overhead, "cuda": cuda.measure, "cuda_kernels": cuda.kernels,
        "cuda_generate": cuda.generate}


def parse(argv):
    """The options of the command line; exits with 2 where they are wrong."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train_, ops_, generate_, import_, curve_, storage_, cuda_ = (
        commands.add_parser(name) for name in ("train", "ops", "generate", "import", "curve", "storage", "cuda"))
    for command, sizes, first, rounds, steps in (
        (train_, list(SIZES), "S", 5, "measured steps per process"),
        (ops_, list(SIZES), "M", 3, f"samples per routine and process (default {ops.SAMPLES})"),
        (generate_, list(generate.SHAPES), "124M", 3, f"new tokens (default {generate.NEW_TOKENS})"),
    ):
        command.add_argument("--size", nargs="+", choices=sizes, default=[first], help=f"default {first}")
        command.add_argument("--level", nargs="+", choices=runner.LEVELS, default=["fast"],
                             help="levels of our routines (default fast, the best installed)")
        command.add_argument("--steps", type=_positive, help=steps)
        command.add_argument("--against", metavar="REV", help="measure this git revision too")
        command.set_defaults(rounds=rounds)
    import_.set_defaults(rounds=11, against=None)
    curve_.set_defaults(rounds=1, against=None, level=["fast"], dropout=None)
    curve_.add_argument("--size", nargs="+", choices=list(SIZES), default=["C"], help="default C")
    curve_.add_argument("--steps", type=_positive, default=250, help="training steps (default 250)")
    curve_.add_argument("--data", metavar="FILE", type=Path, help="text whose characters are learned")
    storage_.set_defaults(rounds=1, against=None)
    storage_.add_argument("--model", metavar="PATH", help="run, Hugging Face folder or .gguf file")
    storage_.add_argument("--text", metavar="FILE", type=Path, help="text, of which the last tenth is read")
    storage_.add_argument("--tokens", type=_positive, default=8192, help="tokens of it at most (default 8192)")
    for command in (train_, curve_):
        command.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"],
                             help="bfloat16: products from 16 bits, see set_float32_matmul_precision")
    for command, peers in ((train_, list(runner.PEERS)), (ops_, ["eager"]), (import_, ["eager"]),
                           (curve_, list(runner.PEERS))):
        command.add_argument("--peers", nargs="+", choices=[*peers, "none"], default=["eager"],
                             help="forms of PyTorch (default eager)")
    cuda_.set_defaults(rounds=1, against=None, limit=cuda.LIMIT)
    cuda_.add_argument("--size", nargs="+", choices=list(cuda.SIZES), default=["124M"], help="default 124M")
    cuda_.add_argument("--batch", type=_positive, help="sequences per step, in place of the size's own")
    cuda_.add_argument("--steps", type=_positive, help="measured steps per process")
    cuda_.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the program out")
    cuda_.add_argument("--no_kernels", action="store_true", help="the training step only")
    cuda_.add_argument("--peers", nargs="+", choices=[*cuda.PEERS, "none"], default=list(cuda.PEERS),
                       help="forms of PyTorch (default eager compile)")
    train_.add_argument("--dropout", type=float, help="in place of the size's own")
    train_.add_argument("--busy", action="store_true", help="measure again beside a process that keeps one core busy")
    for command in commands.choices.values():
        command.add_argument("--rounds", type=_positive, default=command.get_default("rounds"),
                             help=f"processes per contender (default {command.get_default('rounds')})")
        command.add_argument("--threads", type=_positive, default=runner.thread_count(),
                             help="threads of every library (default TENSORGRAD_THREADS, else all allowed processors)")
        command.add_argument("--json", metavar="PATH", type=Path, help="write the JSON object to this file too")
    return parser.parse_args(argv)


def _positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def main(argv):
    if argv[:1] == ["--worker"]:
        spec = json.loads(argv[1])
        sys.path.insert(0, spec["root"])  # the tensorgrad that is measured
        print(json.dumps(JOBS[spec["job"]](spec)))
        return 0
    if argv[:2] == ["--device", "cuda"]:  # bench.py --device cuda is short for bench.py cuda
        argv = ["cuda", *argv[2:]]
    options = parse(argv)
    modules = {"train": train, "curve": curve, "ops": ops, "generate": generate, "import": imports, "storage": storage,
               "cuda": cuda}
    module = modules[options.command]
    result = {"benchmark": options.command, "machine": runner.machine(options.threads),
              "options": {name: value for name, value in vars(options).items()
                          if name not in ("command", "json", "data", "text")}}

    def keep(rows, skipped):
        if options.json:
            options.json.write_text(json.dumps({**result, "results": rows, "skipped": skipped}) + "\n")

    options.keep = keep  # for what takes long: what is measured is not lost where the rest is
    try:
        with runner.checked_out(options.against) as options.against_root:
            result["results"], result["skipped"] = module.report(options)
    except runner.BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, runner.WrongInput) else 1
    for name, reason in result["skipped"].items():
        print(f"skipped: {name}: {reason}")
    line = json.dumps(result)
    if options.json:
        options.json.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

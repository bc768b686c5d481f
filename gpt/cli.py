"""The command line: flags over TOML files over defaults, and what the programs do with errors.

    python scripts/train.py configs/a.toml configs/b.toml --max_iters 500 --bias=false --learning-rate 3e-4

Files are read from left to right and flags win over files. Everything is one flat dataclass, so every field is a flag.
`--help` is drawn by tyro from the dataclass, its types and the docstrings under its fields.
"""
import errno
import os
import sys
import time
import warnings
from pathlib import Path

import tensorgrad as tg

from .errors import UserError
from .training import Interrupted
from .training.files import FULL_DISK
from .training.settings import BOOLEANS, convert, field_types, read_toml, unknown_name

_CONFIG_FOLDERS = (Path(__file__).resolve().parents[1] / "configs", Path(__file__).resolve().parent / "configs")


def parse_flags(argv, cls):
    """Command-line words as ({field: value}, [other words]); raises UserError for an unknown flag or a wrong value.

    A flag is spelled `--max_iters 5`, `--max_iters=5` or `--max-iters 5`; a boolean one also `--bias`, `--no_bias`.
    """
    kinds, values, others, words = field_types(cls), {}, [], list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            others.append(word)
            continue
        name, has_value, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in kinds and kinds.get(name.removeprefix("no_")) is bool and not has_value:
            values[name.removeprefix("no_")] = False
            continue
        if name not in kinds:
            raise UserError(unknown_name(name, cls, mark="--"))
        if not has_value:
            following = words[0] if words else "--"
            if kinds[name] is bool:
                text = words.pop(0) if following.lower() in BOOLEANS else "true"
            elif following.startswith("--"):
                raise UserError(f"--{name} needs a value, as in --{name}=VALUE")
            else:
                text = words.pop(0)
        values[name] = convert(text, kinds[name], f"--{name}", parse=True)
    return values, others


def config_file(name):
    """The path of a configuration: a path as it is, or the name of one of the configurations that come with us."""
    places = [Path(name), *(folder / name for folder in _CONFIG_FOLDERS)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        ours = sorted({path.name for folder in _CONFIG_FOLDERS for path in folder.glob("*.toml")})
        raise UserError(f"no configuration file {name!r}; those that come with us are {', '.join(ours)}")
    return found


def show_help(argv, default, description):
    """Where `argv` asks for it, print every field of `default`, a settings dataclass, with its meaning, and exit."""
    if "--help" not in argv and "-h" not in argv:
        return
    import tyro

    tyro.cli(type(default), args=["--help"], default=default, description=description, use_underscores=True,
             prog=Path(sys.argv[0]).name)


def run_cli(main, argv=None):
    """Call `main(argv)` and return the exit code: 0 done, 2 the user's input, 130 interrupted.

    What the user can mend is one line on stderr. Anything else is a fault of ours: its traceback is left to Python,
    which exits with 1.
    """
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # of NumPy, on the way to a loss that is not finite
    try:
        main(sys.argv[1:] if argv is None else argv)
        return 0
    except (UserError, tg.DeviceError) as error:
        return _complain(error)
    except FileNotFoundError as error:
        return _complain(f"{error.filename}: no such file or folder" if error.filename else error)
    except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else error)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(130)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return _complain(f"{str(error.filename)[:100]}...: {error.strerror}")
        if error.errno not in FULL_DISK:
            raise
        return _complain(f"{error.filename or 'writing a file'}: {error.strerror}; free some space and run again")
    except MemoryError as error:
        return _complain(f"out of memory: {error}; lower --batch_size or --block_size")
    except Interrupted as interrupt:  # all processes have ended in order
        return _complain(interrupt, prefix="", code=130, in_order=True)
    except KeyboardInterrupt as interrupt:
        return _complain(str(interrupt) or "interrupted", prefix="", code=130)


def _complain(message, prefix="error: ", code=2, in_order=False):
    """Print one line on stderr; returns the exit code. Of several processes the first one speaks, and one that fails
    alone: after a second, in which the first would have ended it. Then all end, which they do anyway if `in_order`."""
    together = tg.distributed.joined()
    rank, _, local_rank = tg.distributed.launched()
    if together and rank and not in_order:
        time.sleep(1)
    if not (rank if in_order else local_rank and not together):
        print(prefix + " ".join(str(message).split()), file=sys.stderr)
    return code if in_order else _leave(code)


def _leave(code):
    """End the other processes of a training, which would wait for this one forever; returns the exit code."""
    if tg.distributed.joined():
        tg.distributed.world().abort(code)
    return code


def train(argv=None):
    """The program `scripts/train.py`, also installed as `gpt-train`. Returns the exit code."""
    return run_cli(_train, argv)


def _train(argv):
    from .interop import load_with_tokenizer, shape_of
    from .training.config import TrainConfig, resolve
    from .training.run import train

    show_help(argv, TrainConfig(**read_toml(config_file("default.toml"), TrainConfig)),
              "Train a GPT. Usage: train.py [CONFIG.toml ...] [--field value ...]. Without a configuration file the "
              "values of configs/default.toml hold; they are the defaults shown here.")
    with tg.distributed.world().in_turn():  # what is wrong is said once
        flags, files = parse_flags(argv, TrainConfig)
        explicit = {}
        for file in files:
            explicit |= read_toml(config_file(file), TrainConfig)
        fallback = {} if files else read_toml(config_file("default.toml"), TrainConfig)
        config = resolve(explicit | flags, fallback, shape_of)
    train(config, open_base=load_with_tokenizer, callbacks=_peft(config))


def _peft(config):
    """The callbacks that keep an adapter as a PEFT folder beside the run's own file."""
    from .interop.peft import PeftFolder
    from .training.checkpoints import PEFT_FOLDER

    return [PeftFolder(Path(config.out_dir) / PEFT_FOLDER, config.init_from)] if config.lora_r else []


def finetune(argv=None):
    """The program `scripts/finetune.py`, also installed as `gpt-finetune`. Returns the exit code."""
    return run_cli(_finetune, argv)


def _finetune(argv):
    from .interop import load_with_tokenizer, shape_of
    from .training.config import TrainConfig
    from .training.finetuning import finetune, finetune_config

    def defaults(name):
        return read_toml(config_file(name), TrainConfig)

    with_lora = defaults("finetune.toml")
    show_help(argv, TrainConfig(**with_lora | {"init_from": "?"}),
              "Fine-tune a model. Usage: finetune.py --init_from MODEL --data FILE [CONFIG.toml ...] [--field value "
              "...]. What no file and no flag says is as in configs/finetune.toml, with --lora_r 0 as in "
              "configs/finetune_full.toml.")
    with tg.distributed.world().in_turn():  # what is wrong is said once
        flags, files = parse_flags(argv, TrainConfig)
        explicit = {}
        for file in files:
            explicit |= defaults(file)
        explicit |= flags
        config = finetune_config(explicit, with_lora if explicit.get("lora_r", 1) else defaults("finetune_full.toml"),
                                 shape_of)
    finetune(config, open_base=load_with_tokenizer, callbacks=_peft(config))


def _with_model(program, config_class, argv, title, hint, adapted=False):
    """Run a program of flags alone that opens a trained model; `hint` says where an argument without a flag belongs;
    `adapted`: the model comes with the adapters that the flags name."""
    from .interop.adapters import loader

    show_help(argv, config_class(), title)
    flags, others = parse_flags(argv, config_class)
    if others:
        raise UserError(f"unexpected argument {others[0]!r}; {hint}")
    config = config_class(**flags)
    program(config, load=loader(config.adapters if adapted else ""))


def sample(argv=None):
    """The program `scripts/sample.py`, also installed as `gpt-sample`. Returns the exit code."""
    return run_cli(_sample, argv)


def _sample(argv):
    from .inference.sample import SampleConfig, sample

    _with_model(sample, SampleConfig, argv, "Write text with a trained model.", "a prompt is given as --prompt", True)


def chat(argv=None):
    """The program `scripts/chat.py`, also installed as `gpt-chat`. Returns the exit code."""
    return run_cli(_chat, argv)


def _chat(argv):
    from .inference.chat import ChatConfig, chat

    _with_model(chat, ChatConfig, argv, "Talk with a trained model.", "what you want to say is asked for", True)


def inspect(argv=None):
    """The program `scripts/inspect_model.py`, also installed as `gpt-inspect`. Returns the exit code."""
    return run_cli(_inspect, argv)


def _inspect(argv):
    from .inspect import InspectConfig, inspect

    title = "Look inside a trained model while it reads a text."
    _with_model(inspect, InspectConfig, argv, title, "a text is given as --text")


def serve(argv=None):
    """The program `scripts/serve.py`, also installed as `gpt-serve`. Returns the exit code."""
    return run_cli(_serve, argv)


def _serve(argv):
    from .serving.config import ServeConfig
    from .serving.run import serve

    _with_model(serve, ServeConfig, argv, "Serve a trained model: OpenAI's API, and a page that looks inside.",
                "the model is given as --init_from")


def convert_model(argv=None):
    """The program `scripts/convert.py`, also installed as `gpt-convert`. Returns the exit code."""
    return run_cli(_convert, argv)


def _convert(argv):
    from .interop.convert import ConvertConfig, convert_model

    show_help(argv, ConvertConfig(), "Convert a model between the formats. Usage: convert.py SOURCE TARGET [--field "
              "value ...]. SOURCE is a run folder, a Hugging Face folder or name on its hub, a PEFT folder, a .gguf or "
              "an .npz file.")
    flags, others = parse_flags(argv, ConvertConfig)
    if len(others) != 2:
        raise UserError(f"give a source and a target, as in: convert.py out model.gguf (there are {len(others)} names)")
    convert_model(*others, ConvertConfig(**flags))

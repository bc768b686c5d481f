"""LoRA: train small low-rank additions to the weights of a frozen model (Hu et al. 2021, "LoRA").

    report = inject(model, LoRAConfig(r=8, lora_alpha=16, target_modules=["c_attn"]))    # freezes all else
    print(report)                                     # which layers, and what share of the parameters is trained
    state = adapter_state(model)                      # the adapter alone, by name
    set_scale(model, 0.5); set_adapters(model, ["pirate"]); set_adapters(model, [])     # weaker; another; none
    merge(model); unmerge(model)                      # into the weights, and back to the same bits
    merge_and_unload(model)                           # a plain model again, with the adapter in its weights

Names, arguments, defaults and initial values are those of PEFT. See lora_targets.py for what can be named.
"""
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace

import tensorgrad as tg
from tensorgrad import nn

from ..errors import UserError
from .lora_layers import Adapted, LoRAEmbedding, LoRALinear
from .lora_targets import choose, find_targets

DEFAULT = "default"


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt, and how. Raises UserError for impossible values."""

    r: int = 8
    """Rank: each adapted weight (out, in) gets B @ A with B (out, r), A (r, in)."""
    lora_alpha: float = 8
    """B @ A counts lora_alpha / r times."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of A in training."""
    target_modules: tuple[str, ...] | str = ("c_attn",)
    """Names or ends of names of the layers; a string is a regular expression, or "all-linear" (all but the head)."""
    exclude_modules: tuple[str, ...] | str = ()
    """What to leave out, written the same way."""
    layers_to_transform: tuple[int, ...] | int | None = None
    """Numbers of the blocks to adapt, if not all."""
    layers_pattern: tuple[str, ...] | str = ()
    """The words after which a block's number stands; any if empty."""
    use_rslora: bool = False
    """Count B @ A lora_alpha / sqrt(r) times (Kalajdzievski 2023, "Rank stabilization")."""
    use_dora: bool = False
    """Learn the lengths of the weight's rows apart from their directions (Liu et al. 2024, "DoRA")."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some layers, by a regular expression for the end of their name."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other lora_alpha for some layers."""

    def __post_init__(self):
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            _require(name, isinstance(value, str) or _all(value, str), value, "a name, or a list of names")
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            _require(name, isinstance(value, dict) and _all(tuple(value), str), value, "a table of names and numbers")
        for name in ("use_rslora", "use_dora"):
            _require(name, type(getattr(self, name)) is bool, getattr(self, name), "true or false")
        layers = self.layers_to_transform
        _require("layers_to_transform", layers is None or type(layers) is int or _all(layers, int), layers,
                 "a number, or a list of numbers")
        for r in (self.r, *self.rank_pattern.values()):
            _require("the rank r of an adapter", type(r) is int and r >= 1, r, "a whole number of at least 1")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            _require("lora_alpha", type(alpha) in (int, float) and abs(alpha) < 1e30, alpha, "a number")
        _require("lora_dropout", type(self.lora_dropout) in (int, float) and 0 <= self.lora_dropout < 1,
                 self.lora_dropout, "at least 0 and below 1")
        words = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        strings = [pattern for pattern in (self.target_modules, self.exclude_modules) if isinstance(pattern, str)]
        for pattern in (*strings, *words, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is no regular expression: {error}; separate entries make a "
                                "list") from None

    def only(self, entry):
        """The same with one entry of target_modules."""
        return replace(self, target_modules=(entry,))

    def for_target(self, target):
        """(rank, factor of B @ A) of a Target."""
        r, alpha = _by_pattern(self.rank_pattern, target, self.r), _by_pattern(self.alpha_pattern, target,
                                                                               self.lora_alpha)
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)


def _require(name, holds, value, what):
    if not holds:
        raise UserError(f"{name} must be {what}, not {value!r}")


def _all(values, kind):
    """Is this a list or tuple of `kind` alone?"""
    return isinstance(values, (list, tuple)) and all(type(value) is kind for value in values)


def _by_pattern(patterns, target, default):
    return next((value for pattern, value in patterns.items()
                 if any(re.match(rf"(.*\.)?({pattern})$", name) for name in target.names)), default)


@dataclass(frozen=True)
class Report:
    """What `inject` did; str() says it in a line or two."""

    config: LoRAConfig
    targets: list
    trained: int
    total: int

    @property
    def share(self):
        """Trained parameters over all parameters, the adapter included."""
        return self.trained / self.total

    def __str__(self):
        kinds = Counter(re.sub(r"\.\d+\.", ".*.", target.name) for target in self.targets)
        names = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in kinds.items())
        return (f"LoRA of rank {self.config.r} on {len(self.targets)} projections: {names}; "
                f"trains {self.trained:,} of {self.total:,} parameters ({self.share:.3%})")


def inject(model, config, name=DEFAULT, targets=None):
    """Add an adapter called `name` to `model`, in place, activate it alone and freeze everything else.

    config: a LoRAConfig; it chooses the layers, unless `targets`, a list of Targets, says them. Returns a Report.
    Raises UserError where a pattern matches nothing, and for a name that is taken or has a dot in it."""
    if name in adapter_names(model) or not name or "." in name:
        raise UserError(f"an adapter cannot be called {name!r}: a name has no dot and is used once; this model has "
                        f"{', '.join(adapter_names(model)) or 'none yet'}")
    _refuse_merged(model)
    chosen = choose(config, find_targets(model)) if targets is None else targets
    if config.use_dora and any(target.is_embedding for target in chosen):
        raise UserError("use_dora is for linear layers: leave the embeddings out of target_modules, or use_dora")
    for target in chosen:
        layer = _adapted(model, target.layer)
        if name not in layer.adapters:
            layer.adapters[name] = nn.ModuleList()
        part = layer.new_part(target, *config.for_target(target), config)
        layer.adapters[name].append(part.train(layer.training))
    model.lora_configs = adapter_configs(model) | {name: config}
    model.requires_grad_(False)
    set_adapters(model, [name])
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return Report(config, chosen, trained, sum(p.numel() for p in parameters))


def _adapted(model, path):
    """The layer with adapters at `path`, put there in place of the plain one if need be."""
    layer = model.get_submodule(path)
    if not isinstance(layer, Adapted):
        layer = (LoRAEmbedding if isinstance(layer, nn.Embedding) else LoRALinear)(layer)
        _replace(model, path, layer)
    return layer


def _replace(model, path, module):
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}


def adapter_configs(model):
    """{adapter name: LoRAConfig} of a model."""
    return dict(getattr(model, "lora_configs", {}))


def adapter_names(model):
    """The names of a model's adapters, in the order they were added."""
    return list(adapter_configs(model))


def parts(model, name=DEFAULT):
    """The parts of an adapter (see lora_layers.py), in the order of the layers. Raises UserError for an unknown
    name."""
    _known(model, [name])
    return [part for layer in _layers(model).values() if name in layer.adapters for part in layer.adapters[name]]


def active_adapters(model):
    """The names of the adapters that count."""
    return sorted({name for layer in _layers(model).values() for name in layer.active})


def set_adapters(model, names):
    """Let exactly these adapters count, their sum where there are several, and be trained; [] is the model without."""
    _known(model, names)
    _refuse_merged(model)
    for layer in _layers(model).values():
        layer.active = tuple(name for name in names if name in layer.adapters)
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in names)


def set_scale(model, scale, name=DEFAULT):
    """Let an adapter count `scale` times what it was trained with: 1 as trained, 0 not at all."""
    _refuse_merged(model)
    for part in parts(model, name):
        part.strength = float(scale)


def merge(model):
    """Put the active adapters into the weights: no cost when run, and `unmerge` gives back the same bits, as the
    weights as they were are kept beside the merged ones. They are not trained while merged."""
    for layer in _layers(model).values():
        layer.merge()


def unmerge(model):
    """Take the adapters out of the weights again; bit for bit the weights before `merge`."""
    for layer in _layers(model).values():
        layer.unmerge()


def merge_and_unload(model):
    """Put the active adapters into the weights for good, in place: afterwards `model` has plain layers and no adapters.
    Weights stay frozen. A head that was tied to the embedding has weights of its own if it was adapted. Returns it."""
    merge(model)
    for path, layer in _layers(model).items():
        _replace(model, path, layer.plain())
    model.__dict__.pop("lora_configs", None)
    config = getattr(model, "config", None)
    if getattr(config, "tie_weights", False) and model.lm_head.weight is not model.transformer.wte.weight:
        model.config = replace(config, tie_weights=False)
    return model


def adapter_state(model, name=DEFAULT):
    """{"transformer.h.0.attn.c_attn.lora_A.weight": Tensor (r, in), "...lora_B.weight": Tensor (rows, r), ...}: the
    adapter alone, sharing memory."""
    return {f"{part.target.name}.{key}": tensor.detach()
            for part in parts(model, name) for key, tensor in part.tensors().items()}


def load_adapter_state(model, state, name=DEFAULT, source="the adapter"):
    """Copy what `adapter_state` gave into an adapter of the same shape. Nothing is written if anything does not fit:
    UserError naming the tensor; `source` says where they come from."""
    own = adapter_state(model, name)
    for key in [*own, *state]:
        if key not in state:
            raise UserError(f"{source} has no tensor {key}, which the adapter {name!r} needs; was it made for other "
                            "target_modules?")
        if key not in own:
            raise UserError(f"{source} has a tensor {key} that has no place in the adapter {name!r}; was it made for "
                            "other target_modules?")
        if tuple(state[key].shape) != tuple(own[key].shape):
            raise UserError(f"{source}: {key} has shape {tuple(state[key].shape)}, here it has "
                            f"{tuple(own[key].shape)}; the rank or the model is another one")
    for key, tensor in own.items():
        tensor.copy_(tg.as_tensor(state[key]))


def _known(model, names):
    have = adapter_names(model)
    for name in names:
        if name not in have:
            raise UserError(f"no adapter {name!r}; this model has {', '.join(have) or 'none'}")


def _refuse_merged(model):
    if any(layer.is_merged for layer in _layers(model).values()):
        raise UserError("the adapters are merged into the weights; unmerge the model first")

"""Which parts of a model an adapter goes to: names as PEFT matches them.

A target is a linear layer, or a block of its rows where one product computes several projections: the queries, keys and
values of attention, gate and value of swiglu. A target has the name it has here, which for GPT-2 is also its name in
Hugging Face, and where Llama has such a projection the name it has there:

    transformer.h.0.attn.c_attn                                              all rows
    transformer.h.0.attn.q_proj       model.layers.0.self_attn.q_proj        the queries' rows of c_attn; k_proj, v_proj
    transformer.h.0.attn.c_proj       model.layers.0.self_attn.o_proj
    transformer.h.0.mlp.c_fc                                                 all rows
    transformer.h.0.mlp.gate_proj     model.layers.0.mlp.gate_proj           the gate's rows of c_fc; up_proj
    transformer.h.0.mlp.c_proj        model.layers.0.mlp.down_proj
    transformer.wte                   model.embed_tokens                     an embedding; wpe, which Llama has not
"""
import difflib
import re
from dataclasses import dataclass

from tensorgrad import nn

from ..errors import UserError
from .attention import CausalSelfAttention
from .ffn import MLP


@dataclass(frozen=True)
class Target:
    """A linear layer, a block of its rows, or an embedding, that an adapter can be added to."""

    name: str
    """Its dotted name here."""
    layer: str
    """Dotted name of the linear layer; equal to `name` for a whole one."""
    rows: tuple[int, int]
    """First row, and the one after the last, of the layer's weight (out, in), or of the table."""
    llama: str | None = None
    """Its dotted name in Hugging Face's Llama, None where Llama has no such layer."""
    is_embedding: bool = False
    """Is it a table of vectors?"""

    @property
    def is_whole(self):
        return self.name == self.layer

    @property
    def names(self):
        return [name for name in (self.name, self.llama) if name]


def find_targets(model):
    """All Targets of `model`, in the order of its layers: a whole layer, then its blocks."""
    modules = dict(model.named_modules())
    targets = []
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            llama, blocks = _llama_names(modules.get(parent), last)
            prefix = _llama_prefix(parent)
            targets.append(Target(name, name, (0, module.out_features), llama and prefix + llama))
            start = 0
            for block, rows in blocks.items():
                targets.append(Target(f"{parent}.{block}", name, (start, start + rows), prefix + block))
                start += rows
        elif isinstance(module, nn.Embedding):
            llama = "model.embed_tokens" if name.endswith(".wte") else None
            targets.append(Target(name, name, (0, module.num_embeddings), llama, is_embedding=True))
    return targets


def _llama_names(parent, last):
    """What Llama calls the layer `last` of `parent`, and {name: rows} of the blocks in it."""
    if isinstance(parent, CausalSelfAttention):
        if last == "c_attn":
            kv = parent.n_kv_head * parent.head_dim
            return None, {"q_proj": parent.n_head * parent.head_dim, "k_proj": kv, "v_proj": kv}
        return "o_proj", {}
    if isinstance(parent, MLP):
        if last == "c_fc":
            half = parent.c_fc.out_features // 2
            return None, {"gate_proj": half, "up_proj": half} if parent.gated else {}
        return "down_proj", {}
    return last, {}


def _llama_prefix(parent):
    """transformer.h.3.attn -> model.layers.3.self_attn. (with the dot)"""
    return re.sub(r"^transformer\.h\.(\d+)\.", r"model.layers.\1.", parent + ".").replace(
        ".attn.", ".self_attn.").lstrip(".")


def matches(config, name):
    """Does a LoRAConfig choose the module called `name`? The rule is PEFT's: a string is a regular expression for the
    whole name, in a list each entry is a name or the end of one after a dot; then what is excluded, then the layers."""
    if config.exclude_modules and _listed(config.exclude_modules, name):
        return False
    if isinstance(config.target_modules, str):
        return re.fullmatch(config.target_modules, name) is not None
    if name in config.target_modules:  # an exact name holds whatever the layers are
        return True
    return _listed(config.target_modules, name) and _in_layers(config, name)


def _listed(names, name):
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return name in names or any(name.endswith(f".{entry}") for entry in names)


def _in_layers(config, name):
    """Is the first number in `name`, or the one after a word of `layers_pattern`, among `layers_to_transform`?"""
    layers = config.layers_to_transform
    if layers is None or layers == [] or layers == ():
        return True
    words = config.layers_pattern or [r"[^.]*"]
    anchor = r"(?:^|.*?\.)" if config.layers_pattern else r".*?\."
    for word in [words] if isinstance(words, str) else words:
        found = re.match(rf"{anchor}{word}\.(\d+)\.", name)
        if found:
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def choose(config, targets):
    """The Targets that `config` chooses, in order.

    Whole layers are looked for first, then blocks of rows, then Llama's names; the first kind that an entry of
    `target_modules` (or the regular expression) finds counts. Raises UserError for an entry that matches nothing, and
    where a layer and one of its blocks are both chosen."""
    if isinstance(config.target_modules, str):
        if config.target_modules.lower() == "all-linear":
            chosen = {t for t in targets if t.is_whole and t.name != "lm_head" and not t.is_embedding
                      and not (config.exclude_modules and _listed(config.exclude_modules, t.name))}
        else:
            chosen = _found(config, targets)
    else:
        chosen = set()
        for entry in config.target_modules:
            chosen |= _found(config.only(entry), targets)
    if not chosen:
        raise UserError("target_modules is empty, or everything is excluded: name the layers to adapt, as in c_attn")
    chosen = [target for target in targets if target in chosen]
    whole = {target.layer for target in chosen if target.is_whole}
    for target in chosen:
        if not target.is_whole and target.layer in whole:
            raise UserError(f"target_modules name {target.name} and the whole layer {target.layer} that it is a part "
                            "of; leave one out")
    return chosen


def _found(config, targets):
    kinds = [[(t, t.name) for t in targets if t.is_whole], [(t, t.name) for t in targets if not t.is_whole],
             [(t, t.llama) for t in targets if t.llama]]
    for kind in kinds:
        found = {target for target, name in kind if matches(config, name)}
        if found:
            return found
    pattern = config.target_modules if isinstance(config.target_modules, str) else config.target_modules[0]
    ends = sorted({name.rpartition(".")[2] for target in targets for name in target.names})
    near = difflib.get_close_matches(pattern.rpartition(".")[2], ends, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    limits = [f"{name} = {value!r}" for name, value in (("exclude_modules", config.exclude_modules),
              ("layers_to_transform", config.layers_to_transform)) if value not in (None, (), [])]
    within = f" (with {', '.join(limits)})" if limits else ""
    raise UserError(f"target_modules: {pattern!r}{within} matches no layer; {hint}The model has {', '.join(ends)}")

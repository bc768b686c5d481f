"""How the tensors of a model are called, cut and turned in other people's files.

Every format is one `Names`: for each of our modules the module, or the modules whose rows ours has one below the other,
in theirs. `gather` makes our weights of their tensors, `scatter` their tensors of our weights.
"""
import re
from dataclasses import dataclass, field

import numpy as np

import tensorgrad as tg
from tensorgrad import nn
from tensorgrad.nn import init

from ..errors import UserError
from ..model.gpt import GPT
from ..training.checkpoints import weights_of
from .stored import adjoin

_KEPT = {"float16": "F16", "bfloat16": "BF16"}  # types of files that need no conversion
_SHOWN = 12  # names per kind of trouble in a message


@dataclass(frozen=True)
class Names:
    """A naming of modules. block: their prefix of block {}; top, blocks: {our module: their module or modules}."""

    block: str
    top: dict
    blocks: dict
    transposed: frozenset = frozenset()
    """Our modules whose weight is stored (in, out)."""
    interleaved: frozenset = frozenset()
    """Their modules whose rotary pairs are neighbours instead of half a head apart."""
    ignored: re.Pattern = field(default=re.compile("(?!)"))
    """Their tensors that are no weights."""

    def of(self, ours):
        """(our module without block number, [their tensor, ...]) of our tensor."""
        module, _, leaf = ours.rpartition(".")
        found = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", module)
        part = found[2] if found else module
        theirs = (self.blocks if found else self.top)[part]
        prefix = self.block.format(found[1]) if found else ""
        return part, [f"{prefix}{name}.{leaf}" for name in ((theirs,) if isinstance(theirs, str) else theirs)]


_SAME = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")

GPT2 = Names(
    "transformer.h.{}.",
    {"transformer.wte": "transformer.wte", "transformer.wpe": "transformer.wpe", "transformer.ln_f": "transformer.ln_f",
     "lm_head": "lm_head"},
    {name: name for name in _SAME},
    transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    ignored=re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias"))

LLAMA = Names(  # and Mistral, Qwen2, Qwen3
    "model.layers.{}.",
    {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"},
    {"ln_1": "input_layernorm", "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
     "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm", "attn.c_proj": "self_attn.o_proj",
     "ln_2": "post_attention_layernorm", "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"), "mlp.c_proj": "mlp.down_proj"},
    ignored=re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"))

_GGUF_TOP = {"transformer.wte": "token_embd", "transformer.ln_f": "output_norm", "lm_head": "output"}

GGUF_GPT2 = Names(
    "blk.{}.", _GGUF_TOP | {"transformer.wpe": "position_embd"},
    {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
     "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"})

_GGUF_BLOCKS = {
    "ln_1": "attn_norm", "attn.c_attn": ("attn_q", "attn_k", "attn_v"), "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": ("ffn_gate", "ffn_up"), "mlp.c_proj": "ffn_down"}

GGUF_LLAMA = Names("blk.{}.", _GGUF_TOP, _GGUF_BLOCKS, interleaved=frozenset({"attn_q", "attn_k"}),
                   ignored=re.compile(r"rope_freqs\.weight"))
GGUF_QWEN = Names("blk.{}.", _GGUF_TOP, _GGUF_BLOCKS)  # Qwen2 and Qwen3: pairs half a head apart, as here


def skeleton(config):
    """A GPT whose memory is reserved but not filled in."""
    with init.skip_init():
        return GPT(config)


def gather(config, names, stored, source, without_bias=(), dtype="float32"):
    """A GPT of `config` with the weights in `stored`, {their name: Stored}, read from `source` (for messages).

    without_bias: our modules that have a bias here and none there; it is zero. dtype: how matrices are stored, see
    load.py. Raises UserError that lists all names
    that are missing, unexpected or of another shape before anything is read."""
    _refuse_impossible(config, stored, source)
    model = skeleton(config)
    plan, wanted = {}, {}
    for ours, tensor in weights_of(model).items():
        part, theirs = names.of(ours)
        if part in without_bias and ours.endswith(".bias"):
            theirs = []
        plan[ours] = part, theirs
        shape = tuple(tensor.shape)
        for name, rows in zip(theirs, rows_of(config, part, shape[0]) if len(theirs) > 1 else shape[:1], strict=False):
            turned = part in names.transposed and len(shape) == 2
            wanted[name] = (*shape[1:], rows) if turned else (rows, *shape[1:])
    _refuse_misfits(wanted, stored, names, source)
    parameters = dict(model.named_parameters())
    for ours, (part, theirs) in plan.items():
        if not theirs:
            array = np.zeros(tuple(parameters[ours].shape), np.float32)
        else:
            kept = dtype in _KEPT and parameters[ours].ndim == 2 and {stored[name].dtype for name in theirs} == {
                _KEPT[dtype]}
            arrays = [_ours(config, names, part, name, stored[name].narrow() if kept else stored[name].read())
                      for name in theirs]
            array = adjoin(arrays)                                             # rows one below the other
            if kept or dtype != "float32" and array.ndim == 2:
                weight = nn.PackedWeight(np.ascontiguousarray(array)) if kept else nn.pack(array, dtype)
                model.get_submodule(ours.rpartition(".")[0]).weight = weight
                continue
        parameters[ours].data = tg.from_numpy(array)
        parameters[ours]._bump()
    if config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model.eval()


def scatter(config, names, weights):
    """{their name: array} of our `weights`, {our name: float32 array}: the inverse of `gather`."""
    found = {}
    for ours, array in weights.items():
        part, theirs = names.of(ours)
        sizes = rows_of(config, part, len(array)) if len(theirs) > 1 else [len(array)]
        for name, rows in zip(theirs, np.split(array, np.cumsum(sizes)[:-1]), strict=True):
            found[name] = _theirs(config, names, part, name, rows)
    return found


def rows_of(config, part, rows):
    """How the rows of a module of ours divide among theirs."""
    if part == "attn.c_attn":
        return [config.n_head * config.head_dim, *[config.kv_heads * config.head_dim] * 2]
    return [rows // 2] * 2                                                     # swiglu's gate and value


def _ours(config, names, part, name, array):
    if part in names.transposed and array.ndim == 2:
        return array.T
    if name.split(".")[-2] in names.interleaved:
        pairs = array.reshape(-1, config.head_dim // 2, 2, *array.shape[1:])   # (heads, hs / 2, 2, C)
        return pairs.swapaxes(1, 2).reshape(array.shape)
    return array


def _theirs(config, names, part, name, array):
    if part in names.transposed and array.ndim == 2:
        return array.T
    if name.split(".")[-2] in names.interleaved:
        halves = array.reshape(-1, 2, config.head_dim // 2, *array.shape[1:])  # (heads, 2, hs / 2, C)
        return halves.swapaxes(1, 2).reshape(array.shape)
    return array


def _refuse_impossible(config, stored, source):
    """A configuration can ask for any amount of memory: one that asks for more than the file holds is refused."""
    there = sum(tensor.size for tensor in stored.values())
    longest = config.block_size if config.position == "learned" else 1
    widest = max(config.vocab_size, longest, config.hidden_dim, config.n_head * config.head_dim) * config.n_embd
    if config.n_layer > len(stored) or widest > there:
        raise UserError(f"{source}: its configuration ({config.n_layer} layers, width {config.n_embd}, vocabulary "
                        f"{config.vocab_size:,}) needs more than the {len(stored)} tensors of {there:,} numbers that "
                        "are there; the two do not belong together")


def _refuse_misfits(wanted, stored, names, source):
    missing = [name for name in wanted if name not in stored]
    unexpected = [name for name in stored if name not in wanted and not names.ignored.fullmatch(name)]
    other = [f"{name} {stored[name].shape}, not {shape}" for name, shape in wanted.items()
             if name in stored and stored[name].shape != shape]
    problems = [f"{kind}: {', '.join(found[:_SHOWN])}{f' and {len(found) - _SHOWN} more' * (len(found) > _SHOWN)}"
                for kind, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
                if found]
    if problems:
        raise UserError(f"{source}: the weights do not fit the configuration; {'; '.join(problems)}")

"""The model's decoding step in compiled kernels: the same computation as `GPT.decode`, from the same weights.

Where it is not possible (post-norm, active LoRA adapters, hooks, no Numba) `fused_step` gives None, and the modules
compute. What it prepares is kept with the cache and made anew when layers, weights or adapters are exchanged. On a GPU
it is a CUDA graph of the modules' own work, see graphed.py.
"""
from tensorgrad import nn
from tensorgrad.nn.decoding import BlockWeights, StackDecoder, Unsupported, observed

from .graphed import graphed_step
from .lora import LoRALinear

_KEPT = 32  # numbers of rows for which a cache keeps what was prepared


def fused_step(model, idx, step):
    """Logits (B, V) after one new token per row, idx (B, 1), or None."""
    cache, config = step.cache, model.config
    if step.width != 1 or step.fresh or model.training or observed():
        return None
    if idx.device.type == "cuda":
        return graphed_step(model, idx, step)
    if config.norm_position != "pre":
        return None
    key = step.first, step.rows
    watch, decoder = cache.fused.get(key, (None, None))
    if watch is None or not watch.unchanged():
        watch = _Watch()
        decoder = _make(model, cache, step, watch)
        if len(cache.fused) >= _KEPT:
            cache.fused.clear()
        cache.fused[key] = watch, decoder
    if decoder is None:
        return None
    rotary = model.transformer.h[0].attn.rotary(1, step) if config.position == "rotary" else None
    x = model.embed(idx, step)[:, 0]                                           # (B, C)
    logits = decoder.step(x, [start % cache.length for start in step.starts],
                          [min(start + 1, cache.length) for start in step.starts], rotary)
    step.finish()
    return logits


class _Watch:
    """What must stay the same objects: attributes of modules and the arrays of tensors."""

    def __init__(self):
        self.seen = []

    def get(self, owner, name):
        """owner.name, from now on watched; of a tensor its array too."""
        value = getattr(owner, name)
        self.seen.append((owner.__dict__, name, value))
        if isinstance(value, nn.Parameter):
            self.seen.append((value.__dict__, "array", value.array))
        elif isinstance(value, nn.Module):
            self.unhooked(value)
        return value

    def unhooked(self, module):
        """Raise Unsupported for a module whose calls somebody wants to see, or did: there may be more hooks to come."""
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            self.seen.append((module.__dict__, name, module.__dict__.get(name)))
            if module.__dict__.get(name) is not None:
                raise Unsupported

    def unchanged(self):
        for attributes, name, value in self.seen:  # some hundred of them, at every step
            if attributes.get(name) is not value:
                return False
        return True


def _make(model, cache, step, watch):
    """A StackDecoder, or None."""
    config, blocks = model.config, []
    try:
        for block in model.transformer.h:
            watch.unhooked(block)
            attn, mlp = watch.get(block, "attn"), watch.get(block, "mlp")
            norms = [None if norm is None else watch.get(norm, "weight")
                     for norm in (watch.get(attn, "q_norm"), watch.get(attn, "k_norm"))]
            blocks.append(BlockWeights(
                _norm(watch, block, "ln_1"), _layer(watch, attn, "c_attn"), *norms, _layer(watch, attn, "c_proj"),
                _norm(watch, block, "ln_2"), _layer(watch, mlp, "c_fc"), _layer(watch, mlp, "c_proj")))
        last = _norm(watch, model.transformer, "ln_f"), _layer(watch, model, "lm_head")
        return StackDecoder(blocks, last, [(layer.keys, layer.values) for layer in cache.layers], step.first, step.rows,
                            config.n_head, config.activation, config.norm == "rmsnorm", config.norm_eps,
                            config.position == "rotary")
    except Unsupported:
        return None


def _layer(watch, owner, name):
    """(weight, bias) of a linear layer. Raises Unsupported where it does more than they say."""
    layer = watch.get(owner, name)
    weight, bias = watch.get(layer, "weight"), watch.get(layer, "bias")
    if isinstance(layer, LoRALinear) and watch.get(layer, "active") and not layer.is_merged:
        raise Unsupported
    return weight, bias


def _norm(watch, owner, name):
    norm = watch.get(owner, name)
    return watch.get(norm, "weight"), watch.get(norm, "bias") if isinstance(norm, nn.LayerNorm) else None

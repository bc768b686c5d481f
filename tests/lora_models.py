"""Tiny random models of transformers and the same models here, for the tests of adapters."""
import numpy as np

import tensorgrad as tg
from gpt.model import GPT, GPTConfig

V, T, C, LAYERS, HEADS, KV, HIDDEN = 61, 24, 32, 2, 4, 2, 48


def hf_model(kind):
    """A random GPT2LMHeadModel or LlamaForCausalLM (grouped queries, untied head) in evaluation mode."""
    import torch
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=V, n_positions=T, n_embd=C, n_layer=LAYERS, n_head=HEADS, initializer_range=0.2,
            bos_token_id=0, eos_token_id=0))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=V, hidden_size=C, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KV, max_position_embeddings=T, initializer_range=0.2,
            rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False))
    return model.eval()


def our_model(kind, theirs):
    """The GPT with the weights of `theirs`, in evaluation mode."""
    shape = {"vocab_size": V, "block_size": T, "n_embd": C, "n_layer": LAYERS, "n_head": HEADS}
    weights = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    if kind == "gpt2":
        model = GPT(GPTConfig(**shape, bias=True, activation="gelu_tanh"))
        turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        state = {name: w.T if name.endswith(turned) else w for name, w in weights.items()}
        state["lm_head.weight"] = state["transformer.wte.weight"]
    else:
        model = GPT(GPTConfig(**shape, n_kv_head=KV, ffn_dim=HIDDEN, position="rotary", norm="rmsnorm",
                              activation="swiglu", tie_weights=False))
        state = {"transformer.wte.weight": weights["model.embed_tokens.weight"],
                 "transformer.ln_f.weight": weights["model.norm.weight"], "lm_head.weight": weights["lm_head.weight"]}
        for i in range(LAYERS):
            block, layer = f"transformer.h.{i}.", f"model.layers.{i}."
            stacked = {"attn.c_attn": [f"self_attn.{x}_proj" for x in "qkv"], "attn.c_proj": ["self_attn.o_proj"],
                       "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"],
                       "ln_1": ["input_layernorm"], "ln_2": ["post_attention_layernorm"]}
            for ours, names in stacked.items():
                state[f"{block}{ours}.weight"] = np.concatenate([weights[f"{layer}{name}.weight"] for name in names])
    model.load_state_dict({name: tg.tensor(np.ascontiguousarray(w)) for name, w in state.items()})
    return model.eval()


def ids():
    """(2, T) token ids."""
    return np.random.default_rng(0).integers(0, V, (2, T))


def logits(model):
    """(2, T, V) of one of our models."""
    with tg.no_grad():
        x = tg.tensor(ids())
        return model(x, x)[0].numpy()


def hf_logits(model):
    """(2, T, V) of a model of transformers or PEFT."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids())).logits.numpy()


def fill(model, name="default"):
    """Give an adapter of ours factors that are not zero, and lengths that are not the weights'."""
    from gpt.model.lora import parts

    for part in parts(model, name):
        tg.nn.init.normal_(part.lora_embedding_A if part.target.is_embedding else part.lora_B, std=0.3)
        if part.lora_magnitude_vector is not None:
            with tg.no_grad():
                part.lora_magnitude_vector.mul_(tg.rand_like(part.lora_magnitude_vector) + 0.5)

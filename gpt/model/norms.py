"""The normalizations a block can use."""
from tensorgrad import nn


def make_norm(config):
    """LayerNorm (with or without bias) or RMSNorm over the residual stream."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)

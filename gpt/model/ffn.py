"""The feed-forward part of a block."""
from tensorgrad import nn
from tensorgrad.nn.sublayer import ACTIVATIONS, feed_forward, plain


class MLP(nn.Module):
    """Two layers with a nonlinearity between, the same for every position: (B, T, C) -> (B, T, C).

    With "swiglu" the first layer gives a gate and a value, rows [gate | value], and the hidden vector is
    silu(gate) * value (Shazeer 2020, "GLU variants improve transformer")."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.activation = config.activation
        self.c_fc = nn.Linear(config.n_embd, config.hidden_dim * (2 if self.gated else 1), bias=config.bias)
        self.c_proj = nn.Linear(config.hidden_dim, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        up, down = self.c_fc, self.c_proj
        if plain(up) and plain(down):
            return self.dropout(feed_forward(x, up.weight, up.bias, down.weight, down.bias, self.activation))
        x = ACTIVATIONS[self.activation](up(x))                                # (B, T, hidden)
        return self.dropout(down(x))                                           # (B, T, C)

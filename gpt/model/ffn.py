"""The feed-forward part of a block."""
from tensorgrad import nn
from tensorgrad.nn import functional as F

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": F.relu2,
    "swiglu": F.swiglu,
}


class MLP(nn.Module):
    """Two layers with a nonlinearity between, the same for every position: (B, T, C) -> (B, T, C).

    With "swiglu" the first layer gives a gate and a value, rows [gate | value], and the hidden vector is
    silu(gate) * value (Shazeer 2020, "GLU variants improve transformer")."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.activation == "swiglu"
        self.activation = _ACTIVATIONS[config.activation]
        self.c_fc = nn.Linear(config.n_embd, config.hidden_dim * (2 if self.gated else 1), bias=config.bias)
        self.c_proj = nn.Linear(config.hidden_dim, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.activation(self.c_fc(x))                                      # (B, T, hidden)
        return self.dropout(self.c_proj(x))                                    # (B, T, C)

"""The models that are measured: pre-LN GPTs without bias."""
from typing import NamedTuple


class Size(NamedTuple):
    """Batch, tokens per sequence and shape of a model; `steps` and `warm_up` are what one process runs by default."""

    batch: int
    block: int
    layers: int
    heads: int
    width: int
    vocab: int
    dropout: float
    steps: int
    warm_up: int

    @property
    def tokens(self):
        """Tokens per step."""
        return self.batch * self.block

    def parameter_shapes(self):
        """The shapes of all trained tensors, in the model's order; the head is the token embedding."""
        c = self.width
        block = [(c,), (3 * c, c), (c, c), (c,), (4 * c, c), (c, 4 * c)]
        return [(self.vocab, c), (self.block, c), *block * self.layers, (c,)]


SIZES = {
    "S": Size(12, 64, 4, 4, 128, 65, 0.0, 30, 5),
    "M": Size(16, 128, 6, 6, 384, 65, 0.0, 8, 3),
    "L": Size(4, 256, 12, 12, 768, 50304, 0.0, 4, 2),
    "C": Size(64, 256, 6, 6, 384, 65, 0.2, 3, 2),  # nanoGPT's shakespeare_char
}

"""The layers of a model with adapters: what they compute and how an adapter becomes part of a weight.

    LoRALinear      x @ weight.T + bias + what its adapters add to all rows of the weight, or to blocks of them
    LoRAEmbedding   a table of vectors, + what its adapters add

An adapter is, per layer, a list of parts; a part has its two factors, and with DoRA the lengths of the weight's rows.
"""
import math

import tensorgrad as tg
from tensorgrad import nn
from tensorgrad.nn import functional as F


class Part(nn.Module):
    """An adapter's part for one layer, or for a block of its rows; `target` says which."""

    names, suffix = (), ""  # of the factors, in files

    def __init__(self, target, scale):
        super().__init__()
        self.target, self.base_scale, self.strength = target, scale, 1.0
        self.lora_magnitude_vector = None

    @property
    def scale(self):
        """The factor of B @ A: lora_alpha / r (rslora: / sqrt(r)), times what `set_scale` asked for."""
        return self.base_scale * self.strength

    def tensors(self):
        """{name in files: Parameter}."""
        found = {f"{name}{self.suffix}": getattr(self, name) for name in self.names}
        dora = self.lora_magnitude_vector
        return found if dora is None else found | {"lora_magnitude_vector": dora}


class LowRank(Part):
    """scale * B @ A, for the rows `target.rows` of a layer's weight: x (..., in) -> (..., number of rows).

    A (r, in) starts as PEFT's, uniform in +-1/sqrt(in); B (rows, r) at zero, so that the model is unchanged at first.
    With `dora` (Liu et al. 2024, "DoRA") each row of weight + scale * B @ A is brought to a length that is learned too,
    `lora_magnitude_vector` (rows,), which starts as that of the weight's row."""

    names, suffix = ("lora_A", "lora_B"), ".weight"

    def __init__(self, linear, target, r, scale, dropout, dora=False):
        super().__init__(target, scale)
        start, stop = target.rows
        weight = linear.weight
        dtype = tg.promote_types(weight.dtype, tg.float32)  # trained in full precision over a 16-bit weight
        self.dropout = dropout
        self.lora_A = nn.Parameter(tg.empty(r, linear.in_features, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(tg.zeros(stop - start, r, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if dora:
            self.lora_magnitude_vector = nn.Parameter(self._rows_of(weight).norm(dim=1))

    def forward(self, x, weight):
        """What is to be added to x @ weight[rows].T; `weight` is the layer's, frozen."""
        x = F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        added = F.linear(F.linear(x, self.lora_A), self.lora_B)                # (..., in) -> (..., r) -> (..., rows)
        added = added * self.base_scale
        if self.lora_magnitude_vector is not None:
            rows = self._rows_of(weight)                                       # (rows, in)
            factor = self._factor(rows)                                        # (rows,)
            added = added * factor + F.linear(x, rows) * (factor - 1)
        return added * self.strength

    def delta(self, weight):
        """What it adds to its rows of `weight`, the layer's: (rows, in)."""
        added = (self.lora_B @ self.lora_A) * self.base_scale
        if self.lora_magnitude_vector is not None:
            rows = self._rows_of(weight)
            added = (rows + added) * self._factor(rows).unsqueeze(1) - rows
        return added * self.strength

    def _factor(self, rows):
        """Learned length over present length of each row; the present one counts as a constant (section 4.3)."""
        lengths = (rows + (self.lora_B.detach() @ self.lora_A.detach()) * self.base_scale).norm(dim=1)
        return self.lora_magnitude_vector / lengths

    def _rows_of(self, weight):
        return in_full(weight, slice(*self.target.rows))


class LowRankEmbedding(Part):
    """scale * (B @ A).T, for a table of vectors (V, C): ids (...) -> (..., C).

    A (r, V) starts at zero and B (C, r) N(0, 1), as PEFT's."""

    names = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, embedding, target, r, scale):
        super().__init__(target, scale)
        weight = embedding.weight
        dtype = tg.promote_types(weight.dtype, tg.float32)
        self.lora_embedding_A = nn.Parameter(tg.zeros(r, embedding.num_embeddings, dtype=dtype, device=weight.device))
        self.lora_embedding_B = nn.Parameter(tg.empty(embedding.embedding_dim, r, dtype=dtype, device=weight.device))
        nn.init.normal_(self.lora_embedding_B)

    def forward(self, ids):
        rows = F.embedding(ids, self.lora_embedding_A.t())                     # (..., r)
        return F.linear(rows, self.lora_embedding_B) * self.scale

    def delta(self, weight):
        """What it adds to the table `weight`: (V, C)."""
        return (self.lora_embedding_B @ self.lora_embedding_A).t() * self.scale


class Adapted:
    """What layers with adapters share: the adapters by name, those that count, merging."""

    def _adapt(self, layer):
        """Become `layer`, with its very weight under the same name, and no adapter yet."""
        self.weight, self.training = layer.weight, layer.training
        self.adapters = nn.ModuleDict()    # name -> ModuleList of parts, ordered by their rows
        self.active = ()                   # names of the adapters that count
        self._unmerged = None              # (the weight,) while `weight` is another one with the adapters in it

    @property
    def is_merged(self):
        return self._unmerged is not None

    @property
    def base_weight(self):
        """The weight without any adapter."""
        return self._unmerged[0] if self.is_merged else self.weight

    @tg.no_grad()
    def merge(self):
        """Compute with weight + what the active adapters add, in a weight of its own."""
        if self.is_merged or not self.active:
            return
        weight = self.weight.detach().clone()                                  # (out, in), of a packed one float32
        for name in self.active:
            for part in self.adapters[name]:
                start, stop = part.target.rows
                weight[start:stop] += part.delta(self.weight).to(weight.dtype)
        self._unmerged = (self.weight,)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def unmerge(self):
        """Take back the weight that `merge` put aside: the same bits."""
        if self.is_merged:
            merged, self.weight = self.weight, self._unmerged[0]
            moved = (merged.device, merged.dtype) != (self.weight.device, self.weight.dtype)      # in between
            if moved and not isinstance(self.weight, nn.PackedWeight):
                self.weight.data = self.weight.data.to(device=merged.device, dtype=merged.dtype)
            self._unmerged = None


class LoRALinear(Adapted, nn.Linear):
    """A linear layer with adapters by name, in the place of `linear`: y = x @ weight.T + bias + what they add.

    A part of an adapter is a LowRank, one for the whole layer or several for different blocks of its rows."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._adapt(linear)
        self.register_parameter("bias", linear.bias)

    def new_part(self, target, r, scale, config):
        """An untrained part for `target`."""
        return LowRank(self, target, r, scale, config.lora_dropout, config.use_dora)

    def forward(self, x):
        y = super().forward(x)                                                 # (..., out)
        if not self.is_merged:
            for name in self.active:
                y = y + self._added(self.adapters[name], x).to(y.dtype)
        return y

    def _added(self, parts, x):
        """The outputs of the parts side by side, zero for rows that none of them has: (..., in) -> (..., out)."""
        if len(parts) == 1 and parts[0].target.is_whole:
            return parts[0](x, self.weight)
        pieces, at = [], 0
        for part in parts:
            start, stop = part.target.rows
            pieces += [_zeros(x, start - at, part), part(x, self.weight)]
            at = stop
        pieces.append(_zeros(x, self.out_features - at, parts[0]))
        return tg.cat([piece for piece in pieces if piece.size(-1)], dim=-1)

    def plain(self):
        """An nn.Linear with this weight and bias."""
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        linear.in_features, linear.out_features, linear.training = self.in_features, self.out_features, self.training
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        return linear


class LoRAEmbedding(Adapted, nn.Embedding):
    """A table of vectors with adapters by name, in the place of `embedding`. A head that is tied to the table keeps
    using it without them."""

    def __init__(self, embedding):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self._adapt(embedding)

    def new_part(self, target, r, scale, config):
        """An untrained part for `target`; an embedding knows no dropout, and no DoRA."""
        return LowRankEmbedding(self, target, r, scale)

    def forward(self, ids):
        y = super().forward(ids)                                               # (..., C)
        if not self.is_merged:
            for name in self.active:
                for part in self.adapters[name]:
                    y = y + part(ids).to(y.dtype)
        return y

    def plain(self):
        """An nn.Embedding with this table."""
        embedding = nn.Embedding.__new__(nn.Embedding)
        nn.Module.__init__(embedding)
        embedding.num_embeddings, embedding.embedding_dim = self.num_embeddings, self.embedding_dim
        embedding.padding_idx, embedding.training = self.padding_idx, self.training
        embedding.weight = self.weight
        return embedding


def in_full(weight, rows=slice(None)):
    """The values of a weight, or of some of its rows, without gradient and in float32 at least."""
    if isinstance(weight, nn.PackedWeight):
        return weight.widened(rows)
    return weight.detach()[rows].to(tg.promote_types(weight.dtype, tg.float32))


def _zeros(x, size, part):
    return tg.zeros(*x.shape[:-1], size, dtype=part.lora_A.dtype, device=x.device)

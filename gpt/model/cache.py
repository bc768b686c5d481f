"""The key-value cache: what attention computed for earlier tokens is kept, so that a new token costs one step.

    cache = KVCache(model, rows=2, length=100)                  # memory for two texts of up to 100 tokens
    logits = next_logits(model, [[3, 1, 4], [1, 5]], cache)     # prefill: texts of different lengths, (2, V)
    logits = next_logits(model, [[3, 1, 4, 1], [1, 5, 9]], cache)   # decode: one more token each

A row stores its tokens from slot 0 on, whatever the other rows do, so the rows of a batch never influence each other.
Keys and values of grouped queries are stored once per key-value head.

Past the model's block_size the window slides. Where positions are relative or absent (rotary, none) the row becomes a
ring: the newest token overwrites the oldest, and every token attends to the block_size last ones (sliding-window
attention, as in Jiang et al. 2023, Mistral 7B). Where positions are absolute (learned, sinusoidal) each step moves
every token to another position, so the last block_size tokens are encoded anew, as a loop without a cache does it.
"""
from functools import cached_property

import tensorgrad as tg
from tensorgrad import nn

from ..errors import UserError


class KVCache:
    """Keys and values of all layers for `rows` texts of up to `length` tokens (default and at most: block_size).

    `lengths[row]` is the number of tokens that the row has seen; what it holds are the last of them."""

    def __init__(self, model, rows=1, length=None):
        config, weight = model.config, next(model.parameters())
        self.rolls = config.position in ("rotary", "none")
        self.rows, self.length = rows, min(length or config.block_size, config.block_size)
        self.may_roll = self.rolls and self.length == config.block_size
        shape = (rows, config.kv_heads, self.length, config.head_dim)
        dtype = tg.float32 if isinstance(weight, nn.PackedWeight) else weight.dtype
        self.layers = [LayerCache(*(tg.zeros(shape, dtype=dtype, device=weight.device) for _ in range(2)))
                       for _ in range(config.n_layer)]
        self.lengths = [0] * rows
        self.fused, self.graphs = {}, None  # what fused.py and graphed.py keep here

    def copy_row(self, source, target):
        """Make row `target` a copy of row `source`."""
        if source != target:
            used = min(self.lengths[source], self.length)
            for layer in self.layers:
                for tensor in (layer.keys, layer.values):
                    tensor.array[target, :, :used] = tensor.array[source, :, :used]
            self.lengths[target] = self.lengths[source]

    def reorder(self, sources):
        """Row i becomes a copy of what row sources[i] is now, for the first len(sources) rows."""
        if list(sources) == list(range(len(sources))):
            return
        lengths = [self.lengths[source] for source in sources]
        used = min(max(lengths), self.length)
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                tensor.array[:len(sources), :, :used] = tensor.array[list(sources), :, :used]
        self.lengths[:len(sources)] = lengths

    def truncate(self, row, length=0):
        """Forget all but the first `length` tokens of a row (all of a row that has rolled)."""
        self.lengths[row] = 0 if self.lengths[row] > self.length else min(length, self.lengths[row])

    def step(self, first, counts, width):
        """The Step that appends counts[i] tokens to row first + i, out of (len(counts), width) right-padded ones."""
        starts = self.lengths[first:first + len(counts)]
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        if max(ends) > self.length and not (self.may_roll and width == 1):
            raise UserError(f"the cache has room for {self.length} tokens per row, not for {max(ends)}; make a longer "
                            "KVCache, or append token by token where a window may roll")
        return Step(self, first, starts, counts, width)


class LayerCache:
    """Keys and values of one layer, (rows, nkv, length, hs) each."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values


class Step:
    """One pass of new tokens through the model: where they stand, where they are stored, what they may look at."""

    def __init__(self, cache, first, starts, counts, width):
        self.cache, self.first, self.rows, self.width = cache, first, len(starts), width
        self.starts, self.counts, self.layer = starts, counts, -1
        self.together = len(set(starts)) == 1                                  # do all rows stand at the same place?
        self.start = starts[0]                                                 # which is here
        self.padded = len(set(counts)) > 1
        self.last_position = max(starts) + width - 1
        self.fresh = self.together and self.start == 0                         # new tokens see new tokens only
        self.end = max(start + count for start, count in zip(starts, counts, strict=True))
        self.seen = min(self.end, cache.length)
        self.mask = None

    @cached_property
    def positions(self):
        """(T,), or (B, T) where texts stand apart; there padding stays below the end of the longest."""
        device, width = self.cache.layers[0].keys.device, self.width
        if self.together:
            return tg.arange(self.start, self.start + width, device=device)
        return tg.tensor([[min(start + t, self.end - 1) for t in range(width)] for start in self.starts], device=device)

    def _begin(self):
        """What all layers share: the mask of what may be looked at, and where rows that stand apart are stored."""
        cache, device, width = self.cache, self.cache.layers[0].keys.device, self.width
        if not self.fresh and not (self.together and width == 1):
            slots = tg.arange(self.seen, device=device)                        # (S,)
            self.mask = slots <= self.positions.reshape(-1, 1, width, 1)       # (B or 1, 1, T, S)
        if self.padded or not self.together:
            pairs = [(i, start + t, t) for i, (start, count) in enumerate(zip(self.starts, self.counts, strict=True))
                     for t in range(count)]
            row, position, t = (tg.tensor(part, device=device) for part in zip(*pairs, strict=True))
            self.places = (row + self.first).array, (position % cache.length).array, row.array, t.array

    def rows_of(self, table):
        """Rows of a table (positions, n) for the new tokens: (T, n), or (B, T, n) where texts stand apart."""
        return table[self.start:self.start + self.width] if self.together else table[self.positions]

    def at_positions(self, table):
        """The same for heads: (T, n), or (B, 1, T, n)."""
        rows = self.rows_of(table)
        return rows if self.together else rows.unsqueeze(1)

    def attended(self, k, v):
        """Store the new keys and values (B, nkv, T, hs) of the next layer; returns what its queries may look at, each
        (B, nkv, S, hs), to be used with `mask`, or causally where `fresh`."""
        self.layer += 1
        if self.layer == 0:
            self._begin()
        layer = self.cache.layers[self.layer]
        for tensor, new in ((layer.keys, k), (layer.values, v)):
            if self.padded or not self.together:
                rows, slots, row, t = self.places
                tensor.array[rows, :, slots] = new.array[row, :, t]            # (new tokens, nkv, hs)
            else:
                slot = self.start % self.cache.length
                tensor.array[self.first:self.first + self.rows, :, slot:slot + self.width] = new.array
        if self.fresh:
            return k, v
        rows, device = slice(self.first, self.first + self.rows), k.device
        return tuple(tg.as_tensor(tensor.array[rows, :, :self.seen], device=device)
                     for tensor in (layer.keys, layer.values))

    def finish(self):
        """Count the new tokens as seen."""
        for i, count in enumerate(self.counts):
            self.cache.lengths[self.first + i] += count


@tg.no_grad()
def next_logits(model, texts, cache, first=0):
    """Logits (B, V) of the token that follows each of `texts` (lists of ids), of which row first + i of the cache may
    hold a beginning already: the rest is appended to it.

    A text that outgrows block_size is appended token by token: crop long prompts to their last block_size tokens.
    Raises UserError where the cache is too short for a text that cannot roll."""
    block_size, device = model.config.block_size, cache.layers[0].keys.device
    if not cache.rolls and any(len(text) > block_size for text in texts):
        long = [i for i, text in enumerate(texts) if len(text) > block_size]
        short = [i for i, text in enumerate(texts) if len(text) <= block_size]
        anew, _ = model(tg.tensor([texts[i][-block_size:] for i in long], device=device))   # (n, 1, V)
        if not short:
            return anew[:, -1]
        rows = {i: row for i, row in zip(long, anew[:, -1], strict=True)}
        rows |= {i: next_logits(model, [texts[i]], cache, first + i)[0] for i in short}
        return tg.stack([rows[i] for i in range(len(texts))])
    new = [text[cache.lengths[first + i]:] for i, text in enumerate(texts)]
    counts = [len(ids) for ids in new]
    if min(counts) < 1:
        raise UserError("every text must be longer than what its row of the cache has seen")
    width = max(counts)
    if width > 1 and cache.may_roll and any(len(text) > cache.length for text in texts):
        if len(texts) > 1:
            return tg.cat([next_logits(model, [text], cache, first + i) for i, text in enumerate(texts)])
        text, seen = texts[0], cache.lengths[first]
        fits = max(cache.length - seen, 1)
        for end in [seen + fits, *range(seen + fits + 1, len(text))]:
            next_logits(model, [text[:end]], cache, first)
        return next_logits(model, texts, cache, first)
    ids = tg.tensor([list(row) + [0] * (width - len(row)) for row in new], device=device)    # (B, T), right-padded
    return model.decode(ids, cache.step(first, counts, width))

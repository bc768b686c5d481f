"""Random numbers as tensor methods: fills, coin tosses, draws by weight."""

import numpy as np

from ..engine import wrap
from ..errors import OpError
from ..random import default_generator


def rng_of(generator, device):
    """A NumPy Generator on a fresh stream of `generator`, or of the device's own."""
    return (generator or default_generator(device)).numpy()


class SamplingMethods:
    """PyTorch's random methods. `generator` is the device's default one unless given."""

    def normal_(self, mean=0.0, std=1.0, *, generator=None):
        """Fill with normal numbers."""
        return self._fill(rng_of(generator, self.device).standard_normal(self.array.shape) * std + mean)

    def uniform_(self, a=0.0, b=1.0, *, generator=None):
        """Fill with numbers uniform in [a, b)."""
        return self._fill(rng_of(generator, self.device).random(self.array.shape) * (b - a) + a)

    def bernoulli_(self, p=0.5, *, generator=None):
        """Fill with 1 with probability p, else 0."""
        return self._fill(rng_of(generator, self.device).random(self.array.shape) < p)

    def _fill(self, values):
        values = self.device.asarray(np.asarray(values, self.array.dtype))
        return self._write(lambda x: wrap(values, self.device))

    def bernoulli(self, *, generator=None):
        """1 with the probability that self gives for each element, else 0."""
        draws = rng_of(generator, self.device).random(self.array.shape)
        hits = draws < self.device.to_numpy(self.array)
        return wrap(self.device.asarray(hits.astype(self.array.dtype)), self.device)

    def multinomial(self, num_samples, replacement=False, *, generator=None):
        """Indices (int64) drawn with the weights in the last dimension of self, a vector or a matrix of rows."""
        weights = self.device.to_numpy(self.array).astype(np.float64)
        if weights.ndim not in (1, 2) or not weights.shape[-1]:
            raise OpError(f"multinomial: weights must be a vector or a matrix, got shape {tuple(self.array.shape)}")
        if num_samples <= 0:
            raise OpError(f"multinomial: num_samples must be positive, got {num_samples}")
        rows = weights.reshape(-1, weights.shape[-1])
        if not np.isfinite(rows).all() or (rows < 0).any() or (rows.sum(-1) <= 0).any():
            raise OpError("multinomial: weights must be finite, not negative, and not all zero in a row")
        rng = rng_of(generator, self.device)
        if replacement or num_samples == 1:  # invert the cumulative distribution; zero weights are never hit
            edges = np.cumsum(rows, -1)
            draws = rng.random((len(rows), num_samples)) * edges[:, -1:]
            index = np.array([np.searchsorted(e, d, side="right") for e, d in zip(edges, draws, strict=True)], np.int64)
            index = index.reshape(draws.shape)
            last = rows.shape[-1] - 1 - np.argmax(rows[:, ::-1] > 0, -1)
            index = np.minimum(index, last[:, None])
        else:
            if len(rows) and num_samples > (rows > 0).sum(-1).min():
                raise OpError(f"multinomial: {num_samples} draws without replacement need as many nonzero weights")
            with np.errstate(divide="ignore"):  # exponential races (Efraimidis and Spirakis 2006)
                index = np.argsort(rng.exponential(size=rows.shape) / rows, -1)[:, :num_samples]
        index = index.reshape(*weights.shape[:-1], num_samples).astype(np.int64)
        return wrap(self.device.asarray(index), self.device)

"""Seedable random numbers from counters: state is two integers, (seed, calls).

Every call draws from its own stream, Philox keyed by the seed with the number of the call as counter
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). A stream can therefore be drawn again from its
number alone: dropout stores the number, not the mask, and restoring the state restores everything.
"""

import numpy as np

from .device import cpu
from .device import device as as_device


class Generator:
    """A source of random numbers on one device. Numbers are drawn on the CPU and moved, so that a seed gives the
    same values on every device."""

    def __init__(self, device="cpu", seed=0):
        self.device = as_device(device)
        self.seed, self.calls = seed, 0

    def manual_seed(self, seed):
        """Start over from `seed` (an integer; negative ones are taken modulo 2**64). Returns self."""
        self.seed, self.calls = int(seed) % 2**64, 0
        return self

    def get_state(self):
        """A JSON-able dict that `set_state` restores."""
        return {"seed": self.seed, "calls": self.calls}

    def set_state(self, state):
        self.seed, self.calls = int(state["seed"]), int(state["calls"])

    def next_stream(self):
        """Reserve a stream and return its identity (seed, number), for `stream()` now and again later."""
        self.calls += 1
        return self.seed, self.calls

    def numpy(self):
        """A NumPy Generator over a fresh stream."""
        return stream(self.next_stream())


def stream(identity):
    """The NumPy Generator of a stream reserved with `next_stream`; equal identities give equal numbers."""
    seed, number = identity
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, number, 0]))


_generators = {}


def default_generator(device=cpu):
    """The generator that operations on `device` use when none is given."""
    device = as_device(device)
    if device not in _generators:
        _generators[device] = Generator(device, _seed)
    return _generators[device]


_seed = 0


def manual_seed(seed):
    """Seed the default generators of all devices. Returns the CPU's."""
    global _seed
    _seed = int(seed) % 2**64
    for generator in _generators.values():
        generator.manual_seed(seed)
    return default_generator(cpu)


def get_rng_state(device=cpu):
    """The state of the device's default generator, a JSON-able dict."""
    return default_generator(device).get_state()


def set_rng_state(state, device=cpu):
    """Restore what `get_rng_state` returned."""
    default_generator(device).set_state(state)

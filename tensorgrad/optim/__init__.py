"""Optimizers and learning-rate schedules, with PyTorch's names and formulas."""

from .adam import Adam, AdamW
from .muon import Muon
from .optimizer import Optimizer
from .schedules import get_schedule
from .sgd import SGD

__all__ = ["Adam", "AdamW", "Muon", "Optimizer", "SGD", "get_schedule"]

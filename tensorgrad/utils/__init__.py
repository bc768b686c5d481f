"""Helpers for training: activation checkpointing."""

from .checkpoint import checkpoint

__all__ = ["checkpoint"]

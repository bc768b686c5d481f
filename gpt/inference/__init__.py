"""Using a trained model."""
from .sample import SampleConfig, sample

__all__ = ["SampleConfig", "sample"]

"""The compiled level as one module: compiled.py with compiled_attention.py."""

from .compiled import *  # noqa: F403
from .compiled_attention import attention as attention
from .compiled_attention import attention_backward as attention_backward

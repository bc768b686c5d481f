"""The compiled level as one module: compiled.py and its neighbours."""

from . import compiled_sublayer as sublayer  # noqa: F401
from .compiled import *  # noqa: F403
from .compiled_attention import attention as attention
from .compiled_attention import attention_backward as attention_backward
from .compiled_block import relu2 as relu2
from .compiled_block import relu2_backward as relu2_backward
from .compiled_block import rotary as rotary
from .compiled_block import swiglu as swiglu
from .compiled_block import swiglu_backward as swiglu_backward
from .compiled_few import few_rows as few_rows
from .compiled_few import linear as linear
from .compiled_softmax import *  # noqa: F403

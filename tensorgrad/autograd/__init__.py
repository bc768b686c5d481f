"""Gradients: backward, grad, custom functions, gradient checks, anomaly detection, profiler, graph drawing."""

from ..modes import (
    enable_grad,
    inference_mode,
    is_grad_enabled,
    is_inference_mode_enabled,
    no_grad,
    set_grad_enabled,
)
from .anomaly import AnomalyError, detect_anomaly
from .backward import backward, grad
from .function import Function
from .gradcheck import GradcheckError, gradcheck, gradgradcheck
from .graph import draw_graph, graph_dot, graph_text
from .hooks import OpHook, op_hook
from .profiler import profile

__all__ = [
    "AnomalyError",
    "Function",
    "GradcheckError",
    "OpHook",
    "backward",
    "detect_anomaly",
    "draw_graph",
    "enable_grad",
    "grad",
    "gradcheck",
    "gradgradcheck",
    "graph_dot",
    "graph_text",
    "inference_mode",
    "is_grad_enabled",
    "is_inference_mode_enabled",
    "no_grad",
    "op_hook",
    "profile",
    "set_grad_enabled",
]

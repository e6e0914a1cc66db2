"""Optimizers for RL in little memory: one pipeline of small parts, every method a short choice of
them.

`build` makes one, `predict_state_bytes` says what it will hold, `METHODS` lists them.
"""

from loopwright.algorithms.optimizers.building import (
    build,
    elementwise_methods,
    method,
    predict_state_bytes,
    sharding_methods,
)
from loopwright.algorithms.optimizers.layer_sampling import outlier_scores
from loopwright.algorithms.optimizers.methods import METHODS, Method, table
from loopwright.algorithms.optimizers.options import OptimizerError, Options
from loopwright.algorithms.optimizers.pipeline import Pipeline
from loopwright.algorithms.optimizers.streaming import GradientStream
from loopwright.algorithms.optimizers.zeroth_order import ZerothOrder

__all__ = [
    "METHODS",
    "GradientStream",
    "Method",
    "OptimizerError",
    "Options",
    "Pipeline",
    "ZerothOrder",
    "build",
    "elementwise_methods",
    "method",
    "outlier_scores",
    "predict_state_bytes",
    "sharding_methods",
    "table",
]

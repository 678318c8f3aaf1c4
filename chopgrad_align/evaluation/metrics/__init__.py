"""How near a predicted video is to its target: one metric a file, and all by name.

A figure is a property of its definition: colours, windows and networks are named in each class, and figures compare
only where these are equal.
"""

from .base import Metric, SetMetric
from .loading import METRICS, load_metrics

__all__ = ["METRICS", "Metric", "SetMetric", "load_metrics"]

"""The memory that a run needs, before there is a card: a training step of the real code, under fake tensors.

`simulate.simulate` gives the memory of each phase of a config's step; `make_plan` finds the fastest setting that fits.
"""

from .choose import Plan, Trial, config_of, make_plan, sections
from .simulate import Figures, Memory
from .stand_ins import known_models

__all__ = ["Figures", "Memory", "Plan", "Trial", "config_of", "known_models", "make_plan", "sections"]

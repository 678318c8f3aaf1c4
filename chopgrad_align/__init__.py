"""Fine-tune video diffusion models by the gradient of what is measured on their decoded pixels.

The names below are the public interface. Each is imported when it is first used, so that `import chopgrad_align` costs
little and a part that is not used needs none of its dependencies.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backprop import Exact as Exact
    from .backprop import Full as Full
    from .backprop import Truncated as Truncated
    from .decode import decode as decode
    from .decode import decode_loss as decode_loss
    from .errors import UsageError as UsageError
    from .reward import load_reward as load_reward
    from .rollout import rollout as rollout
    from .steps import LastSteps as LastSteps

_HOME = {
    "Exact": "backprop",
    "Full": "backprop",
    "Truncated": "backprop",
    "UsageError": "errors",
    "decode": "decode",
    "decode_loss": "decode",
    "load_reward": "reward",
    "rollout": "rollout",
    "LastSteps": "steps",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    # Bound here as well: importing a submodule `decode` would otherwise leave the module under the function's name.
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__

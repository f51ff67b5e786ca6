"""SAIS: single-stage anchor-free instance segmentation (Xiang, Tian, Zou, Xu; 2019)."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "SAIS": "sais.model",
    "SAISConfig": "sais.config",
    "VARIANTS": "sais.config",
    "METHOD": "sais.method",
    "sais_resnet50_fpn": "sais.builders",
    "sais_resnet101_fpn": "sais.builders",
    "sais_resnext101_64x4d_fpn": "sais.builders",
    "get_model": "sais.builders",
    "list_models": "sais.builders",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    # Lazy, so that `import sais.config` and --help never load torch.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'sais' has no attribute '{name}'")

"""SipMask: spatial information preservation for fast image and video instance segmentation (ECCV 2020)."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "SipMask": "sipmask.model",
    "SipMaskConfig": "sipmask.config",
    "VARIANTS": "sipmask.config",
    "METHOD": "sipmask.method",
    "sipmask_resnet50_fpn": "sipmask.builders",
    "sipmask_resnet101_fpn": "sipmask.builders",
    "get_model": "sipmask.builders",
    "list_models": "sipmask.builders",
    "follow": "sipmask.following",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    # Lazy, so that `import sipmask.config` and --help never load torch.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'sipmask' has no attribute '{name}'")

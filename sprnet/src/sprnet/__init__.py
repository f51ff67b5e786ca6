"""SPRNet: single pixel reconstruction for one-stage instance segmentation (Yao, Yu, Yu, Tao; 2019)."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "SPRNet": "sprnet.model",
    "SPRNetConfig": "sprnet.config",
    "GatedMerge": "sprnet.gate",
    "VARIANTS": "sprnet.config",
    "METHOD": "sprnet.method",
    "sprnet_resnet50_fpn": "sprnet.builders",
    "sprnet_resnet101_fpn": "sprnet.builders",
    "get_model": "sprnet.builders",
    "list_models": "sprnet.builders",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    # Lazy, so that `import sprnet.config` and --help never load torch.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'sprnet' has no attribute '{name}'")

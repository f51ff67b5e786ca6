"""MEInst: mask encoding for single shot instance segmentation (CVPR 2020)."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "MEInst": "meinst.model",
    "MEInstConfig": "meinst.config",
    "Encoding": "meinst.codec",
    "MaskCodec": "meinst.codec",
    "VARIANTS": "meinst.config",
    "METHOD": "meinst.method",
    "meinst_resnet50_fpn": "meinst.builders",
    "meinst_resnet101_fpn": "meinst.builders",
    "get_model": "meinst.builders",
    "list_models": "meinst.builders",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    # Lazy, so that `import meinst.config` and --help never load torch.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'meinst' has no attribute '{name}'")

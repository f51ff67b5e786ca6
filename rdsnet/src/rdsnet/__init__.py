"""RDSNet: reciprocal object detection and instance segmentation (AAAI 2020), and the YOLACT baseline it measures by."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "RDSNet": "rdsnet.model",
    "RDSNetSmall": "rdsnet.small",
    "RDSNetConfig": "rdsnet.config",
    "MBRM": "rdsnet.refine",
    "VARIANTS": "rdsnet.config",
    "METHOD": "rdsnet.method",
    "rdsnet_resnet50_fpn": "rdsnet.builders",
    "rdsnet_resnet101_fpn": "rdsnet.builders",
    "rdsnet_s_resnet101_fpn": "rdsnet.builders",
    "yolact_resnet101_fpn": "rdsnet.builders",
    "get_model": "rdsnet.builders",
    "list_models": "rdsnet.builders",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    # Lazy, so that `import rdsnet.config` and --help never load torch.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rdsnet' has no attribute '{name}'")

"""`info`: the model card of a weights file, or the variants of the package."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from onestage.cli.flags import Call
from onestage.config import config_from_dict
from onestage.errors import some
from onestage.method import Method


def run(method: Method, call: Call) -> dict[str, Any]:
    """Prints what weights are; without a file, what variants there are."""
    card = _variants(method) if call.flags.file is None else _card(method, call.flags.file)
    if not call.flags.json:
        for name, value in card.items():
            print(f"{name:14} {_short(name, value)}")
    return card


def _short(name: str, value: Any) -> str:
    """One line for people; --json has everything."""
    if name == "config":
        return f"{value['backbone']['name']}, input {' x '.join(map(str, value['input']['test_size']))} (all: --json)"
    if name == "metrics":
        shown = [f"{key} {number:.3f}" for key, number in value.items() if key in ("bbox/AP", "segm/AP", "segm/AP50")]
        return ", ".join(shown) or "-"
    return str(value) or "-"


def _variants(method: Method) -> dict[str, Any]:
    return {
        name: f"{config.backbone.name}, input {' x '.join(map(str, config.input.test_size))},"
        f" {config.schedule.length} {config.schedule.unit}, batch {config.schedule.batch_size}"
        for name, config in method.variants.items()
    }


def _card(method: Method, path: Any) -> dict[str, Any]:
    from onestage.engine.checkpoint import load_weights
    from onestage.files import file_digest

    state, info = load_weights(path, package=method.name)
    config: Any = config_from_dict(method.config_type, info.config, f"{path}: config")
    card = asdict(info) | {
        "config": asdict(config),
        "categories": some([name for _, name in info.categories], 10),
        "num_classes": len(info.categories),
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "file": str(path),
        "sha256": file_digest(path),
    }
    return card

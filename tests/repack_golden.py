"""Packs golden cases small enough to travel with the packages: `python tests/repack_golden.py ../shared/golden`.

Each file keeps its schema; cases are left out, never changed, and the rest is compressed. A package's tests read them
where the full set is not at hand.
"""

import gzip
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def only(*variants: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Keeps these top-level cases."""
    return lambda content: {key: content[key] for key in variants}


def cases(*names: str, of: tuple[str, ...]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Of the cases `of`, whose names stand before the first slash of a key, keeps these; the rest of the file too."""
    return lambda content: {
        key: value for key, value in content.items() if key.split("/")[0] not in of or key.split("/")[0] in names
    }


def without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Leaves these top-level entries out."""
    return lambda content: {key: value for key, value in content.items() if key not in keys}


PACKED = {
    "core": {
        "sipmask_ytvis_eval": without(),
    },
    "meinst": {
        "meinst_rasterize": without(),
        "meinst_codec": cases("whiten1_sigmoid1", of=tuple(f"whiten{w}_sigmoid{s}" for w in (0, 1) for s in (0, 1))),
        "meinst_pca_fit": cases("sigmoid0", of=("sigmoid0", "sigmoid1", "uniform")),
        "meinst_infer": cases("few", "empty", of=("many", "few", "thresh_with_ctr", "empty")),
    },
    "rdsnet": {
        "rdsnet_mbrm": without(),
        "rdsnet_corr_crop": without(),
    },
    "sipmask": {
        "sipmask_smp": without("maps"),
        "sipmask_head_ssd2": without(),
        "sipmask_infer": only("ssd2"),
        "sipmask_loss": only("ssd2"),
        "sipmask_vis_track": without(),
    },
}


def main(source: Path) -> None:
    for package, files in PACKED.items():
        for name, reduce in files.items():
            content = torch.load(source / f"{name}.pt", weights_only=True)
            packed = io.BytesIO()
            torch.save(reduce(content), packed)
            target = ROOT / package / "tests" / "golden" / f"{name}.pt.gz"
            target.write_bytes(gzip.compress(packed.getvalue(), mtime=0))
            print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

import json
import sys
from pathlib import Path

import pytest

from onestage.data.synth import ShapesDataset
from onestage.tables.plan import Settings, chosen_rows, methods_of, tables_of

HERE = str(Path(__file__).parent)


@pytest.fixture
def toy(monkeypatch):
    """The method of the package `toy`, importable here and in processes started from here."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("PYTHONPATH", ":".join([HERE, *filter(None, sys.path)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return methods_of(["toy"])[0]


@pytest.fixture
def rows(toy):
    """Rows of table 2 whose names fit: `rows("2x2*")`."""
    return lambda *patterns: chosen_rows(tables_of([toy], ["table2"]), patterns)


@pytest.fixture
def small():
    """Settings under which a training takes less than a second."""
    return Settings(profile="smoke", steps=2, limit=4, size=32, device="cpu")


@pytest.fixture
def coco(tmp_path) -> Path:
    """A data set in COCO layout with 8 images to train on and 4 to evaluate on, 64 px."""
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    for split, number in (("train", 8), ("val", 4)):
        (folder / split).mkdir()
        content = ShapesDataset(number, split=split, size=64).coco_json(folder / split)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder

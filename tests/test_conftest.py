"""The fixtures of the root conftest.py."""

import pytest
import torch


def test_uninitialised_memory_is_nan():
    assert torch.empty(3).isnan().all()
    assert torch.empty(2, dtype=torch.int64).eq(torch.iinfo(torch.int64).max).all()


def test_golden_reads_the_folder_that_is_named(monkeypatch, tmp_path, request):
    torch.save({"boxes": torch.ones(2, 4)}, tmp_path / "case.pt")
    (tmp_path / "rule.json").write_text('{"radius": 1.5}', encoding="utf-8")
    monkeypatch.setenv("ONESTAGE_GOLDEN", str(tmp_path))
    golden = request.getfixturevalue("golden")
    assert golden("case")["boxes"].shape == (2, 4)
    assert golden("rule") == {"radius": 1.5}
    assert golden.path("case.pt") == tmp_path / "case.pt"


def test_absent_golden_file_skips_and_looks_nowhere_else(monkeypatch, tmp_path, request):
    monkeypatch.setenv("ONESTAGE_GOLDEN", str(tmp_path))
    golden = request.getfixturevalue("golden")
    with pytest.raises(pytest.skip.Exception, match=r"'sipmask_smp' is not in"):
        golden("sipmask_smp")

"""`python -m onestage.doctor`: what it says of machines with something wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from onestage import doctor

SAME_INDEX = "pip install --force-reinstall torch torchvision"


def library(folder: Path, name: str, code: str) -> None:
    """A module that hides the installed one for processes with `folder` on their path."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


def distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    """Metadata of an installed distribution."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (about / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {line}" for line in requires]) + "\n")


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A folder whose modules come before the installed ones, in this process's metadata and in others' imports."""
    source = Path(doctor.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{source}")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_working_machine_passes_and_says_so_as_json(capsys):
    assert doctor.main(["--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    status = {check["name"]: check["status"] for check in answer["checks"]}
    assert answer["exit_code"] == 0
    assert {status[name] for name in ("python", "torch pair", "torch works", "torchvision works", "numpy")} == {"ok"}
    assert status["pycocotools works"] == "ok"
    assert all(check["found"] for check in answer["checks"])


def test_broken_libraries_are_lines_with_what_to_do(path, capsys):
    library(path, "torch", "raise OSError('libcudart.so.12: cannot open shared object file')")
    library(path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    library(path, "pycocotools", "import os; os.abort()")
    assert doctor.main([]) == 5
    lines = capsys.readouterr().out.splitlines()

    def said(name: str) -> tuple[str, str]:
        at = next(i for i, line in enumerate(lines) if line[6:].startswith(name))
        return lines[at], lines[at + 1]

    assert "fail  torch works      OSError: libcudart.so.12" in said("torch works")[0]
    assert "pip install --force-reinstall torch" in said("torch works")[1]
    assert "fix:" in said("torchvision works")[1]
    assert "the process ended with -6" in said("pycocotools works")[0]
    assert lines[-1].endswith("checks failed")


def test_torchvisions_operators_are_tried_without_importing_it():
    code = "import sys; from onestage.doctor import probe; probe(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, modules = done.stdout.splitlines()
    answers = {answer["stage"]: answer for answer in map(json.loads, lines) if not answer.get("begun")}
    assert answers["torchvision"]["found"].endswith("its operators run")
    assert not {"torchvision", "torch._dynamo"} & set(modules.split())  # seconds, most of a start


@pytest.mark.parametrize("content", [None, b"no library"])
def test_a_torchvision_whose_library_does_not_load_is_to_be_installed_beside_its_torch(path, monkeypatch, content):
    library(path, "torchvision", "")
    if content is not None:
        (path / "torchvision" / "_C.so").write_bytes(content)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(RuntimeError, match="operator torchvision::nms does not exist: ") as error:
        doctor._try_torchvision()
    (check,) = doctor.import_checks({"torchvision": {"error": f"RuntimeError: {error.value}"}})
    assert SAME_INDEX in check.fix


def test_the_operator_that_is_missing_when_builds_differ_has_its_own_remedy():
    answers = {"torchvision": {"error": "RuntimeError: operator torchvision::nms does not exist"}}
    (check,) = doctor.import_checks(answers)
    assert (check.status, SAME_INDEX in check.fix) == ("fail", True)


@pytest.mark.parametrize(
    ("torch", "torchvision", "pinned", "why"),
    [
        ("2.13.0+cpu", "0.27.0+cpu", "torch==2.12.0", "was built for torch 2.12.0, and torch is 2.13.0+cpu"),
        ("2.13.0+cpu", "0.28.0+cu128", "torch==2.13.0", "built for different devices"),
        ("2.13.0+cpu", "0.28.0+cpu", "torch==2.13.0", None),
        ("2.13.0", "0.28.0", "torch (==2.13.0)", None),
    ],
)
def test_torch_and_torchvision_must_be_a_pair(path, torch, torchvision, pinned, why):
    distribution(path, "torch", torch)
    distribution(path, "torchvision", torchvision, pinned, "numpy")
    (check,) = doctor.pair_checks()
    if why is None:
        assert check.status == "ok"
    else:
        assert check.status == "fail"
        assert why in check.found
        assert SAME_INDEX in check.fix


def test_what_is_missing_or_old_is_told_with_the_line_that_installs_it(path):
    distribution(path, "torch", "2.9.1")
    lines = ["torch>=2.10", "nothing-of-this-name>=3", "extra-only; extra == 'video'", "win; sys_platform == 'win32'"]
    old, missing = doctor.requirement_checks(lines)
    assert (old.status, old.found) == ("fail", "2.9.1; 2.10 or newer is needed")
    assert (missing.status, missing.fix) == ("fail", "pip install 'nothing-of-this-name>=3'")


def test_an_import_that_hangs_is_ended(path):
    library(path, "torch", "import time; time.sleep(60)")
    assert "not done after 2 s" in doctor.probe_apart(patience=2)["torch"]["error"]


def test_a_gpu_that_torch_cannot_use_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "_driver", lambda: "550.54")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    without = doctor.gpu_check({"cuda": {"built": None, "devices": []}})
    assert (without.status, "built without CUDA" in without.found) == ("warn", True)
    old = doctor.gpu_check({"cuda": {"built": "13.0", "devices": []}})
    assert "update the driver" in old.fix
    assert doctor.gpu_check({"cuda": {"built": "12.8", "devices": ["H100"]}}).status == "ok"
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    assert doctor.gpu_check({}).status == "note"


def test_variables_that_mean_nothing_are_told(tmp_path):
    variables = {"ONESTAGE_KERNELS": "cuda", "COCO_ROOT": str(tmp_path), "YTVIS_ROOT": str(tmp_path / "none")}
    checks = {check.name: check.status for check in doctor.variable_checks(variables)}
    assert checks == {"ONESTAGE_KERNELS": "fail", "COCO_ROOT": "ok", "YTVIS_ROOT": "warn"}


def test_it_needs_no_other_library():
    code = "import sys, onestage.doctor; sys.exit(bool({'torch', 'numpy', 'tyro', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

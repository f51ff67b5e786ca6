"""What the packages say about themselves: one version, the agreed requirements, the same packaging everywhere."""

import importlib
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
IMPORTS = {
    path.parent.name: "onestage" if path.parent.name == "core" else path.parent.name
    for path in sorted(ROOT.glob("*/pyproject.toml"))
}
PAPERS = sorted(set(IMPORTS) - {"core"})

RUNTIME = {
    "torch",
    "torchvision",
    "numpy",
    "pycocotools",
    "pillow",
    "jinja2",
    "triton; sys_platform == 'linux'",
    "tyro",
    "safetensors",
    "tqdm",
}


@pytest.fixture(params=IMPORTS)
def package(request) -> str:
    return request.param


def test_version_is_the_same_everywhere():
    versions = {package: project(package)["version"] for package in IMPORTS}
    versions |= {name: importlib.import_module(name).__version__ for name in IMPORTS.values()}
    assert len(set(versions.values())) == 1, versions


def test_changelog_and_citation_name_this_version():
    version = project("core")["version"]
    assert re.search(rf"^## {re.escape(version)}\b", read("CHANGELOG.md"), re.MULTILINE)
    assert re.search(rf"^version: {re.escape(version)}$", read("CITATION.cff"), re.MULTILINE)


def test_core_requires_exactly_the_agreed_libraries():
    names = {f"{name}; {marker}" if marker else name for name, marker in map(name_and_marker, core_lines())}
    assert names == RUNTIME


def test_torch_is_new_enough_for_safe_loading():
    assert "torch>=2.10" in core_lines()
    assert "torchvision>=0.25" in core_lines()


@pytest.mark.parametrize("paper", PAPERS)
def test_paper_requires_only_the_core_of_its_checkout(paper):
    assert project(paper)["dependencies"] == ["{env:ONESTAGE_CORE:onestage-core @ {root:parent:uri}/core}"]


def test_extras_want_the_same_libraries_everywhere_and_the_tests_have_them(package):
    wanted = project("core")["optional-dependencies"]
    extras = {name: wanted[name] for name in ("export", "fast-eval", "video")}
    assert [name_and_marker(line)[0] for line in extras["export"]] == ["onnx", "onnxruntime", "onnxscript"]
    assert project(package)["optional-dependencies"].items() >= extras.items()
    lines = set(tomllib.loads(read("pyproject.toml"))["dependency-groups"]["test"])
    assert {line for extra in extras.values() for line in extra} <= lines


@pytest.mark.parametrize("paper", PAPERS)
def test_paper_is_found_by_command_and_entry_point(paper):
    about = project(paper)
    assert about["name"] == f"onestage-{paper}"
    assert about["scripts"] == {paper: f"{paper}.__main__:main"}
    assert about["entry-points"] == {"onestage.methods": {paper: f"{paper}.method:METHOD"}}


@pytest.mark.parametrize("paper", PAPERS)
def test_nox_starts_in_the_package_folder_too(paper):
    assert read(f"{paper}/noxfile.py") == read("sipmask/noxfile.py")


def test_packaging_is_the_same_in_every_package(package):
    tables = tomllib.loads(read(f"{package}/pyproject.toml"))
    assert tables["build-system"] == {"requires": ["hatchling>=1.27"], "build-backend": "hatchling.build"}
    assert tables["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [f"src/{IMPORTS[package]}"]
    # Without these uv installs a stale build after an edit.
    keys = [
        {"file": "pyproject.toml"},
        {"file": "src/**/*"},
        *([{"env": "ONESTAGE_CORE"}] if package != "core" else []),
    ]
    assert tables["tool"]["uv"]["cache-keys"] == keys
    about = tables["project"]
    assert (about["requires-python"], about["license"], about["readme"]) == (">=3.10", "Apache-2.0", "README.md")
    assert (ROOT / package / "README.md").stat().st_size > 200


def test_package_is_typed(package):
    assert (ROOT / package / "src" / IMPORTS[package] / "py.typed").is_file()


def test_tests_are_no_packages(package):
    assert not list((ROOT / package / "tests").rglob("__init__.py")), (
        "pytest's importlib mode needs no __init__.py in tests"
    )


def test_root_is_no_workspace_and_no_package():
    tables = tomllib.loads(read("pyproject.toml"))
    assert "project" not in tables
    assert "uv" not in tables["tool"], "a uv workspace makes `uv pip install ./sipmask` an editable install of the core"


def project(package: str) -> dict:
    return tomllib.loads(read(f"{package}/pyproject.toml"))["project"]


def core_lines() -> list[str]:
    return project("core")["dependencies"]


def name_and_marker(requirement: str) -> tuple[str, str]:
    name, _, marker = requirement.partition(";")
    return re.split(r"[<>=~! ]", name)[0], marker.strip()


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")

"""Installing from a checkout and from wheels, and running from anywhere.

What needs no download runs always. What fills fresh environments with torch runs under `nox -s install`, which names
the packages in ONESTAGE_TEST_INSTALL.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/pyproject.toml"))
PAPERS = [package for package in PACKAGES if package != "core"]
CORE = tomllib.loads((ROOT / "core" / "pyproject.toml").read_text(encoding="utf-8"))["project"]

NAMED = os.environ.get("ONESTAGE_TEST_INSTALL", "").split()
fresh = pytest.mark.skipif(not NAMED, reason="takes minutes and gigabytes: nox -s install")
each_package = pytest.mark.parametrize("package", [package for package in PACKAGES if package in (NAMED or PACKAGES)])
each_paper = pytest.mark.parametrize("package", [package for package in PAPERS if package in (NAMED or PACKAGES)])


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory) -> Path:
    """Release wheels of all packages."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    for package in PACKAGES:
        build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT / package)
        run(sys.executable, *build, ONESTAGE_CORE=f"onestage-core=={CORE['version']}")
    return folder


@pytest.mark.parametrize("package", PACKAGES)
def test_release_wheel_holds_every_file_and_no_local_path(wheelhouse, package):
    with zipfile.ZipFile(next(wheelhouse.glob(f"onestage_{package}-*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert "file:" not in metadata
    assert str(ROOT) not in metadata
    if package != "core":
        required = [
            line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line
        ]
        assert required == [f"Requires-Dist: onestage-core=={CORE['version']}"]
    source = ROOT / package / "src"
    import_name = "onestage" if package == "core" else package
    files = {path.relative_to(source).as_posix() for path in (source / import_name).rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= set(names)
    assert not [name for name in names if "test" in name.split("/")[0]]


@pytest.mark.parametrize("package", PAPERS)
def test_wheels_install_together_and_run_from_anywhere(wheelhouse, package, tmp_path):
    target = tmp_path / "site"
    offline = ("--no-index", "--find-links", wheelhouse, "--no-deps", "--target", target)
    uv("pip", "install", "--python", sys.executable, *offline, "onestage-core", f"onestage-{package}")
    for folder in (ROOT, ROOT / package, tmp_path):
        assert installed_core(sys.executable, folder, PYTHONPATH=str(target)).is_relative_to(target)
        run(sys.executable, "-m", f"{package}.train", "--help", folder=folder, PYTHONPATH=str(target))


def test_uv_builds_the_core_anew_after_an_edit(tmp_path):
    # Without the cache-keys of the packages' pyproject.toml uv would install the first build again.
    checkout = copy_checkout(tmp_path / "checkout")
    for edit in ("first", "second"):
        with (checkout / "core" / "src" / "onestage" / "__init__.py").open("a", encoding="utf-8") as file:
            file.write(f"\nEDIT = {edit!r}\n")
        target = ("--no-deps", "--no-build-isolation", "--target", tmp_path / edit)
        uv("pip", "install", "--python", sys.executable, *target, checkout / "core")
        assert f"EDIT = {edit!r}" in (tmp_path / edit / "onestage" / "__init__.py").read_text(encoding="utf-8")


@fresh
@each_package
def test_pip_needs_no_earlier_step(package, tmp_path):
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment)
    python = python_of(environment)
    try:
        run(python, "-m", "pip", "install", f"./{package}")
        assert_runs_from_anywhere(python, package, tmp_path)
        assert installed_core(python, tmp_path).is_relative_to(environment)
    finally:
        shutil.rmtree(environment)


@fresh
@each_package
def test_uv_needs_no_earlier_step(package, environment, tmp_path):
    python = environment(libraries=False)
    uv("pip", "install", "--python", python, f"./{package}")
    assert_runs_from_anywhere(python, package, tmp_path)
    assert installed_core(python, tmp_path).is_relative_to(python.parents[1])


@fresh
@each_paper
def test_editable_paper_brings_the_core_along(package, environment, tmp_path):
    python = environment()
    run(python, "-m", "pip", "install", "--editable", f"./{package}")
    assert_runs_from_anywhere(python, package, tmp_path)
    assert imported_file(python, tmp_path, package) == ROOT / package / "src" / package / "__init__.py"


@fresh
def test_all_packages_install_editable_in_one_call(environment, tmp_path):
    python = environment()
    editable = [argument for package in PACKAGES for argument in ("--editable", f"./{package}")]
    run(python, "-m", "pip", "install", *editable, ONESTAGE_CORE="onestage-core")
    for package in PAPERS:
        assert_runs_from_anywhere(python, package, tmp_path)
    assert installed_core(python, tmp_path) == ROOT / "core" / "src" / "onestage" / "__init__.py"


@fresh
@each_paper
def test_checkout_may_lie_in_a_folder_with_a_space(package, environment, tmp_path):
    checkout = copy_checkout(tmp_path / "my check out")
    with (checkout / "core" / "src" / "onestage" / "__init__.py").open("a", encoding="utf-8") as file:
        file.write('\nCHECKOUT = "with a space"\n')
    for tool in ("pip", "uv"):
        python = environment()
        if tool == "pip":
            run(python, "-m", "pip", "install", f"./{package}", folder=checkout)
        else:
            uv("pip", "install", "--python", python, f"./{package}", folder=checkout)
        assert_runs_from_anywhere(python, package, tmp_path)
        assert "with a space" in installed_core(python, tmp_path).read_text(encoding="utf-8"), (
            "core of another checkout"
        )


@fresh
@each_paper
def test_wheelhouse_is_all_that_pip_needs_of_ours(package, wheelhouse, environment, tmp_path):
    python = environment()
    # Nothing of the machine's own configuration: a constraint in it may contradict the libraries that uv chose.
    own = {"PIP_CONFIG_FILE": os.devnull}
    run(python, "-m", "pip", "install", "--no-index", "--find-links", wheelhouse, f"onestage-{package}", **own)
    assert_runs_from_anywhere(python, package, tmp_path)


@pytest.fixture
def environment(tmp_path) -> Iterator[Callable[..., Path]]:
    """Makes fresh environments with pip, by default with the core's libraries in them, and removes them afterwards."""
    folders = []

    def make(libraries: bool = True) -> Path:
        folders.append(tmp_path / f"environment-{len(folders)}")
        uv("venv", "--seed", "--python", sys.executable, folders[-1])
        if libraries:
            uv("pip", "install", "--python", python_of(folders[-1]), *CORE["dependencies"])
        return python_of(folders[-1])

    yield make
    for folder in folders:
        shutil.rmtree(folder)


def assert_runs_from_anywhere(python: Path, package: str, elsewhere: Path) -> None:
    module = "onestage.synth" if package == "core" else f"{package}.train"
    for folder in (ROOT, ROOT / package, elsewhere):
        assert "usage:" in run(python, "-m", module, "--help", folder=folder).lower()
    if package != "core":
        assert "usage:" in run(python.parent / package, "train", "--help", folder=elsewhere).lower()


def installed_core(python: Path | str, folder: Path, **environment: str) -> Path:
    return imported_file(python, folder, "onestage", **environment)


def imported_file(python: Path | str, folder: Path, module: str, **environment: str) -> Path:
    return Path(run(python, "-c", f"import {module}; print({module}.__file__)", folder=folder, **environment).strip())


def copy_checkout(folder: Path) -> Path:
    """The packages' folders, as a clone would have them."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "tests", "runs", "build", "dist")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    return folder


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def uv(*arguments: Path | str, folder: Path = ROOT) -> str:
    return run(sys.executable, "-m", "uv", *arguments, folder=folder)


def run(*command: Path | str, folder: Path = ROOT, **environment: str) -> str:
    """What `command` prints; a failure shows all of it."""
    leave_out = ("ONESTAGE_CORE", "PYTHONPATH", "VIRTUAL_ENV")
    inherited = {name: value for name, value in os.environ.items() if name not in leave_out}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))} (in {folder})\n{done.stdout}"
    return done.stdout

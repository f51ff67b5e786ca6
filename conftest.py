"""What every test of the repository gets: NaN in uninitialised memory, golden data, the shared folder, processes."""

import faulthandler
import gzip
import html
import importlib
import io
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent
SHARED = ROOT.parent / "shared"
PATIENCE = 120  # seconds until a forked process is killed; one takes few, and many more on a machine that is busy

# pytest names sipmask/tests/test_x.py `sipmask.tests.test_x` and would take the folder for the package `sipmask`,
# unless the package is there already.
for project in ROOT.glob("*/pyproject.toml"):
    name = project.parent.name
    if (project.parent / "src" / name).is_dir():
        importlib.import_module(name)

torch.set_num_threads(1)  # sums have an order, and it is that of forked processes, which have one thread

# Autograd looks for devices at its first backward. A fake CUDA device of another test would make it start threads, and
# after those no process can be forked any more.
torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> "Golden":
    """Reads golden data: `golden("sipmask_smp")` is the content of `sipmask_smp.pt` (or `.pt.gz`, `.json`).

    One folder serves a run: `ONESTAGE_GOLDEN` if it is set, else `../shared/golden`, else the `tests/golden` of the
    package that asks. A file that this folder does not have skips the test; no other folder is tried.
    """
    return Golden(_golden_folder(request.path))


@pytest.fixture
def shared() -> Path:
    """The folder `../shared` beside the repository, with its small data sets; the test is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    return SHARED


@pytest.fixture
def paper_text(shared: Path, request: pytest.FixtureRequest) -> str:
    """The text of the paper whose package asks; the test is skipped without it."""
    path = shared / "papers" / f"{request.path.relative_to(ROOT).parts[0]}.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there: printed numbers are not checked")
    return path.read_text(encoding="utf-8")


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one and kernels are compiled, else the CPU, where they run in Triton's interpreter."""
    compiled = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") == "0"
    return torch.device("cuda" if compiled else "cpu")


@pytest.fixture
def page_width(tmp_path: Path) -> Callable[[str, int], int]:
    """How wide a page (its HTML) comes out in a window that is so many px wide; skipped without a Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: the page's widths were NOT checked")
    measure = (
        "<script>onload = () => document.title = "
        "document.querySelector('iframe').contentDocument.documentElement.scrollWidth</script>"
    )

    def width(page: str, window: int) -> int:  # in a frame: Chromium's windows start at 500
        frame = f"<iframe style='width: {window}px; height: 900px' srcdoc='{html.escape(page)}'></iframe>"
        (tmp_path / "frame.html").write_text(f"<title></title>{frame}{measure}", encoding="utf-8")
        done = subprocess.run(
            [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
            + ["--disable-background-networking", "--no-first-run", "--dump-dom", str(tmp_path / "frame.html")],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return int(done.stdout.split("<title>")[1].split("</title>")[0])

    return width


@pytest.fixture
def fork(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int | None]]:
    """Calls a function in new processes, with torchrun's environment if there are several; returns exit codes.

    Forked, because importing torch anew takes seconds.
    """

    def call(function: Callable[..., Any], *args: Any, processes: int = 1, **kwargs: Any) -> list[int | None]:
        group: dict[str, Any] = {}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
            group |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        context = multiprocessing.get_context("fork")
        started = []
        for rank in range(processes):
            with monkeypatch.context() as environment:
                for name, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items():
                    environment.setenv(name, str(value))
                started.append(context.Process(target=_in_child, args=(function, args, kwargs)))
                started[-1].start()
        for process in started:
            process.join(PATIENCE)
            process.kill()
            process.join()
        return [process.exitcode for process in started]

    return call


def _in_child(function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    faulthandler.dump_traceback_later(PATIENCE - 10, file=sys.__stderr__)  # says where one hangs
    function(*args, **kwargs)  # what it raises is printed and becomes exit code 1


class Golden:
    """The golden files of one folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, name: str) -> Any:
        """The content of `name`, a file with or without its ending; read anew, so a test may change it."""
        path = self.path(name)
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def path(self, name: str) -> Path:
        """Where `name` lies; skips the test if it lies nowhere."""
        for candidate in (name, f"{name}.pt", f"{name}.pt.gz", f"{name}.json"):
            if (self.folder / candidate).is_file():
                return self.folder / candidate
        pytest.skip(f"golden data {name!r} is not in {self.folder}")


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory() -> None:
    """`torch.empty` gives NaN, so that a result with an unwritten element differs from every expectation.

    Set before each test because a test of deterministic training may have changed it.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device"
    if "COCO_ROOT" not in os.environ:
        missing["data"] = "needs COCO: COCO_ROOT is not set"
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _golden_folder(test_file: Path) -> Path:
    named = os.environ.get("ONESTAGE_GOLDEN")
    if named:
        return Path(named)
    if (SHARED / "golden").is_dir():
        return SHARED / "golden"
    package = ROOT / test_file.relative_to(ROOT).parts[0]
    return package / "tests" / "golden"

"""Sessions of the repository: `python -m nox -s tests`. They work on the packages they find; none is listed here.

After `--` come package names, then arguments for the tool that the session runs:
`nox -s tests -- sipmask -k decode`, `nox -s tests -- -m golden`, `nox -s demo -- sipmask --steps 100`,
`nox -s reproduce-table1 -- sipmask --rows "R50*" --profile smoke`.
"""

import hashlib
import os
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
CORE = "core"
PAPERS = sorted(path.parent.name for path in ROOT.glob("*/pyproject.toml") if path.parent.name != CORE)
PACKAGES = [CORE, *PAPERS]
# What a `reproduce-` session repeats.
TABLES = ("table1", "table2", "table3", "table4", "table5", "table6", "table7", "table8", "figure4", "figure5", "all")

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]
os.environ.setdefault("UV_PYTHON_DOWNLOADS", "never")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests of all packages, or of those named, in two processes."""
    install_development(session)
    packages, arguments = split_arguments(session)
    if not any(argument.startswith(("-n", "--numprocesses", "--pdb")) for argument in arguments):
        arguments = ["--numprocesses=2", "--dist=worksteal", *arguments]
    folders = [f"{package}/tests" for package in packages]
    environment = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "1")}
    session.run("python", "-m", "pytest", *folders, *arguments, env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Run the hooks of .pre-commit-config.yaml over every file: ruff's rules and format, and what is banned."""
    install_once(session, *dependency_group("lint"))
    _, arguments = split_arguments(session)
    session.run("pre-commit", "run", "--all-files", "--show-diff-on-failure", *arguments)


@nox.session
def types(session: nox.Session) -> None:
    """Run mypy over the sources of all packages, or of those named."""
    install_development(session)
    packages, arguments = split_arguments(session)
    sources = [f"{package}/src" for package in packages or PACKAGES]
    session.run("python", "-m", "mypy", *sources, *arguments)


@nox.session
def demo(session: nox.Session) -> None:
    """Train the demo of each paper on generated shapes on the CPU and write its page."""
    install_development(session)
    packages, arguments = split_arguments(session)
    for package in packages or PAPERS:
        session.run("python", "-m", f"{package}.demo", *arguments)


@nox.session(name="bench-kernels")
def bench_kernels(session: nox.Session) -> None:
    """Measure mask post-processing against the published formulas, on a GPU if there is one; draw the records."""
    measure(session, "benchmarks/kernels.py")


@nox.session(name="bench-image")
def bench_image(session: nox.Session) -> None:
    """Measure whole images of all papers against torchvision's models, on a GPU if there is one; draw the records."""
    measure(session, "benchmarks/images.py")


def measure(session: nox.Session, script: str) -> None:
    """Runs a benchmark with the flags after `--` and draws the page of records."""
    install_development(session)
    session.run("python", script, *session.posargs)
    session.run("python", "benchmarks/speed_page.py")


@nox.session
def hostile(session: nox.Session) -> None:
    """Try thousands of malformed files of every kind and write a record: `-- --cases 2400`."""
    install_development(session)
    session.run("python", "benchmarks/hostile.py", *session.posargs)


@nox.session
def ray(session: nox.Session) -> None:
    """Install Ray and run the code of docs/at_scale.md on it, against one process."""
    install_development(session)
    session.install("ray[data]", "--constraint", "constraints.txt")
    environment = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    session.run("python", "benchmarks/at_scale.py", *session.posargs, env=environment)


@nox.session
def kills(session: nox.Session) -> None:
    """Kill trainings at random moments, resume them and compare the ends; write a record: `-- --kills 20`."""
    install_development(session)
    session.run("python", "benchmarks/kills.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the API's documentation from docstrings, and the pages of docs/, into site/."""
    install_development(session)
    session.install(*dependency_group("docs"), "--constraint", "constraints.txt")
    session.run("python", "docs/build.py", *session.posargs)


@nox.session
def install(session: nox.Session) -> None:
    """Install each package into fresh environments in every way users do, and run it from several folders."""
    install_development(session)
    packages, arguments = split_arguments(session)
    session.run(
        *("python", "-m", "pytest", "tests/test_install.py", *arguments),
        env={"ONESTAGE_TEST_INSTALL": " ".join(packages or PACKAGES)},
    )


@nox.session
def wheels(session: nox.Session) -> None:
    """Build release wheels into dist/: they ask for the core by version and hold no path of this machine."""
    install_once(session, "build", "hatchling")
    packages, arguments = split_arguments(session)
    version = nox.project.load_toml(ROOT / CORE / "pyproject.toml")["project"]["version"]
    for package in packages or PACKAGES:
        session.run(
            *("python", "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", *arguments, package),
            env={"ONESTAGE_CORE": f"onestage-core=={version}"},
        )


def reproduces(what: str) -> None:
    """Makes the session that repeats a table."""

    @nox.session(name=f"reproduce-{what}")
    def reproduce(session: nox.Session) -> None:
        """Repeat this table of every paper, or of those named, and write its page: `-- sipmask --profile smoke`."""
        install_development(session)
        packages, arguments = split_arguments(session)
        try:
            session.run("python", "-m", "onestage.tables", what, *(packages or PAPERS), *arguments)
        except nox.command.CommandFailed as failed:
            if str(failed.reason).endswith(" code 3"):  # data are missing; nox by itself says 1 for whatever went wrong
                sys.exit(3)
            raise


for _what in TABLES:
    reproduces(_what)


@nox.session
def figures(session: nox.Session) -> None:
    """Draw sheets after the papers' figures on generated images; some want trainings that reproduce-tableN leaves."""
    install_development(session)
    session.run("python", "benchmarks/figures.py", *session.posargs)


def split_arguments(session: nox.Session) -> tuple[list[str], list[str]]:
    """The package names that stand first after `--`, and the other arguments."""
    arguments = list(session.posargs)
    packages = []
    while arguments and arguments[0] in PACKAGES:
        packages.append(arguments.pop(0))
    return packages, arguments


def install_development(session: nox.Session) -> None:
    """All packages, editable, with the tools that test them, in the versions of constraints.txt."""
    editable = [argument for package in PACKAGES for argument in ("--editable", f"./{package}")]
    tools = [*dependency_group("test"), *dependency_group("types")]
    # The papers' core requirement by name only, so that it is the editable core of this very call.
    install_once(session, *editable, *tools, "--constraint", "constraints.txt", env={"ONESTAGE_CORE": "onestage-core"})


def install_once(session: nox.Session, *arguments: str, env: dict[str, str] | None = None) -> None:
    """Installs what `arguments` say, unless this environment has it already: a second start takes seconds."""
    files = [ROOT / "constraints.txt", *(ROOT / package / "pyproject.toml" for package in PACKAGES)]
    content = "\n".join([*arguments, *(file.read_text(encoding="utf-8") for file in files)])
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    stamp = Path(session.virtualenv.location) / "installed.sha256"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == fingerprint:
        session.log("The environment is up to date.")
        return
    session.install(*arguments, env=env)
    stamp.write_text(fingerprint, encoding="utf-8")


def dependency_group(name: str) -> list[str]:
    """The requirements of a group of the root's pyproject.toml."""
    return list(nox.project.dependency_groups(nox.project.load_toml(ROOT / "pyproject.toml"), name))

"""Every command and every link in the documentation works."""

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/pyproject.toml"))
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", *(f"{package}/README.md" for package in PACKAGES))
    for path in ROOT.glob(pattern)
)


def commands(document: Path) -> list[str]:
    """Lines of the sh blocks and inline code of `document` that start a program of this repository."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    starts = re.compile(r"^(\w+=\S+ )*(python |nox |torchrun |\.ci/run|sipmask |pip |uv )")
    parts = [part.strip() for line in lines + inline if starts.match(line) for part in line.split("&&")]
    return list(dict.fromkeys(part for part in parts if part))


CASES = [(document, command) for document in DOCUMENTS for command in commands(document)]


def test_the_documents_show_commands():
    readme = commands(ROOT / "README.md")
    assert {"python -m sipmask.demo", "python -m nox -s tests"} <= set(readme)
    assert len(CASES) > 20


@pytest.mark.parametrize(
    ("document", "command"), CASES, ids=[f"{document.relative_to(ROOT)}: {command}" for document, command in CASES]
)
def test_command_exists_and_knows_its_flags(document, command):
    words = [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == ".ci/run":
        assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    elif "pip" in words[:3]:
        for word in words:
            folder = word.partition("[")[0]
            assert not word.startswith("./") or (ROOT / folder / "pyproject.toml").is_file(), f"{word} is no package"
            assert not word.endswith(".txt") or (ROOT / word).is_file()
    elif "nox" in words[:3]:
        names = {word for flag, word in pairwise(words) if flag == "-s"}
        assert names <= sessions(), f"no such session: {names - sessions()}"
    elif words[0] == "torchrun":
        check_verb(words[words.index("-m") + 1], words[words.index("-m") + 2 :])
    elif words[:2] == ["python", "-m"] and words[2].split(".")[0] in (*PACKAGES, "onestage"):
        check_verb(words[2], words[3:])
    elif words[0] in PACKAGES:
        check_verb(f"{words[0]}.{words[1]}", words[2:])
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
    else:
        assert words[:3] == ["python", "-m", "venv"], f"this test does not know {command!r}"


def test_what_documents_import_and_packages_offer_is_no_module_of_that_name():
    blocks = [block for document in DOCUMENTS for block in python_blocks(document)]
    lines = {ast.unparse(node) for block in blocks for node in ast.walk(ast.parse(block)) if is_of_ours(node)}
    assert "from sipmask import follow" in lines
    lines |= {f"from {package} import *" for package in PACKAGES if package != "core"}
    code = "\n".join([*sorted(lines), "print([x for x in list(globals()) if type(globals()[x]).__name__ == 'module'])"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['__builtins__']\n"


@pytest.mark.parametrize("paper", [package for package in PACKAGES if package != "core"])
def test_each_paper_has_a_page_that_says_what_it_is_what_differs_and_how_to_train(paper):
    text = (ROOT / "docs" / "methods" / f"{paper}.md").read_text(encoding="utf-8")
    headings = " ".join(re.findall(r"^## (.*)$", text, re.MULTILINE))
    for part in ("in words", "Where it is", "What agrees with what", "Training", "The authors' weights", "Numbers of"):
        assert part in headings, part
    assert re.search("Where paper and code differ|What the paper leaves open", headings)
    assert f"-m {paper}.train --data" in text
    assert f"{paper}.convert" in text
    link = f"docs/methods/{paper}.md"
    assert link in (ROOT / "README.md").read_text(encoding="utf-8")
    assert link in (ROOT / paper / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(document.relative_to(ROOT)) for document in DOCUMENTS])
def test_relative_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", document.read_text(encoding="utf-8")):
        assert (document.parent / link).exists(), link


def python_blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def is_of_ours(node: ast.AST) -> bool:
    """Whether it is `from ... import` of a package of this repository."""
    return isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in (*PACKAGES, "onestage")


def check_verb(module: str, arguments: list[str]) -> None:
    """`python -m module` has every flag among `arguments`."""
    text = help_of(module)
    for word in arguments:
        if word.startswith("--"):
            flag = word.split("=")[0]
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), f"{module} has no flag {flag}"


@cache
def help_of(module: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def sessions() -> set[str]:
    """Functions of noxfile.py that are sessions, and the names that it gives them."""
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    names = re.findall(r"^@nox\.session.*\ndef (\w+)\(", text, re.MULTILINE)
    (tables,) = re.findall(r"^TABLES = \((.*)\)$", text, re.MULTILINE)
    names += [f"reproduce-{name}" for name in re.findall(r'"(\w+)"', tables)]
    return {*names, *re.findall(r'^@nox\.session\(name="([\w-]+)"\)', text, re.MULTILINE)}

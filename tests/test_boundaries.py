"""Who may import whom: papers import only the core, the core no paper, and inside the core arrows point down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core" / "src" / "onestage"
PAPERS = sorted(path.parent.name for path in ROOT.glob("*/pyproject.toml") if path.parent.name != "core")

# A part of the core and the parts it may import. A part is a module or folder directly under onestage/.
VALUES = {"errors", "config", "machine", "files", "boxes", "masks", "structures"}
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "machine": set(),
    "files": {"errors"},
    "method": {"errors", "config"},
    "boxes": {"errors"},
    "masks": {"errors"},
    "structures": {"errors", "boxes", "masks"},
    "ops": VALUES,
    "transforms": VALUES,
    "nn": VALUES | {"ops"},
    "data": VALUES | {"transforms"},
    "engine": VALUES | {"transforms", "data", "method"},
    "builders": VALUES | {"method", "engine", "nn"},
    "draw": VALUES,
    "tables": VALUES | {"method", "data", "engine", "builders", "draw"},
    "cli": VALUES | {"method", "data", "engine", "tables", "builders", "transforms", "draw"},
    "testing": VALUES | {"method", "transforms", "ops", "nn", "data", "tables"},
    "synth": {"errors", "cli", "data"},
    "lint": {"errors", "files", "cli", "data"},
    "explore": {"errors", "files", "cli", "data", "engine", "draw"},
    "report": {"errors", "files", "cli", "data", "engine", "draw"},
    "doctor": {"errors", "machine", "cli"},
}
EXCEPTIONS = {
    ("nn/imagenet.py", "onestage.engine.checkpoint"),  # the one module that opens weights files
    ("engine/evaluate.py", "onestage.ops.nms"),  # merges what is found in an image and its mirror image
    ("engine/train.py", "onestage.ops.dispatch"),  # says which kernels run
    ("engine/export.py", "onestage.ops.deform"),  # what deformable convolutions become
    ("cli/train.py", "onestage.nn.imagenet"),  # --weights-backbone
    ("tables/__main__.py", "onestage.cli.tables"),  # the command of this folder's name
    ("masks.py", "onestage.ops.packed"),  # the forms of masks, on tensors: these ops know nothing of `Masks`
    ("masks.py", "onestage.ops.runs"),
    ("masks.py", "onestage.ops.host"),  # what travels to the host together
    ("structures.py", "onestage.ops.host"),
}


def test_core_imports_no_paper():
    for file in python_files(CORE):
        assert not {name.split(".")[0] for name in imported(file)} & set(PAPERS), file


@pytest.mark.parametrize("paper", PAPERS)
def test_paper_imports_no_other_paper(paper):
    others = set(PAPERS) - {paper}
    for file in python_files(ROOT / paper):
        assert not {name.split(".")[0] for name in imported(file)} & others, file


def test_core_names_no_paper():
    for file in python_files(CORE):
        named = [text for text in identifiers_and_strings(file) for paper in PAPERS if paper in text.lower()]
        assert not named, f"{file}: {named}"


def test_arrows_inside_the_core_point_down():
    for file in python_files(CORE):
        where = file.relative_to(CORE).as_posix()
        part = where.split("/")[0].removesuffix(".py")
        if part == "__init__":
            continue
        assert part in MAY_IMPORT, f"{where}: say in {Path(__file__).name} what {part!r} may import"
        for name in imported(file):
            if not name.startswith("onestage.") or any(name.startswith(to) for at, to in EXCEPTIONS if at == where):
                continue
            target = name.split(".")[1]
            assert target in MAY_IMPORT[part] | {part}, f"{where} imports {name}"


def test_kernels_are_imported_only_inside_functions():
    for file in [*python_files(CORE), *(file for paper in PAPERS for file in python_files(ROOT / paper / "src"))]:
        if "triton" in file.relative_to(ROOT).parts:
            continue
        inside = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        top = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if not isinstance(node, inside)]
        assert not {name for name in imported_by(top) if "triton" in name.split(".")}, file


@pytest.mark.parametrize("module", ["onestage", *PAPERS])
def test_import_loads_nothing_heavy(module):
    optional = {
        "cv2",
        "matplotlib",
        "av",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "tensorboard",
        "faster_coco_eval",
        "supervision",
    }
    model = [] if module == "onestage" else [f"{module}.model"]
    assert not loaded_by(module, *model) & optional


@pytest.mark.parametrize("paper", PAPERS)
def test_package_and_its_config_import_without_torch(paper):
    assert "torch" not in loaded_by(paper, f"{paper}.config", f"{paper}.method", "onestage", "onestage.config")


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Every module and name that `file` imports at any level, but for typing only."""
    return imported_by(ast.parse(file.read_text(encoding="utf-8")).body)


def imported_by(statements: list[ast.stmt]) -> set[str]:
    names = set()
    for statement in statements:
        if isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING"):
            continue
        for node in (statement, *ast.walk(statement)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, "imports are absolute"
                # `from onestage import boxes` imports onestage.boxes.
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def identifiers_and_strings(file: Path) -> list[str]:
    """Names and string constants of a file; docstrings may cite a paper and are left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found.append(node.value)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append(node.name)
        elif isinstance(node, ast.Name):
            found.append(node.id)
        elif isinstance(node, ast.arg):
            found.append(node.arg)
    return found


def loaded_by(*modules: str) -> set[str]:
    """Top-level names of all modules that a fresh interpreter holds after importing `modules`."""
    code = f"import sys, {', '.join(modules)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())

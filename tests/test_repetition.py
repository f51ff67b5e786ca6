"""No block of code stands twice: what two papers need goes to the core, what two tests need to `onestage.testing`."""

import io
import tokenize
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = [*sorted(path.parent for path in ROOT.glob("*/pyproject.toml")), ROOT / "benchmarks", ROOT / "tests"]
BLOCK = 6  # statements
# The form of a model's `forward`, which every package writes out so that it can be read where it is.
FORWARD = "if not self . training :"


def test_no_block_of_code_stands_in_two_files():
    places = defaultdict(set)
    for folder in FOLDERS:
        for file in sorted(folder.rglob("*.py")):
            for line, block in blocks(file.read_text(encoding="utf-8")):
                places[block].add((file.relative_to(ROOT).as_posix(), line))
    repeated = [sorted(where) for where in places.values() if len({file for file, _ in where}) > 1]
    assert not repeated, f"stands more than once: {repeated[:5]}"


def test_blocks_see_through_comments_docstrings_and_white_space():
    code = [f"x{i} = f(y, {i})" for i in range(BLOCK)]
    plain = "\n".join(code)
    dressed = '"""A docstring\nof two lines."""\n\n\n' + "  # a reason\n".join(code).replace("f(y, ", "f(y,  ")
    assert [block for _, block in blocks(plain)] == [block for _, block in blocks(dressed)] != []


def test_a_shorter_piece_is_no_block():
    assert not list(blocks("\n".join(f"x{i} = {i}" for i in range(BLOCK - 1))))


def blocks(text: str) -> list[tuple[int, str]]:
    """Every run of BLOCK consecutive statements, with the line it starts at.

    Imports, declarations of fields, docstrings, comments and white space are left out; `else:`, `pass` and the like do
    not count.
    """
    lines = statements(text)
    runs = (lines[at : at + BLOCK] for at in range(len(lines) - BLOCK + 1))
    found = [(run[0][0], "\n".join(statement for _, statement in run)) for run in runs]
    return [(line, block) for line, block in found if FORWARD not in block]


def statements(text: str) -> list[tuple[int, str]]:
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER)
    lines, tokens = [], []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NEWLINE:
            is_prose = all(part.type == tokenize.STRING for part in tokens)
            is_field = len(tokens) > 1 and tokens[1].string == ":"
            if not is_prose and not is_field and tokens[0].string not in ("import", "from") and len(tokens) > 2:
                lines.append((tokens[0].start[0], " ".join(part.string for part in tokens)))
            tokens = []
        elif token.type not in empty:
            tokens.append(token)
    return lines

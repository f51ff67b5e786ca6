"""Builds the documentation into a folder: the API from docstrings, by pdoc, and the pages of docs/ beside it.

`nox -s docs` runs it. A warning of pdoc, a module that cannot be imported for one, and a link to a file that does not
exist are errors.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import warnings
from pathlib import Path

import jinja2
import pdoc
import pdoc.render
from markupsafe import Markup
from pdoc.render_helpers import to_html

ROOT = Path(__file__).parents[1]
PAPERS = sorted(path.parent.name for path in ROOT.glob("*/pyproject.toml") if path.parent.name != "core")
MODULES = ["onestage", "!onestage.ops.triton", "!onestage.testing", *PAPERS]
PATTERNS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "benchmarks/**/*.md", "*/README.md")
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { max-width: 50rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222 }
pre, code { background: #f4f4f2; font-size: 0.9em } pre { padding: 0.7rem; overflow-x: auto } img { max-width: 100% }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { border: 1px solid #ccc; padding: 0.2rem 0.5rem; text-align: left; vertical-align: top }
</style>
<nav><a href="{{ up }}index.html">onestage</a> · <a href="{{ up }}api/index.html">API</a></nav>
{{ body }}
</html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=ROOT / "site", help="default: site")
    output = parser.parse_args().output
    pages = sorted({path.relative_to(ROOT) for pattern in PATTERNS for path in ROOT.glob(pattern)})
    shutil.rmtree(output / "api", ignore_errors=True)
    for page in pages:
        write_page(page, set(pages), output)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of libraries that are imported
    # pdoc reads an inherited field's annotation with the names of the module that inherits it, and then shows it as is.
    warnings.filterwarnings("ignore", "Error parsing type annotation")
    for paper in PAPERS:  # their names are imported when they are first used, which pdoc does not do
        package = importlib.import_module(paper)
        vars(package).update({name: getattr(package, name) for name in package.__all__})
    pdoc.render.configure(docformat="google", show_source=False, search=True, math=True)
    pdoc.pdoc(*MODULES, output_directory=output / "api")
    print(f"{len(pages)} pages and {len(list((output / 'api').rglob('*.html')))} of the API: {output / 'index.html'}")


def write_page(page: Path, pages: set[Path], output: Path) -> None:
    """One page at the same place below `output`, its links to pages kept; README.md becomes index.html."""
    text = (ROOT / page).read_text(encoding="utf-8")
    target = output / place_of(page)
    target.parent.mkdir(parents=True, exist_ok=True)

    def link(found: re.Match[str]) -> str:
        before, where, after, label = found.groups()
        if re.match(r"[a-z]+:|#", where):
            return found[0]
        other = Path(*(ROOT / page.parent / where.partition("#")[0]).resolve().relative_to(ROOT).parts)
        assert (ROOT / other).exists(), f"{page} links to {where}, which does not exist"
        readme = other / "README.md"
        if other not in pages and readme not in pages:  # a file of the repository: only named here
            return label
        depth = "../" * (len(page.parts) - 1)
        return f'<a {before}href="{depth}{place_of(other if other in pages else readme).as_posix()}"{after}>{label}</a>'

    html = re.sub(r'<a ([^>]*)href="([^"]*)"([^>]*)>(.*?)</a>', link, str(to_html(text)), flags=re.DOTALL)
    for picture in re.findall(r'<img[^>]*src="([^":]*)"', html):
        copy = (target.parent / picture).resolve()
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / page.parent / picture, copy)
    title = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), page.stem)
    environment = jinja2.Environment(autoescape=True)
    up = "../" * (len(page.parts) - 1)
    body = Markup(html)  # made of our own pages
    target.write_text(environment.from_string(PAGE).render(title=title, body=body, up=up), encoding="utf-8")


def place_of(page: Path) -> Path:
    """Where a page goes."""
    return page.with_name("index.html") if page.name == "README.md" else page.with_suffix(".html")


if __name__ == "__main__":
    main()

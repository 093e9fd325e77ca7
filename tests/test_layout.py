"""What imports what: the files form layers, without circles."""

import ast
import functools

import pytest
from conftest import ROOT

FILES = [ROOT / "main.py", ROOT / "datasets.py"]
FILES += [*ROOT.glob("support/*.py"), *ROOT.glob("extras/**/*.py")]
PATHS = [str(path.relative_to(ROOT)) for path in FILES]


@functools.cache
def arrows_from(path, is_lazy):
    """The files that a file imports, wherever; is_lazy: those that it names for `extra` instead."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if is_lazy:
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "extra":
                names.update(f"extras.features.{word.value}" for word in node.args)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    files = {name.replace(".", "/") + ".py" for name in names}
    return files & {*PATHS}


def test_the_package_imports_nothing_above_it():
    """Nor does datasets.py; the package does not name a file for `extra`, either."""
    for path in PATHS:
        used = set()
        if path.startswith("support/"):
            used = arrows_from(path, False) | arrows_from(path, True)
        if path == "datasets.py":
            used = arrows_from(path, False)
        assert all(other.startswith("support/") for other in used), path
    [statement] = ast.parse((ROOT / "support/__init__.py").read_text()).body
    assert isinstance(statement.value, ast.Constant), "its __init__ does nothing"


@pytest.mark.parametrize("path", PATHS)
def test_no_file_imports_itself_by_others(path):
    seen = set()
    queue = [path]
    for each in queue:  # which grows
        new = arrows_from(each, False) - seen
        assert path not in new, f"{each} imports it"
        seen |= new
        queue += new


def test_a_reader_soon_meets_the_model():
    """Its first class, after few imports of the house's own."""
    lines = (ROOT / "main.py").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("class "))
    assert first < 75
    own = [line for line in lines[:first] if line.startswith(("from support", "import datasets"))]
    assert len(own) <= 12

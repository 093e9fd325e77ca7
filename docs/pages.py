"""Writes the pages that are made from others, or runs the notebook.

    python docs/pages.py               writes tutorial.ipynb, and tables of flags.md and README.md
    python docs/pages.py --check       says which of them are not as this would write them
    python docs/pages.py --run FOLDER  runs the notebook there; needs nbclient, nbformat, ipykernel

The notebook is tutorial.md: a block of bash becomes a cell of commands, one of diff a cell that
edits main.py, one of python a file; what commands print stays text. The tables of flags are FLAGS;
those of README.md say in which lines of main.py its sections begin, and what tested.md says of each
kind of machine.
"""

import json
import re
import sys
import time
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
TUTORIAL = DOCS / "tutorial.md"
NOTEBOOK = DOCS / "tutorial.ipynb"
TABLES = DOCS / "flags.md"
README = ROOT / "README.md"
# Sections of main.py, and what one edits there.
SECTIONS = {
    "Model": "attend, MLPS, Block, LanguageModel",
    "Loss and optimizer": "training_loss, Muon, OPTIMIZERS, SCHEDULES",
    "Batches": "Batches",
    "Evaluation": "token_metrics, evaluate",
    "Training": "make_step, train",
    "Sampling": "process_logits, Decoder, Conversation",
    "Checkpoints": "",
}
# Kinds of machines: how to use one, and a pattern in the rows of tested.md.
MACHINES = {
    "Linux, x86-64": ("as above", r"Linux x86_64 \| cpu"),
    "Linux, ARM": ("as above", r"Linux aarch64 \| cpu"),
    "NVIDIA GPU": ("{CUDA}; then add `--gpu`", r"Linux \w+ \| gpu"),
    "Mac, Apple silicon": ("see below", r"Darwin arm64"),
    "Windows": ("as above, in WSL", r"microsoft"),
}
BEGIN = """\
from IPython.display import Image, display

# Where you or your teacher cloned this repository from, or a folder that is a copy of it:
REPOSITORY = "https://github.com/OWNER/transformer-lm"
!git clone -q {REPOSITORY} transformer-lm
%cd transformer-lm
!pip install -q -r requirements.txt"""
ABOUT = (
    "*This notebook is [tutorial.md](tutorial.md). Upload this file to any host of notebooks with "
    "two processor cores; no GPU is needed. All cells together take about half an hour. Run this "
    "first, with the address of the repository or of your class's own copy:*"
)
EDIT = """\
from pathlib import Path

path = Path("main.py")
source = path.read_text()
assert source.count({old!r}) == 1
path.write_text(source.replace({old!r}, {new!r}))"""


def cells_of(page):
    """The cells of a page of Markdown: (type, text)."""
    yield "markdown", ABOUT
    yield "code", BEGIN
    block = re.compile(r"^```(bash|diff|python)\n(.*?)\n```\n", re.MULTILINE | re.DOTALL)
    end = 0
    for found in block.finditer(page):
        between = page[end : found.start()].strip()
        if between:
            yield "markdown", between
        yield "code", code_of(*found.groups())
        end = found.end()
    if page[end:].strip():
        yield "markdown", page[end:].strip()


def code_of(language, text):
    """The code of a cell that does what a block of the page is for."""
    if language == "bash":
        lines = [f"!{line}" for line in text.splitlines()]
        pictures = re.findall(r"\w+\.png", text)
        return "\n".join([*lines, *(f'display(Image("{name}"))' for name in pictures)])
    if language == "python":
        return f"%%writefile classify.py\n{text}"
    old = "".join(f"{line[1:]}\n" for line in text.splitlines() if line[0] == "-")
    new = "".join(f"{line[1:]}\n" for line in text.splitlines() if line[0] == "+")
    return EDIT.format(old=old, new=new)


def make_notebook():
    """The notebook as JSON."""
    cells = []
    for i, (kind, text) in enumerate(cells_of(TUTORIAL.read_text("utf-8"))):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": text}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4}
    return json.dumps(notebook | {"nbformat_minor": 5}, indent=1, ensure_ascii=False) + "\n"


def run_notebook(folder):
    """Runs all cells, with a copy of this folder as the repository; prints what they print."""
    import nbformat
    from nbclient import NotebookClient

    Path(folder).mkdir(parents=True)
    notebook = nbformat.reads(NOTEBOOK.read_text("utf-8"), as_version=4)
    for cell in notebook.cells:
        cell.source = re.sub('(?m)^REPOSITORY = ".*"', f'REPOSITORY = "{ROOT}"', cell.source)
    began = time.monotonic()
    options = {"timeout": 1800, "resources": {"metadata": {"path": folder}}}
    NotebookClient(notebook, **options).execute()
    for cell in notebook.cells:
        shown = [output.get("text", "") for output in cell.get("outputs", [])]
        print(f">>> {cell.source.splitlines()[0]}\n{''.join(shown)}")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


def fill_tables():
    """The text of flags.md with a row for each flag of main.py."""
    sys.path.insert(0, str(ROOT))
    import main

    page = TABLES.read_text("utf-8")
    for group, rows in main.FLAGS.items():
        lines = ["| flag | default | |", "|---|---|---|"]
        for name, row in rows.items():
            has_default = str(row.default) not in ("None", "False", "[]")
            default = "on" if row.default is True else f"`{row.default}`" if has_default else ""
            lines.append(f"| `--{name}` | {default} | {row.help} |")
        at = page.index("| flag |", page.index(f"\n## {group}\n"))
        page = page[:at] + "\n".join(lines) + page[page.index("\n\n", at) :]
    return page


def fill_readme():
    """The text of README.md with its tables: lines of main.py, and machines."""
    from support.device import CUDA

    source = (ROOT / "main.py").read_text("utf-8")
    lines = ["| line | section of `main.py` | |", "|---|---|---|"]
    for section, names in SECTIONS.items():
        begin = source.index(f"\n# ---- {section} ---")
        part = source[begin : source.index("\n# ---- ", begin + 1)]
        names = names.split(", ") if names else []
        missing = [name for name in names if not re.search(rf"^(def |class )?{name}\b", part, re.M)]
        assert not missing, f"{section} of main.py lacks {missing}"
        what = (
            ", ".join(f"`{name}`" for name in names) or "… how a run is kept: you need not read it"
        )
        line = source.count("\n", 0, begin) + 2
        end = "" if names else f" to {source.count(chr(10)):,}"
        lines.append(f"| {line:,}{end} | {section} | {what} |")
    page = fill(README.read_text("utf-8"), "lines", lines)
    rows = re.findall(r"^\| \d.*", (DOCS / "tested.md").read_text("utf-8"), re.M)
    lines = ["| machine | how | last tested |", "|---|---|---|"]
    for kind, (how, pattern) in MACHINES.items():
        tested = "never"
        for row in sorted(rows):  # the newest is last
            if re.search(pattern, row):
                _, date, _, device, _, _, result, *_ = map(str.strip, row.split("|"))
                tested = f"{date}, {device.partition(', ')[2]}: {result}"
        lines.append(f"| {kind} | {how.format(CUDA=f'`{CUDA}`')} | {tested} |")
    return fill(page, "machines", lines)


def fill(page, name, lines):
    """A page with these lines between <!-- name --> and <!-- end -->."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    assert len(block.findall(page)) == 1, name
    table = "\n".join(lines)
    return block.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        sys.exit(run_notebook(sys.argv[2]))
    made = {NOTEBOOK: make_notebook(), TABLES: fill_tables(), README: fill_readme()}
    stale = [path.name for path in made if path.read_text("utf-8") != made[path]]
    if sys.argv[1:] == ["--check"]:
        sys.exit(f"python docs/pages.py: {', '.join(stale)}" if stale else 0)
    for path, text in made.items():
        path.write_text(text, "utf-8")

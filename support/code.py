"""The code of a run: which files it is, what counts of them, and the folder that keeps them.

Files count as a whole, without comments, docstrings and layout:

    another run     main.py; extras/features/ranks.py; fast.py there with its C, lora.py, distil.py
                    and formats.py where they are used; your own modules
    another text    datasets.py, and formats.py where it is used

The files of this package count for neither, but a run's environment has their hash. Changes in
memory, and data that the code reads, go unnoticed.
"""

import ast
import functools
import os
import re
import shlex
import sys
from pathlib import Path

from support import cli
from support.cli import HERE
from support.files import hash_of_data, new_file, publish, sync

# ---- What counts --------------------------------------------------------------------------------


def words_of_code(source):
    """Python code as a list of words, which comments, docstrings and layout do not change.

    They are the same in all versions of Python, whose syntax trees differ in empty fields only.
    Code that cannot be parsed is split at white space.
    """
    try:
        nodes = [ast.parse(source)]
    except (SyntaxError, ValueError):
        return source.split()
    words = []
    for node in nodes:  # which grows
        words.append(type(node).__name__)
        for name, value in ast.iter_fields(node):
            # `kind` is the u of u"", and `ctx` follows from where a node stands.
            if value is None or value == [] or name in ("kind", "ctx"):
                continue
            words.append(name)
            for child in value if isinstance(value, list) else [value]:
                is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                # Python 3.12 puts an empty text into some f-strings.
                is_empty = isinstance(node, ast.JoinedStr) and child.value == ""
                if not isinstance(child, ast.AST):
                    words.append(repr(child))
                elif not is_docstring and not is_empty:
                    words.append("")
                    nodes.append(child)
    return words


@functools.cache
def hash_of_code(source):
    """The SHA256 of Python code, see words_of_code."""
    return hash_of_data(words_of_code(source))


def hash_sources(code):
    """A hash of each file of code, {path: source}."""
    return {path: hash_of_code(source) for path, source in sorted(code.items())}


def what_counts(hashes):
    """The hashes, {path: hash}, of those files that make it another run."""
    return {path: hash for path, hash in hashes.items() if not IS_SHARED.match(path)}


# Paths of files that are kept with a run, but do not make it another one.
IS_SHARED = re.compile(r"(datasets\.py|support/.*)$")


def hash_of_package(hashes):
    """A hash of the files of this package, of {path: hash} of all files."""
    return hash_of_data({path: hashes[path] for path in hashes if path.startswith("support/")})[:8]


# ---- What is loaded -----------------------------------------------------------------------------
# In a notebook, main.py may begin several times in one process.

# {path from this folder: source}, of files seen so far
LOADED_SOURCES = {}
main_file = "main.py"  # the name of the file that runs: perhaps that of a copy
EDITED_NAMES = []  # of what was edited in main.py, for which fast.py no longer stands
FAST_FILES = ["extras/features/fast.py", "extras/features/fast.c"]


def remember(*paths):
    """Reads files into LOADED_SOURCES, unless they are missing, or there already."""
    for path in paths:
        if path not in LOADED_SOURCES and (HERE / path).exists():
            LOADED_SOURCES[path] = (HERE / path).read_text("utf-8", errors="replace")


def remember_files(pattern):
    """Reads the files of this folder that match a pattern, before anybody edits them."""
    remember(*sorted(str(path.relative_to(HERE)) for path in HERE.glob(pattern)))


def remember_user_modules():
    """Reads the files of the user's own modules that are loaded by now."""
    remember(*filter(None, map(user_module_path, [*sys.modules.values()])))


remember("datasets.py")
remember_files("support/*.py")


def begin_main(name, path):
    """Says that main.py begins; in a notebook, it may do so several times in one process.

    name, path: its __name__ and __file__.
    """
    global main_file
    main_file = Path(path).name
    if name == "__main__":
        cli.IS_PROGRAM = True  # also as a copy with another name
        alias_running_module(path, "main")
        for module_name in [*sys.modules]:
            # Left by an earlier start; fast.py stays, as its choice of a BLAS is final.
            if module_name.startswith("extras.") and module_name != "extras.features.fast":
                del sys.modules[module_name]
    for loaded in [*LOADED_SOURCES]:
        if loaded not in FAST_FILES and not IS_SHARED.match(loaded):
            del LOADED_SOURCES[loaded]
    EDITED_NAMES.clear()
    LOADED_SOURCES["main.py"] = Path(path).read_text("utf-8")
    remember_files("extras/features/*.py")
    remember_files("extras/features/*.c")


def uses_fast():
    """Whether fast.py is to be imported: it is there, and was not disabled."""
    return FAST_FILES[0] in LOADED_SOURCES and not os.environ.get("DISABLE_FAST")


def alias_running_module(path, name):
    """If the file at `path` runs as __main__, lets `import name` find this module."""
    running = sys.modules["__main__"]
    if getattr(running, "__file__", None) == path:  # and not cProfile's, for example
        sys.modules[name] = running


# Paths, from this folder, of modules that are not the user's own.
NOT_USERS = re.compile(
    r"(main|datasets)\.py|(support|extras|tests|.*site-packages)/.*|\..*|.*(?<!\.py)"
)


def user_module_path(module):
    """The path of a module from this folder if it is one of the user's own, else None.

    Own modules lie beside main.py or in folders below, but not in those of an environment.
    """
    path = str(getattr(getattr(module, "__spec__", 0), "origin", 0))
    inside = path.removeprefix(f"{HERE}/")
    return None if inside == path or NOT_USERS.fullmatch(inside) else inside


def forget_user_modules():
    """Makes a notebook's next %run of main.py import the user's own modules anew."""
    for name, module in [*sys.modules.items()]:
        if user_module_path(module):
            del sys.modules[name]


def read_code(flag_values, reads_rows):
    """The code that trains a run, {path from this folder: source}, with all that it needs.

    flag_values: {name: value}; reads_rows: whether formats.py reads its text. Of the user's own
    modules, those count that were loaded so far.
    """
    remember_user_modules()
    features = ["ranks.py"]
    if uses_fast():
        features += ["fast.py", "fast.c"]
    if flag_values.get("lora_rank"):
        features.append("lora.py")
    if flag_values.get("teacher"):
        features.append("distil.py")
    if reads_rows:
        features.append("formats.py")
    code = {}
    for path, source in sorted(LOADED_SOURCES.items()):
        feature = path.removeprefix("extras/features/")
        if feature == path or feature in features:
            code[path] = source
    return code


def path_of(name):
    """Where a file of code lies: that of main.py is the one that runs."""
    return HERE / (main_file if name == "main.py" else name)


def edited_files(code):
    """The names of those files of code that were edited since they were loaded."""
    edited = []
    for name, source in code.items():
        path = path_of(name)
        if path.exists() and path.read_text("utf-8", errors="replace") != source:
            edited.append(path.name if name == "main.py" else name)
    return edited


# ---- What is kept -------------------------------------------------------------------------------


def code_folder(run):
    """The folder that keeps the code that trains a Run, or that trained a Checkpoint."""
    return run.folder / f"code-{hash_of_data(run.segments[-1].code)[:8]}"


def is_plain_folder(folder):
    """Whether a path, perhaps a stranger's, is a folder of nothing but files and folders."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    inner = folder.rglob("*")
    return all(not path.is_symlink() and (path.is_file() or path.is_dir()) for path in inner)


def save_code(run):
    """Copies the code that trains a run, run.code, into its folder. Raises OSError."""
    folder = code_folder(run)
    if os.path.lexists(folder) and not is_plain_folder(folder):  # a stranger's
        return
    for name, source in run.code.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            # In run.folder, as `prune_checkpoints` removes what is left there.
            with new_file(run.folder) as file:
                file.write(source.encode())
                publish(file, path)
    for path in [folder, *folder.rglob("*")]:
        sync(path)


def describe_edit(checkpoint, code):
    """What of the code differs from the checkpoint's, with a command that shows it; "" if nothing.

    code: that is loaded, see read_code.
    """
    old = what_counts(checkpoint.segments[-1].code)
    new = what_counts(hash_sources(code))
    changed = sorted(path for path in {*old, *new} if old.get(path) != new.get(path))
    if not changed:
        return ""
    text = ", ".join(changed)
    for path in [path for path in changed if path in old and path in new][:1]:
        command = ["diff", str(code_folder(checkpoint) / path), str(path_of(path))]
        text += f": {shlex.join(command)}"
    return text

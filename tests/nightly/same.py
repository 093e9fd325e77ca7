"""Types the command lines of tests/nightly/same.txt in two checkouts, and lists what differs.

    python tests/nightly/same.py OLD NEW                   two folders that hold main.py
    python tests/nightly/same.py OLD NEW --only exact      the sections whose names contain this

Of each command: exit status, last lines of stdout and stderr, number of lines on stderr, and the
files that it made, changed and deleted. Checkpoints are files named by the SHA1 of their weights,
so that no bit of a training may differ; the sections "exact" train by each kind of flag.
Exit status: 0 if nothing differs, else 1.

In same.txt, a line is what a user types in bash; those that begin with "| " are what the command
above them reads from stdin. "== NAME" begins a section: a sequence of commands in a new folder.
What stands before the first section is run by bash before each command. $RUN1, $RUN2, ... are the
names of the section's runs, and $ID1, $ID2, ... the SHA1s of its checkpoints, in their order.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COMMANDS = Path(__file__).with_suffix(".txt")
TIMEOUT = 300  # seconds, after which the exit status is 124
WORKERS = 2 + (os.cpu_count() or 1)  # sections at a time: many commands wait for a disk

# What differs from one run of a command to the next, and what is compared instead.
PASSING = {
    r"\d{4}-\d\d-\d\d( |T)\d\d:\d\d(:\d\d)?": "DATE",
    r"\b\d+:\d\d(:\d\d)?\b": "TIME",
    r"\b[\d,.]+ (tokens/s|ms/step|ms|s|MiB|GiB)\b": r"N \1",
    r'"(seconds|tokens_per_second|ms_per_step|peak_mib)": [^,}]+': r'"\1": N',
    r"events\.out\.tfevents\.[\w.-]+": "events.out.tfevents.N",
}
# Files that a program may keep to be faster next time.
CACHES = re.compile(r"(^|/)(text|ptb|python|gpt2)/|\.lock$")
# Files whose contents differ each time, as they hold times, or paths.
VARIABLE = re.compile(r"\.(metadata|png|svg|pdf)$|/log\.\w+$|tfevents")
CHECKPOINT = re.compile(r"([0-9a-f]{40})\.safetensors")
# Which run a command begins or resumes, and from where.
BEGUN = re.compile(r"^.*\bfrom iteration \d.*", re.M)


def read_commands(path):
    """The prelude of a file of commands, and its sections: {name: [[line, stdin], ...]}."""
    prelude, *parts = re.split(r"^== (.*)\n", path.read_text(), flags=re.M)
    sections = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        commands = sections[name] = []
        for line in body.splitlines():
            if line.startswith("|"):
                commands[-1][1] += line[2:] + "\n"
            elif line and not line.startswith("#"):
                commands.append([line, ""])
    return prelude, sections


class Checkout:
    """A folder with main.py, and how its commands are typed.

    bin: a folder for a program named `python`, which finds main.py from wherever it is called.
    """

    def __init__(self, path, bin):
        self.path = Path(path).resolve()
        bin.mkdir()
        program = bin / "python"
        program.write_text(
            "#!/bin/sh\n"
            f'case $1 in main.py | datasets.py) first="{self.path}/$1"; shift;'
            ' set -- "$first" "$@";; esac\n'
            f'PYTHONPATH="{self.path}" exec "{sys.executable}" "$@"\n'
        )
        program.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{bin}:{os.environ['PATH']}",
            "CHECKOUT": str(self.path),
            "COLUMNS": "80",
            # No command reaches the network: nobody listens at this port.
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
            "no_proxy": "",
        }


def written(path):
    return path.lstat().st_mtime_ns


class Place:
    """The new folder in which a section's commands are typed, and what they have made in it."""

    def __init__(self, checkout, folder):
        self.checkout = checkout
        self.folder = folder
        folder.mkdir(parents=True)
        self.files = {}  # the digest of each
        self.places = set()  # the folders of runs that exist
        self.runs = []  # their names, and of those that were deleted
        self.ids = []

    def type(self, prelude, line, stdin):
        """Runs one command to its end; returns what is to be compared, as {field: lines}."""
        names = {f"RUN{number}": run for number, run in enumerate(self.runs, 1)}
        names |= {f"ID{number}": id for number, id in enumerate(self.ids, 1)}
        done = subprocess.run(
            ["timeout", "-k", "5", str(TIMEOUT), "bash", "-c", prelude + line],
            cwd=self.folder,
            env=self.checkout.environment | names,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
        )
        files = self.look_for_files()  # before names are settled: it sees new runs
        return {
            "exit status": [str(done.returncode)],
            "begun": [self.settled(line) for line in BEGUN.findall(done.stdout)],
            "last line of stdout": self.last_line(done.stdout),
            "last line of stderr": self.last_line(done.stderr),
            "lines on stderr": [str(done.stderr.count("\n"))],
            "files": files,
        }

    def last_line(self, text):
        return [self.settled(line) for line in text.splitlines()[-1:]]

    def look_for_files(self):
        """What the last command made, changed and deleted, as sorted lines."""
        before = self.files
        self.files = {}
        self.places = {place for place in self.places if (self.folder / place).exists()}
        for path in sorted(self.folder.rglob("*"), key=written):
            name = path.relative_to(self.folder)
            if path.is_file() and not CACHES.search(str(name)):
                self.number(name)
                self.files[str(name)] = self.digest(path)

        lines = []
        for name, digest in self.files.items():
            if name not in before:
                lines.append(f"made {self.settled(name)} {digest}".rstrip())
            elif before[name] != digest:
                lines.append(f"changed {self.settled(name)} {digest}".rstrip())
        for name in before.keys() - self.files.keys():
            lines.append(f"deleted {self.settled(name)}")
        return sorted(lines)

    def number(self, name):
        """Adds a file, if it is a checkpoint that is new, to these, and its folder to the runs."""
        checkpoint = CHECKPOINT.fullmatch(name.name)
        if not checkpoint:
            return
        if checkpoint[1] not in self.ids:
            self.ids.append(checkpoint[1])
        if self.places.isdisjoint(name.parents):  # a run may hold checkpoints of others
            self.places.add(name.parent)
            self.runs.append(name.parent.name)

    def digest(self, path):
        """The beginning of the SHA1 of a file's contents, if they are the same each time."""
        if CHECKPOINT.fullmatch(path.name) or VARIABLE.search(str(path)):
            return ""
        text = path.read_bytes().decode("latin-1")  # which any bytes are
        return hashlib.sha1(self.settled(text).encode()).hexdigest()[:8]

    def settled(self, text):
        """A text without what differs each time: names of runs and folders, times, speeds."""
        text = text.replace(str(self.folder), "FOLDER")
        text = text.replace(str(self.checkout.path), "CHECKOUT")
        # The newest first, as its name may be that of an older one, with something appended.
        for number in range(len(self.runs), 0, -1):
            name = re.escape(self.runs[number - 1])
            text = re.sub(rf"(?<![\w-]){name}(?![\w-])", f"RUN{number}", text)
        for pattern, replacement in PASSING.items():
            text = re.sub(pattern, replacement, text)
        return text


def play(checkout, folder, prelude, commands):
    """Types the commands of a section; returns the result of each."""
    place = Place(checkout, folder)
    return [place.type(prelude, line, stdin) for line, stdin in commands]


def play_all(paths, prelude, sections):
    """The results of all commands in each of the checkouts: [{section: [result, ...]}, ...]."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        sides = [Checkout(path, Path(folder, f"bin{i}")) for i, path in enumerate(paths)]
        tasks = {}
        for name, commands in sections.items():
            for i, side in enumerate(sides):
                place = Path(folder, str(i), name.replace(" ", "-"))
                tasks[i, name] = pool.submit(play, side, place, prelude, commands)
        results = []
        for i in range(len(sides)):
            results.append({name: tasks[i, name].result() for name in sections})
        return results


def compare(old, new):
    """What differs between two results of a command: (field, old lines, new lines) of each."""
    differences = []
    for field in old:
        if old[field] != new[field]:
            only_old = tuple(line for line in old[field] if line not in new[field])
            only_new = tuple(line for line in new[field] if line not in old[field])
            differences.append((field, only_old, only_new))
    return differences


def show_differences(differing):
    """Prints each difference once, below the commands that have it: {command: differences}."""
    commands = {}
    for command, differences in differing.items():
        for difference in differences:
            commands.setdefault(difference, []).append(command)
    for (field, old, new), having in commands.items():
        print("\n".join(having))
        for line in old:
            print(f"    {field}, old: {line}")
        for line in new:
            print(f"    {field}, new: {line}")
        print()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="a folder that holds main.py")
    parser.add_argument("new", help="another")
    parser.add_argument("--only", default="", help="play the sections whose names contain this")
    given = parser.parse_args()
    prelude, sections = read_commands(COMMANDS)
    sections = {name: commands for name, commands in sections.items() if given.only in name}
    old, new = play_all([given.old, given.new], prelude, sections)

    count = 0
    differing = {}
    for name, commands in sections.items():
        for i, (line, _) in enumerate(commands):
            count += 1
            differences = compare(old[name][i], new[name][i])
            if differences:
                differing[f"{name} {i + 1}: {line}"] = differences
    show_differences(differing)
    verdict = f"{len(differing)} differ" if differing else "same"
    print(f"{count} commands: {verdict}")
    return int(len(differing) > 0)


if __name__ == "__main__":
    sys.exit(main())

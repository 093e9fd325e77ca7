"""Flags: their table, the types of their values, the parser, and YAML files of flags."""

import argparse
import difflib
import math
import re
from pathlib import Path
from typing import NamedTuple

from support.cli import HERE, UsageError, explain_errors, utf8
from support.files import user_path

# ---- The table ----------------------------------------------------------------------------------


class Flag(NamedTuple):
    """A row of the table of flags."""

    default: object
    type: object  # turns what is typed into the value, or raises ValueError; bool: a switch
    help: str
    required: bool = False


class FlagTable(dict):
    """main.py's flags, {group: {name: Flag}}: each of its sections adds those that it uses.

    Where a default of None stands for a value that depends on other flags, the help says so.
    """

    @property
    def rows(self):
        """All flags, {name: Flag}."""
        return {name: flag for group in self.values() for name, flag in group.items()}

    @property
    def defaults(self):
        """{name: default}."""
        return {name: flag.default for name, flag in self.rows.items()}

    def names(self, groups):
        """The names of the flags in these groups, a string of their names."""
        return [name for group in groups.split() for name in self[group]]


# Groups, in the order of --help. Those in IDENTITY identify a run: another value is another run.
# With --identifier, another value in `training` begins a branch, and one in INIT is an error.
# `session` may change whenever a run is resumed. All in RECORDED are saved with a run.
INIT = "data model init"
IDENTITY = f"{INIT} training"
RECORDED = f"{IDENTITY} session"
FLAGS = FlagTable({group: {} for group in f"{RECORDED} sampling mode command".split()})

# ---- Types of values ----------------------------------------------------------------------------

MAX_INT32 = 2**31 - 1


def number(kind, least, most=math.inf):
    """An argparse type: a finite int or float from `least` to `most`, inclusive."""

    def convert(text):
        value = kind(text)
        if least <= value <= most and value < math.inf:  # nan fails the first comparison
            return value
        limit = f" and at most {most}" if most < math.inf else ""
        raise argparse.ArgumentTypeError(f"must be at least {least}{limit}, not {text}")

    convert.__name__ = "whole number" if kind is int else "number"  # for argparse's messages
    convert.metavar = "N" if kind is int else "X"  # for --help
    return convert


SIZE = number(int, 1, MAX_INT32)
COUNT = number(int, 0, MAX_INT32)
NONNEGATIVE = number(float, 0)
FRACTION = number(float, 0, 1)


def one_of(choices):
    """A flag's type: one of these words, in upper or lower case."""

    def convert(text):
        if text.lower() in choices:
            return text.lower()
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(choices)}, not {text}")

    convert.metavar = f"{{{','.join(choices)}}}"
    return convert


def nonempty(text):
    """A flag's type: a text that is not empty."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("is empty: give it a value, or leave it out")
    return text


def path_name(text):
    """A flag's type: a path, see user_path."""
    return user_path(nonempty(text))


path_name.metavar = "PATH"


# ---- The command line and YAML files ------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UsageErrors; argparse would print its whole usage.

    It takes --num-iters, as other programs spell it, for --num_iters, and --untie=False for
    --no-untie.
    """

    def __init__(self, hints=None, **options):
        """hints: extras/features/hints.py, or None; options: of ArgumentParser."""
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )
        self.aliases = hints.ALIASES if hints else {}
        self.not_here = hints.NOT_HERE if hints else {}

    def add_flags(self, flags, title=None):
        """Adds flags, {name: Flag}, as a group if they have a title.

        A flag that is not typed is absent from what the parser returns: load_dataset and
        main.resolve_flags know the defaults.
        """
        group = self.add_argument_group(title) if title else self
        for name, flag in flags.items():
            options = {"type": flag.type, "metavar": getattr(flag.type, "metavar", "TEXT")}
            if flag.type is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif flag.default == []:
                options |= {"nargs": "+", "action": "extend"}  # `--text a --text b` names both
            options["default"] = argparse.SUPPRESS
            help_text = flag.help
            if str(flag.default) not in ("None", "False", "[]"):
                help_text += f" (default: {flag.default})"
            group.add_argument(f"--{name}", help=help_text, required=flag.required, **options)
            for other in self.aliases.get(name, "").split():
                group.add_argument(f"--{other}", dest=name, help=argparse.SUPPRESS, **options)

    def flag_names(self):
        """{a flag, or its name in another program: the flag}, without the dashes."""
        return {name[2:]: action.dest for name, action in self._option_string_actions.items()}

    def error(self, message):
        hint = "--help lists all flags"
        if message.endswith("one argument"):
            hint += "; a value that begins with - is typed after =, like --stop=-"
        raise UsageError(f"{message} ({hint})")

    def parse_args(self, args):
        values, unknown = self.parse_known_args([*map(self.spelled_here, args)])
        if unknown:
            words = [word for word in unknown if word.startswith("-")] or unknown[:1]
            hints = dict.fromkeys([*map(self.hint, words), "--help lists all flags"])
            hint = "; ".join(filter(None, hints))
            raise UsageError(f"unrecognized arguments: {' '.join(words)} ({hint})")
        return values

    def hint(self, word):
        """What to do instead of a word that no flag takes; "" if nothing is known."""
        name = word.partition("=")[0].lstrip("-").removeprefix("no-").lower()
        for names, hint in self.not_here.items():
            if name in names.split():
                return hint
        if not word.startswith("-") and "=" not in word:
            return (
                "no flag takes it: a switch has no value, a text with blanks needs quotes, and "
                "--identifier names a checkpoint: a run, latest or best"
            )
        names = self.flag_names()
        for similar in difflib.get_close_matches(name, names, 1, cutoff=0.7):
            return f"--{names[similar]}?"
        return ""

    def spelled_here(self, argument):
        """An argument in this parser's spelling: with underscores, and --no-FLAG for =false."""
        actions = self._option_string_actions
        # Without the \r of a script with Windows' line ends.
        name, equals, value = argument.removesuffix("\r").partition("=")
        dashed = re.sub("^[–—]-?", "--", name)  # as word processors write them
        if dashed in actions:
            name = dashed
        if re.fullmatch("--[a-z][a-z0-9_-]*", name):
            name = "--" + name[2:].replace("-", "_")
            name = name.replace("--no_", "--no-")
        if isinstance(actions.get(name), argparse.BooleanOptionalAction):
            if value.lower() == "false":
                return f"--no-{name[2:]}"
            if value.lower() == "true":
                return name
        return f"{name}{equals}{value}"


def arguments_of(values):
    """{flag: value} as command-line arguments. Raises ValueError for a list within a value."""
    arguments = []
    for name, value in values.items():
        is_list = isinstance(value, list) and FLAGS.defaults.get(name) == []
        for element in value if is_list else [value]:
            if isinstance(element, (list, dict)):  # YAML's aliases could make it a billion words
                raise ValueError(f"{name} has a list or a mapping instead of a value")
            if isinstance(element, bool):
                arguments.append(f"--{name}" if element else f"--no-{name}")
            elif element is not None:
                arguments.append(f"--{name}={element}")  # with =: a value may look like a flag
    return arguments


def check_values(values):
    """Raises an exception (of any type) if a value could not have come from a command line."""
    rows = FLAGS.rows
    for name, value in values.items():
        if name not in rows:
            raise ValueError(f"the code that saved it had --{name:.50}: use that")
        default, convert, *_ = rows[name]
        if value == default and type(value) is type(default):  # 32.0 is equal to 32
            continue
        if convert is bool:
            convert = {"True": True, "False": False}.__getitem__
        elements = value if default == [] else [value]
        if elements != [convert(str(element)) for element in elements]:
            raise ValueError(f"its {name} is of another type")


def parse_command_line(parser, arguments):
    """The flags set on the command line, by --config or by --preset, {flag: value}.

    Later ones count: the file's preset, the file, the command line's preset, the command line.
    """
    command_line_flags = vars(parser.parse_args(arguments))
    file_flags = {}
    if "config" in command_line_flags:
        file_flags = read_config(parser, command_line_flags["config"])
        if "text" in command_line_flags or "dataset" in command_line_flags:
            for name in ("dataset", "text", "valid_text", "test_text"):
                file_flags.pop(name, None)
    explicit_flags = {}
    for given in (file_flags, command_line_flags):
        if "preset" in given:
            explicit_flags |= read_config(parser, f"presets/{given['preset']}")
        explicit_flags |= given
    modes = []
    for name, value in explicit_flags.items():
        if name in FLAGS["mode"] and value is not False:
            modes.append(name)
    if len(modes) > 1:
        raise UsageError(f"--{modes[1]}: not allowed with --{modes[0]}: give one of them")
    return explicit_flags


MAX_YAML_BYTES = 1 << 20  # bytes of a --config, or of a file of cases
RECIPES = HERE / "extras" / "recipes"  # the files that --config finds by name


def read_config(parser, name):
    """The flags in a YAML file or a recipe, as if passed on the command line: later ones count."""
    path = Path(user_path(name))
    if not path.is_file():
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        recipes = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        recipes = recipes or f"missing: {RECIPES}"
        raise UsageError(f"--config {name}: no such file; the recipes are {recipes}")
    with explain_errors(f"--config {name} must be a YAML file of flags like dim: 8"):
        flag_names = parser.flag_names()
        values = {}
        for key, value in (read_yaml(path) or {}).items():
            section = value if isinstance(value, dict) else {key: value}  # any name for a section
            for flag, element in section.items():
                flag_name = str(flag).replace("-", "_")
                flag_name = flag_names.get(flag_name, flag_name)
                values[flag_name] = element
        arguments = [utf8(argument) for argument in arguments_of(values)]
        flags = vars(parser.parse_args(arguments))
        if "config" in flags:
            raise ValueError("it names another file")
        return flags


def read_yaml(path, loader="SafeLoader"):
    """The content of an untrusted YAML file; loader: a class of PyYAML.

    Raises OSError, and ValueError or what PyYAML raises if the file is malformed.
    """
    import yaml

    if path.stat().st_size > MAX_YAML_BYTES:
        raise ValueError(f"it is longer than {MAX_YAML_BYTES:,} bytes")
    return yaml.load(path.read_text("utf-8"), getattr(yaml, loader))


def get_values(namespace, names):
    """These attributes of an object, {name: value}."""
    return {name: getattr(namespace, name) for name in names}


# {flag: it has no effect without one of these flags}
NEEDS_ONE_OF = {
    "min_lr": ["lr_schedule"],
    "lr_cooldown": ["lr_schedule"],
    "valid_fraction": ["text"],
    "text_field": ["text", "test_text"],
    "lora_alpha": ["lora_rank"],
    "teacher_weight": ["teacher"],
    "teacher_temperature": ["teacher"],
    "draft": ["prompt", "inference"],
    "max_tokens": ["prompt", "inference"],
    "quantize": ["prompt", "inference", "evaluate"],
    "eval_stride": ["evaluate", "eval_test"],
    "patience": ["steps_per_eval"],
    "eval_tokens": ["steps_per_eval"],
    "sample_prompt": ["sample_tokens"],
}
OFF = (None, False, 0, [], "constant")  # values with which a flag asks for nothing


def ineffective_flag_notices(flags):
    """Yields a line for each explicit flag that has no effect without another one."""
    for name, others in NEEDS_ONE_OF.items():
        has_effect = any(getattr(flags, other) not in OFF for other in others)
        if name in flags.explicit and not has_effect:
            yield f"--{name} has no effect without --{' or --'.join(others)}."

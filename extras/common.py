"""What the programs in extras/ share: how they begin, and how they find a checkpoint.

    python -m extras.NAME --help     what each of them does

Each has a few flags of its own beside some of main.py's, which mean the same here.
"""

import fnmatch

import main
from support.cli import command, extra, run_program
from support.flags import FLAGS, Flag, Parser, get_values, nonempty
from support.runs import list_checkpoints

# A flag that takes several names, for select_checkpoints.
IDENTIFIERS = Flag(
    [], nonempty, "SHA1 prefixes, run names, latest, best, or patterns of run names (default: all)"
)


def make_parser(name, doc, *flags, **program_flags):
    """The command-line parser of the program extras.<name>.

    doc: the docstring that --help shows; flags: the names of those flags of main.py that it takes;
    program_flags: flags of its own, {name: Flag}.
    """
    parser = Parser(extra("hints"), prog=f"python -m extras.{name}", description=doc)
    rows = FLAGS.rows
    parser.add_flags({flag: rows[flag] for flag in ("save_dir", *flags)} | program_flags)
    parser.set_defaults(**{flag: row.default for flag, row in program_flags.items()})
    return parser


def read_flags(parser, arguments):
    """The flags of a command line, all others of main.py with their defaults, as a Namespace.

    Makes the device of --gpu the default.
    """
    flags = main.resolve_flags(vars(parser.parse_args(arguments)))
    main.use_device(flags.gpu)
    return flags


def flags_of_run(flags, checkpoint):
    """The flags of a checkpoint's run; its text lies where the command's `flags` say."""
    names = {"save_dir", "data_dir", "mirror"} & {*flags.explicit}
    return main.resolve_flags(get_values(flags, names), checkpoint.flags)


def select_checkpoints(flags):
    """The checkpoints in --save_dir, newest first, or those that --identifier names.

    A pattern of run names stands for the newest checkpoint of each run that it matches.
    """
    checkpoints = list_checkpoints(flags.save_dir, warn=True)
    if checkpoints and not flags.identifier:
        return checkpoints
    runs = dict.fromkeys(checkpoint.folder.name for checkpoint in checkpoints)  # unique
    named = {}  # {path: its checkpoint}
    for identifier in flags.identifier or ["latest"]:  # there is none, which is said
        for name in fnmatch.filter(runs, identifier) or [identifier]:
            checkpoint = main.find_checkpoint(flags, name)
            named[checkpoint.weights_path] = checkpoint
    return list(named.values())


def start(name, function):
    """Runs the program extras.<name> and exits; `function` takes its arguments.

    A mistake or a failure is one line on stderr, as in main.py.
    """
    run_program(command(f"extras.{name}")(function))

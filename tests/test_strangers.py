"""Folders from strangers: whatever a checkpoint says, and wherever a link leads, nothing is harmed.

All SHA1s are right here: who crafts a checkpoint computes them. Each is skipped, or its use ends in
one line; it never ends another run.
"""

import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import main
import numpy as np
import pytest
from conftest import TINY, run
from main import mx
from soak import ODD, split_safetensors, write_metadata
from test_checkpoints import choose, listed, make_run, save, train_and_save

import datasets
from datasets import CharTokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one checkpoint of a run of two steps, and the command that made it."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog\n" * 30)
    line = [*map(str, ["--text", text, *TINY, "--num_iters", 2])]
    run(*line, "--save_dir", folder / "lm")
    [checkpoint] = main.list_checkpoints(folder / "lm")
    return SimpleNamespace(line=line, checkpoint=checkpoint, folder=folder / "lm")


@pytest.fixture
def crafted(trained, tmp_path):
    """A copy of that folder, whose checkpoint a test edits: see Crafted."""
    return Crafted(trained, tmp_path / "lm")


class Crafted:
    """The only checkpoint of a run, and ways of changing it with the right SHA1s."""

    def __init__(self, trained, folder):
        shutil.copytree(trained.folder, folder)
        self.save_dir = folder
        self.line = [*trained.line, "--save_dir", str(folder)]
        self.folder = folder / trained.checkpoint.run
        self.id = trained.checkpoint.id
        self.path = self.folder / f"{self.id}.metadata"
        self.record = trained.checkpoint.record()

    def set_record(self, record):
        """Replaces the record, by JSON data or by its text."""
        text = record if isinstance(record, str) else json.dumps(record)
        header, arrays = split_safetensors(self.path.read_bytes())
        write_metadata(self.path, text, arrays, header)

    def set_arrays(self, **changes):
        """Replaces arrays of the .metadata; None removes one."""
        state = {**mx.load(str(self.path), format="safetensors")} | changes
        state = {name: array for name, array in state.items() if array is not None}
        mx.eval(state)
        mx.save_safetensors(str(self.path), state, {"format": "mlx"})
        shutil.move(f"{self.path}.safetensors", self.path)
        self.set_record(self.record)

    def set_tokenizer(self, data):
        """Replaces the tokenizer, by JSON data or by its text."""
        text = data if isinstance(data, str) else json.dumps(data)
        self.set_arrays(tokenizer=mx.array(np.frombuffer(text.encode(), np.uint8)))

    def commands(self, *names):
        """Runs commands that meet the checkpoint; returns {name: exit status}."""
        use = ["--save_dir", str(self.save_dir)]
        known = {
            "list": ["--list", *use],
            "prompt": ["--prompt", "the fox", "--max_tokens", "20", "--top_k", "0", *use],
            "evaluate": ["--evaluate", "valid", *use],
            "resume": ["--num_iters", "4", *use],
            "rerun": [*self.line, "--num_iters", "4"],
            "new": [*self.line, "--seed", "5", "--num_iters", "3"],
        }
        statuses = {}
        for name in names or known:
            statuses[name] = main.main(known[name])
            assert statuses[name] in (0, 1, 2), name
        return statuses


def lines_of(capsys):
    """What was printed on stderr since the last time, by lines."""
    return capsys.readouterr().err.splitlines()


# ---- Records ------------------------------------------------------------------------------------

FIELDS = [each.name for each in dataclasses.fields(main.Checkpoint) if each.name != "folder"]
WRONG = [
    None,
    "x",
    "",
    -1,
    -1.0,
    True,
    [],
    {},
    [[]],
    {"a": {}},
    {"": None},
    {"teacher": []},
    {"text": [5]},
    [[1, 2, 3]],
    [["a", "b"]],
    math.inf,
    math.nan,
    10**400,
    "[" * 9999,
]
# Of which some are possible.
HARMLESS = ("command", "flags", "recent_loss", "sources", "scores", "uses", "versions")


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_may_be_wrong(crafted, name, capsys):
    """What is listed has the type that it must have; all else is skipped with one line."""
    for value in WRONG:
        crafted.set_record(crafted.record | {name: value})
        found = main.list_checkpoints(crafted.save_dir, warn=True)
        warnings = lines_of(capsys)
        assert len(found) + len(warnings) == 1, value
        if found:
            assert type(value) is type(crafted.record[name])
            assert name in HARMLESS, value
            crafted.commands("list")
            capsys.readouterr()


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_may_be_missing(crafted, name, capsys):
    less = {key: value for key, value in crafted.record.items() if key != name}
    crafted.set_record(less)
    if name == "format_version":
        less["format_version"] = None
    assert main.list_checkpoints(crafted.save_dir, warn=True) == []
    assert len(lines_of(capsys)) == 1


@pytest.mark.parametrize("field, value", ODD)
def test_odd_values_end_no_command_with_a_traceback(crafted, field, value):
    """Of those that use the checkpoint; for another run's, see below."""
    outer, _, inner = field.partition(".")
    value = crafted.record[outer] | {inner: value} if inner else value
    if outer in crafted.record or outer in ("run", "folder"):
        crafted.set_record(crafted.record | {outer: value})
    statuses = crafted.commands("list", "prompt", "resume")
    assert statuses["list"] == 0


TEXTS = [
    "",
    "{",
    "5",
    "null",
    "[1]",
    '"x"',
    "NaN",
    "[" * 200_000,
    '{"a":' * 100_000,
    '{"format_version": 3}',
    '{"format_version": ' + "9" * 5000 + "}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_records_that_are_none(crafted, text):
    crafted.set_record(text)
    assert crafted.commands("list", "prompt") == {"list": 0, "prompt": 2}


HEADERS = [
    b"",
    b"{",
    b"[]",
    b"5",
    b"\xff",
    b"[" * 10**5,
    b'{"__metadata__": 5}',
    b'{"__metadata__": null}',
    b'{"__metadata__": {"record": 5}}',
    b'{"__metadata__": {"record": "\\ud800"}}',
    b'{"__metadata__": {"record": "{}", "record_sha1": 5, "sha1": 5}}',
]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("length", [None, 2**63, 2**64 - 1, 0])
def test_headers_that_are_none(crafted, header, length):
    length = len(header) if length is None else length
    crafted.path.write_bytes(length.to_bytes(8, "little") + header)
    assert crafted.commands("list", "prompt") == {"list": 0, "prompt": 2}


def test_a_time_to_come_ends_no_other_run(crafted):
    """The latest time that a record may have: what is saved after it can still be read."""
    latest = math.nextafter(1e11, 0)
    for saved in (latest, math.nextafter(1e15, 0)):
        crafted.set_record(crafted.record | {"saved": saved})
        line = [*crafted.line, "--seed", "5", "--steps_per_save", "1"]
        for num_iters in ("2", "4", "6"):
            assert main.main([*line, "--num_iters", num_iters]) == 0
        other = [each for each in main.list_checkpoints(crafted.save_dir) if each.id != crafted.id]
        assert other[0].iteration == 6
        shutil.rmtree(other[0].folder)


def test_progress_of_a_long_run_can_be_read(tmp_path):
    """A million tokens a second, for a month."""
    run = make_run(tmp_path)
    run.tokens_seen = 3 * 10**12
    run.seconds = 3e6
    run.recent_loss = -1e-7  # by rounding
    assert listed(tmp_path) == [] != [save(run)] == listed(tmp_path)


def plant_all_odd(folder, record, source):
    """Puts checkpoints into a folder, one with each odd value."""
    folder.mkdir()
    header, arrays = split_safetensors(source.read_bytes())
    for i, (field, value) in enumerate(ODD):
        checkpoint_id = f"{i:040x}"
        outer, _, inner = field.partition(".")
        if inner:
            value = record[outer] | {inner: value}
        text = json.dumps(record | {"id": checkpoint_id, outer: value})
        write_metadata(folder / f"{checkpoint_id}.metadata", text, arrays, header)
        (folder / f"{checkpoint_id}.safetensors").write_bytes(b"")


def test_an_odd_record_ends_no_save_of_another_run(tmp_path):
    run = make_run(tmp_path, keep=1)
    save(run)
    record = choose(tmp_path).checkpoint.record()
    plant_all_odd(tmp_path / "odd", record, run.folder / f"{run.checkpoint_id}.metadata")
    train_and_save(run, 3)
    main.prune(run)
    assert [each.iteration for each in main.list_run(run.folder)] == [3]


def test_an_odd_record_ends_no_other_command(crafted):
    plant_all_odd(crafted.save_dir / "odd", crafted.record, crafted.path)
    name = crafted.folder.name
    use = ["--identifier", name, "--save_dir", str(crafted.save_dir)]
    assert main.main([*use, "--prompt", "a"]) == 0
    assert main.main([*use, "--num_iters", "3"]) == 0
    assert crafted.commands("list", "new") == {"list": 0, "new": 0}


# ---- Models, tokenizers, arrays -----------------------------------------------------------------

CONFIGS = [
    {"num_heads": 0, "head_dim": None},
    {"num_kv_heads": 0, "head_dim": None},
    {"dim": 2**31 - 1},
    {"dim": 32},
    {"head_dim": 3},
    {"head_dim": 4},
    {"num_blocks": 10**9},
    {"num_blocks": 3},
    {"mlp_dim": 2**31 - 1},
    {"vocab_size": 2**31 - 1},
    {"vocab_size": 256},
    {"context_size": 2**31 - 1},
    {"rope_theta": math.nan},
    {"rope_theta": math.inf},
    {"rope_theta": 10**400},
    {"norm_eps": "x"},
    {"norm_eps": 2**63},
    {"rope_scaling": []},
    {"rope_scaling": {}},
    {"rope_scaling": [1, 2, 3, 10**400]},
    {"rope_scaling": [0, 0, 0, 0]},
    {"mlp": "swiglu"},
    {"untie": True},
    {"qk_norm": True},
    {"ngrams": 3},
    {"ngrams": 0},
    {"ngrams": 2**31 - 1, "ngram_rows": 2**31 - 1},
    {"ngram_rows": 0},
    {"conv_size": 3},
    {"conv_size": 2**31 - 1},
    {"embedding_scale": "x"},
    {"embedding_scale": 10**400},
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy divides by zero
@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_models_that_cannot_be(crafted, change):
    crafted.set_record(crafted.record | {"config": crafted.record["config"] | change})
    statuses = crafted.commands("list", "prompt", "resume")
    assert statuses["list"] == 0


def test_weights_that_were_saved_again_since_they_were_listed(crafted):
    [listed_before] = main.list_checkpoints(crafted.save_dir)
    saved = crafted.record["saved"] + 1
    crafted.set_record(crafted.record | {"saved": saved})
    assert listed_before.open().checkpoint.saved == saved


def test_a_model_of_a_newer_program(crafted, capsys):
    config = crafted.record["config"] | {"num_experts": 8}
    crafted.set_record(crafted.record | {"config": config})
    main.main(["--list", "--save_dir", str(crafted.save_dir)])
    assert "this program's models have no 'num_experts'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--prompt", "a"], ["--prompts_file", "FILE"]])
def test_a_huge_context_takes_no_memory(crafted, words):
    """Only what was read has keys and values."""
    config = crafted.record["config"] | {"context_size": 2**24}  # 2 GiB of them for one text
    crafted.set_record(crafted.record | {"config": config})
    prompts = crafted.folder / "prompts.txt"
    prompts.write_text("a\nabc\n")
    words = [str(prompts) if word == "FILE" else word for word in words]
    mx.reset_peak_memory()
    assert main.main([*words, "--max_tokens", "3", "--save_dir", str(crafted.save_dir)]) == 0
    assert mx.get_peak_memory() < 2**26


TOKENIZER_DATA = [
    {},
    [],
    5,
    "x",
    {"kind": "nothing"},
    {"kind": ["byte"]},
    {"kind": "../../../victim/x/y"},
    {"kind": "/victim"},
    {"kind": "bpe", "vocabulary": "{}"},
    {"kind": "char", "vocabulary": "a"},
    {"kind": "char", "vocabulary": 5},
    {"kind": "word", "vocabulary": ["<eos>", "<unk>"]},
    {"kind": "word", "vocabulary": ["a"]},
    {"kind": "char", "vocabulary": "".join(map(chr, range(500, 30_000)))},
]


@pytest.mark.parametrize("data", TOKENIZER_DATA, ids=lambda data: str(data)[:40])
def test_tokenizers_that_cannot_be(crafted, data):
    """More ids than the model has would be read from beyond its embeddings: MLX does not check."""
    before = {*crafted.save_dir.parent.iterdir()}
    crafted.set_tokenizer(data)
    crafted.commands("prompt", "evaluate", "resume")
    assert {*crafted.save_dir.parent.iterdir()} == before


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(crafted, capsys):
    crafted.set_tokenizer(CharTokenizer("".join(map(chr, range(500, 30_000)))).to_dict())
    assert crafted.commands("prompt", "resume") == {"prompt": 1, "resume": 1}
    assert "more ids than its model" in capsys.readouterr().err


def test_a_text_of_more_tokens_than_the_model_has(crafted, capsys):
    """Its own tokenizer has few, but its flags name another, by which the text is read."""
    crafted.record["config"] = crafted.record["config"] | {"vocab_size": 8}
    crafted.set_tokenizer(CharTokenizer("ab").to_dict())
    assert crafted.commands("resume", "evaluate") == {"resume": 1, "evaluate": 1}
    assert "fewer embeddings than the text has tokens" in capsys.readouterr().err


def test_flags_of_strangers_do_nothing_to_the_terminal(crafted, capsys):
    """They are listed where they tell runs apart, and when a run is resumed."""
    assert crafted.commands("new") == {"new": 0}
    escape = "\x1b]0;owned\x07"
    crafted.set_record(crafted.record | {"flags": crafted.record["flags"] | {"teacher": escape}})
    capsys.readouterr()
    assert crafted.commands("list", "resume", "rerun")["list"] == 0
    out, err = capsys.readouterr()
    assert "owned" in out
    assert "\x1b" not in out + err


ARRAYS = [
    {"tokenizer": None},
    {"tokenizer": mx.array(5.0)},
    {"tokenizer": mx.array(2**31, mx.uint32)},
    {"tokenizer": mx.zeros((2, 2))},
    {"perm": None},
    {"perm": mx.array([10**9] * 3, mx.int32)},
    {"perm": mx.array([-1])},
    {"perm": mx.zeros((2, 2))},
    {"perm": mx.zeros(0)},
    {"optimizer": mx.array(1.0)},
    {"optimizer.step": None},
    {"optimizer.step": mx.array([1.0, 2.0])},
    {"optimizer.step.x": mx.array(1.0)},
    {"0": mx.array(1.0)},
    {"": mx.array(1.0)},
    {"..": mx.array(1.0)},
    {"perm.x": mx.array(1.0)},
    {"weights": mx.array(1.0)},
    {"weights.x": mx.array(1.0)},
]


@pytest.mark.parametrize("change", ARRAYS, ids=str)
def test_arrays_that_cannot_be(crafted, change):
    crafted.set_arrays(**change)
    crafted.commands("list", "prompt", "resume")


def test_arrays_that_share_their_bytes(tmp_path):
    """A small file could fill the memory."""
    header = {}
    for i in range(1000):
        header[str(i)] = {"dtype": "U8", "shape": [1000], "data_offsets": [0, 1000]}
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(1000))
    with open(path, "rb") as file, pytest.raises(main.UNREADABLE):
        main.load_arrays(file)


@pytest.mark.parametrize("flag_name", ["teacher", "init_from"])
@pytest.mark.parametrize("place", ["/nowhere", "0" * 40, "", "../..", "a\0b", "x" * 9999])
def test_models_that_it_says_it_needs(crafted, flag_name, place):
    values = crafted.record["flags"] | {flag_name: place, "lora_rank": 2, "lora_alpha": 4.0}
    uses = {flag_name: [place, "0" * 40]}
    crafted.set_record(crafted.record | {"flags": values, "uses": uses})
    crafted.commands("list", "prompt", "resume")


# ---- Links and pipes ----------------------------------------------------------------------------


class Hung(BaseException):
    """Nothing in the program handles it."""


@contextlib.contextmanager
def seconds_at_most(seconds):
    """Ends a block that waits for a pipe's other end."""

    def hang(*_):
        raise Hung

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_link_to_a_run_is_none(crafted, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "run").symlink_to(crafted.folder)
    assert listed(tmp_path / "linked") == []


@pytest.mark.parametrize("suffix", [".metadata", ".safetensors"])
def test_a_link_to_a_file_is_none(crafted, tmp_path, suffix):
    path = crafted.path.with_suffix(suffix)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert crafted.commands("list", "prompt", "new")["prompt"] != 0


def test_links_that_lead_nowhere(crafted):
    """Links to a RAM disk dangle after a reboot."""
    for path in (crafted.path, crafted.path.with_suffix(".safetensors")):
        path.unlink()
        path.symlink_to("/nowhere/at/all")
    assert crafted.commands("list", "prompt", "rerun") == {"list": 0, "prompt": 2, "rerun": 0}


def test_no_link_is_written_through(crafted, tmp_path):
    """The log, and names that a save might use."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("log.jsonl", ".0123456789abcdef.new", f"{'1' * 40}.metadata"):
        path = crafted.folder / name
        path.unlink(missing_ok=True)
        path.symlink_to(victim)
    line = ["--steps_per_report", "1", "--steps_per_save", "1"]
    assert main.main([*crafted.line, *line, "--num_iters", "5"]) == 0
    assert victim.read_text() == "precious"
    assert len(list(crafted.folder.glob("*.safetensors"))) == 4


@pytest.mark.parametrize("name", ["metadata", "safetensors", "log.jsonl"])
def test_nobody_waits_at_a_pipe(crafted, name):
    path = crafted.folder / name
    if name != "log.jsonl":
        path = crafted.path.with_suffix(f".{name}")
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with seconds_at_most(20):
        statuses = crafted.commands("list", "prompt", "new")
        assert statuses["list"] == statuses["new"] == 0
        line = ["--steps_per_report", "1", "--num_iters", "4"]
        assert main.main([*crafted.line, *line]) in (0, 1)


def test_a_folder_in_the_place_of_a_file(crafted):
    for suffix in (".metadata", ".safetensors"):
        path = crafted.path.with_suffix(suffix)
        path.unlink()
        path.mkdir()
    assert crafted.commands("list", "prompt", "new") == {"list": 0, "prompt": 2, "new": 0}


LOGS = [
    "[]\n",
    "5\n",
    "\xff\n",
    "\0" * 99,
    "[" * 10**5 + "\n",
    '{"iteration": "x"}\n',
    '{"iteration": 1}\n',
    '{"iteration": 1, "split": []}\n',
    '{"iteration": 1e999, "split": "train"}\n',
]


@pytest.mark.parametrize("content", LOGS, ids=lambda content: content[:20])
def test_odd_logs_end_nothing(crafted, content):
    (crafted.folder / "log.jsonl").write_bytes(content.encode("latin-1"))
    line = ["--steps_per_report", "1", "--num_iters", "4"]
    assert main.main([*crafted.line, *line]) == 0
    rows = (crafted.folder / "log.jsonl").read_text("latin-1").splitlines()[-2:]
    assert [json.loads(row)["iteration"] for row in rows] == [3, 4]


def test_a_log_without_line_ends_is_not_read_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"iteration": 1, "split": "train"}\n')
        file.truncate(1 << 27)
    tracemalloc.start()
    try:
        assert [row["iteration"] for _, row in main.read_log(path)] == [1]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


# ---- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["\x1b]0;owned\x07", "a\nb", ".hidden", "-x"])
def test_names_that_are_no_runs_are_not_shown(crafted, name, capsys):
    crafted.folder.rename(crafted.save_dir / name)
    assert crafted.commands("list") == {"list": 0}
    out, err = capsys.readouterr()
    assert name not in out
    assert "Skipping" in err
    assert err.count("\n") == 1
    assert err.strip().isprintable()


def test_a_copy_whose_name_has_a_space_is_not_passed_over_silently(crafted, capsys):
    """File managers make such names."""
    shutil.copytree(crafted.folder, crafted.save_dir / "a copy")
    assert crafted.commands("list") == {"list": 0}
    assert "Skipping 'a copy': rename it" in capsys.readouterr().err


# ---- Tokenizers and Hugging Face folders --------------------------------------------------------


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    line = [*trained.line, "--mlp", "swiglu", "--save_dir", folder.parent / "lm"]
    assert main.main([*map(str, line)]) == 0
    line = ["--export", folder, "--save_dir", folder.parent / "lm"]
    assert main.main([*map(str, line)]) == 0
    return folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("target", ["a pipe", "/dev/zero"])
def test_folders_with_other_than_files(trained, exported, tmp_path, name, target, capsys):
    """Such a device has no end."""
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    (folder / name).unlink()
    if target == "a pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(target)
    line = ["--init_from", folder, *trained.line[:2], "--num_iters", 1, "--save_dir", tmp_path]
    with seconds_at_most(20), limited_memory():
        assert main.main([*map(str, line)]) == 2
    assert f"{name} is not a regular file" in capsys.readouterr().err


@contextlib.contextmanager
def limited_memory():
    """Lets no more than 4 GiB be read, where a process can limit itself."""
    if sys.platform != "linux":
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 30), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_tokenizer_that_never_ends(trained, tmp_path, capsys):
    line = [*trained.line, "--tokenizer", "/dev/zero", "--save_dir", str(tmp_path)]
    with seconds_at_most(20), limited_memory():
        assert main.main(line) == 2
    assert "zero is not a regular file" in capsys.readouterr().err


# ---- The screen ---------------------------------------------------------------------------------

ESCAPE = "\x1b]0;owned\x07"


def test_a_prepared_text_moves_no_cursor(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(f"{ESCAPE} the fox\n" * 99)
    datasets.main(["--text", str(text), "--save_dir", str(tmp_path / "lm")])
    out = capsys.readouterr().out
    assert "]0;owned" in out
    assert not datasets.CONTROLS.search(out)


def test_unknown_characters_move_no_cursor(capsys):
    main.name_unknown(CharTokenizer("a"), ESCAPE)
    assert not datasets.CONTROLS.search(capsys.readouterr().err)

"""Sampling by step.c, against main.py's own Reader and sampling in plain MLX.

And whose model is sampled: what was edited, or replaced while the program runs, is not step.c's.
"""

import functools
import json
import re
import shutil
import sys

import anchors
import main
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY, copy_program, flags, make_model, run, run_folder, run_folders
from mlx.utils import tree_map

from extras.features import fast
from extras.features.decode import BatchDecoder, SpeculativeDecoder
from support.cli import UsageError
from support.code import EDITED_NAMES, LOADED_SOURCES

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None or main.fast is None,
    reason="step.c is for CPUs under Linux, where there is a compiler",
)

PlainReader = fast.REPLACED.get("Reader")


@pytest.fixture
def step():
    from extras.features import step

    assert step.library, "it was compiled"
    return step


# ---- Logits -------------------------------------------------------------------------------------
SHAPES = [
    dict(),
    dict(mlp="gelu", num_blocks=3),
    dict(mlp="swiglu", mlp_dim=70),
    dict(num_kv_heads=4),
    dict(num_heads=6, num_kv_heads=1, dim=36, vocab_size=101),
    dict(qk_norm=True, untie=True),
    dict(qkv_bias=True),
    dict(rope_theta=500.0, rope_scaling=[8.0, 1.0, 4.0, 64]),
    dict(norm_eps=0.1),
    dict(head_dim=6, dim=22),  # as imported models have: the heads are wider than the model
    dict(head_dim=34, num_kv_heads=1),
    dict(num_heads=1, num_kv_heads=1, num_blocks=1, dim=2, mlp_dim=1, vocab_size=1),
    dict(dim=256, head_dim=128, mlp_dim=300, qk_norm=True, untie=True, qkv_bias=True, mlp="swiglu"),
]


def assert_same(logits, expected):
    """The largest difference is 1e-5 of the largest logit."""
    expected = np.array(expected)
    assert logits.shape == expected.shape
    assert abs(logits - expected).max() <= 1e-5 * abs(expected).max()


@pytest.mark.parametrize("values", SHAPES, ids=str)
def test_logits_are_those_of_plain_mlx(values, step):
    """Of a text in parts of one token and of many; more than memory was taken for at first."""
    model = make_model(context_size=1024, **values)
    text = np.random.default_rng(1).integers(model.config.vocab_size, size=700).tolist()
    quick = step.make_reader(model)
    plain = PlainReader(model)
    begin = 0
    for end in (1, 2, 5, 21, 86, 250, 257, 258, 699, 700):
        count = min(3, end - begin)
        part = [text[begin:end]]
        assert_same(quick.read(part, count), plain.read(part, count))
        begin = end
    assert_same(step.make_reader(model).read([text]), PlainReader(model).read([text]))


@pytest.mark.parametrize("values", SHAPES[:5], ids=str)
def test_texts_of_any_lengths_together(values, step):
    model = make_model(context_size=1024, **values)
    random = np.random.default_rng(2)
    lengths = [3, 1, 600, 40, 3, 7]
    texts = [random.integers(31, size=length).tolist() for length in lengths]
    reader = step.make_reader(model, len(texts))
    together = [reader.read(texts)]
    for parts in ([[5], [4], [3], [2], [1], [0]], [[1, 2], [3], [4, 5, 6], [7], [8], [9] * 5]):
        together.append(reader.read(parts))
        texts = [text + part for text, part in zip(texts, parts)]
    for row, text in enumerate(texts):
        alone = PlainReader(model).read([text])
        assert_same(together[-1][row : row + 1], alone)
    reader.num_read[2] = 4  # its end is forgotten
    again = reader.read([[1], [2], texts[2][4:9], [3], [4], [5]])
    assert_same(again[2:3], PlainReader(model).read([texts[2][:9]]))


def test_weights_are_those_of_the_model_at_each_prompt(step):
    """Whether others took their place, or they were changed in place."""
    model = make_model(context_size=64)
    quick = step.make_reader(model)
    plain = PlainReader(model)
    for part in ([[1, 2, 3]], [[4]]):
        assert_same(quick.read(part), plain.read(part))
    change_weights(model, 1.5)
    assert_same(quick.read([[5, 6]]), plain.read([[5, 6]]))
    model.model.layers[0].mlp.up_proj.weight[:, 3] = 0
    assert_same(quick.read([[7, 8]]), plain.read([[7, 8]]))


def change_weights(model, factor):
    model.update(tree_map(lambda weight: weight * factor, model.parameters()))


DECODERS = {
    "alone": lambda model, text: main.Decoder(model, text),
    "batch": lambda model, text: BatchDecoder(model, [text]),
    "draft": lambda model, text: SpeculativeDecoder(model, model, text),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_weights_may_change_before_a_text_and_between_prompts(kind, monkeypatch):
    """Also where the text was cut, as by --stop, or outgrows the context."""

    def continuations():
        model = make_model(context_size=16)
        text = [1, 2, 3]
        decoder = DECODERS[kind](model, text)
        for factor, prompt in ((1.3, []), (-1, [4, 5]), (0.7, [6] * 12), (1.2, None)):
            change_weights(model, factor)
            if prompt is None:
                decoder.truncate(5)
            text += prompt or []
            seeds = [0] if kind == "batch" else 0
            [*decoder.generate(9, flags(temperature=1.0), seeds)]
        return text

    quick = continuations()
    monkeypatch.setattr(fast, "quick_reader", lambda *arguments: None)
    plain = continuations()
    if kind == "draft":  # which keeps what it has read of a text by the weights before
        quick, plain = quick[:12], plain[:12]
    assert quick == plain


def test_an_id_that_the_model_lacks_is_refused(step):
    reader = step.make_reader(make_model())
    for token in (31, -1, 2**31 - 1):
        with pytest.raises(UsageError, match="not among the model's 31"):
            reader.read([[1, token]])
        with pytest.raises(UsageError, match="not among the model's 31"):
            rules = flags(repetition_penalty=1.5)
            step.sample_tokens(np.zeros((1, 31)), rules, [[1, token]], [[0, 1]])
    for parts, count in (([[1]], 2), ([[1]], 0), ([[1, 2], []], 1), ([[]], 1)):
        with pytest.raises(ValueError, match="ids or more are needed"):
            step.Reader(make_model(), len(parts)).read(parts, count)


def test_memory_that_is_not_there(step, monkeypatch):
    reader = step.make_reader(make_model())
    monkeypatch.setattr(step.library, "read_tokens", lambda *arguments: 0)
    with pytest.raises(main.RunError, match="shorten the prompt"):
        reader.read([[1, 2]])


# ---- Sampling -----------------------------------------------------------------------------------
RULES = [
    dict(temperature=0),
    dict(temperature=1e-7, repetition_penalty=1.3),
    dict(temperature=1.0, top_k=0),
    dict(temperature=0.5),
    dict(temperature=2.0, top_k=1),
    dict(temperature=1.0, top_k=0, top_p=0.9),
    dict(temperature=1.0, top_k=30, top_p=0.5),
    dict(temperature=1.0, top_k=0, top_p=0.0),
    dict(temperature=1.0, top_k=0, min_p=0.1),
    dict(temperature=0.7, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=0.8),
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 64, 4097])
def test_ids_are_those_of_plain_mlx(rules, vocab_size, step):
    """MLX's random numbers; where there are ties, the same ids are left."""
    given = flags(**rules)
    random = np.random.default_rng(vocab_size)
    rows = 30
    logits = random.normal(0, 3, (rows, vocab_size)).astype(np.float32)
    logits[: rows // 3] = logits[: rows // 3].round()
    logits[-1] = 1
    windows = [random.integers(vocab_size, size=9).tolist() for _ in range(rows)]
    keys = [[int(random.integers(2**31)), int(random.integers(1000))] for _ in range(rows)]
    quick = step.sample_tokens(logits, given, windows, keys)
    plain = fast.REPLACED["sample_tokens"](mx.array(logits), given, windows, keys)
    assert quick == plain


def test_logits_that_are_no_numbers_give_an_id(step):
    logits = np.full((2, 70), np.nan, np.float32)
    logits[1, 3] = 1
    for rules in RULES:
        ids = step.sample_tokens(logits, flags(**rules), [[1], [2]], [[0, 1], [0, 2]])
        assert all(0 <= token < 70 for token in ids)


# ---- Whose model is sampled ---------------------------------------------------------------------
def edits_of(name):
    """Sources of main.py with an edit of one function or class."""
    source = LOADED_SOURCES["main.py"]
    [first_line] = re.findall(rf"^(?:def|class) {name}\b.*\n", source, re.M)
    definition = fast.sources_of_definitions(source)[name].removeprefix("@fast_version\n")
    yield source.replace(definition, f"{definition.rstrip()}\n    extra = 1\n\n\n")
    yield source.replace(definition, f"{definition.rstrip()}\n\n# A remark\n    extra = 1\n\n\n")
    yield source.replace(first_line, f"@mine\n{first_line}")
    if f"@fast_version\n{first_line}" in source:
        yield source.replace(f"@fast_version\n{first_line}", first_line)
    # Another one of this name.
    yield f"{source}\n\nif True:\n    def  {name}():\n        pass\n"
    yield f"{source}\n\ntry:\n    class {name}({name}):\n        pass\nfinally:\n    pass\n"


@pytest.mark.parametrize("name", fast.SAMPLING)
def test_an_edited_function_is_sampled_in_plain_mlx(name, monkeypatch):
    """Whichever it is, of the model, the cache or the sampling."""
    for source in edits_of(name):
        assert source != LOADED_SOURCES["main.py"]
        with monkeypatch.context() as patch:
            patch.setitem(LOADED_SOURCES, "main.py", source)
            for function in (fast.REPLACED["Reader"], fast.REPLACED["sample_tokens"]):
                try:
                    assert fast.fast_version(function) is function
                    assert name in EDITED_NAMES
                finally:
                    EDITED_NAMES.remove(name)


def gain(model):
    model.gain = mx.array(2.0)


def layer(model):
    model.model.layers[1].mlp.more = nn.Linear(4, 4)


def dropout(model):
    model.model.layers[1].drop = nn.Dropout(0.5)


def subclass(model):
    class Block(main.Block):
        pass

    model.model.layers[1].__class__ = Block


def other_layer(model):
    class Linear(nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj.__class__ = Linear


def own_method(model):
    model.model.layers[0].self_attn.split_heads = lambda projected: projected


def activation(model):
    model.model.layers[1].mlp.activation = nn.relu


def rotation(model):
    model.model.layers[1].self_attn.frequencies = np.zeros(2)


def no_rotation(model):
    for block in model.model.layers:
        block.self_attn.frequencies = np.zeros(0)


def eps(model):
    model.model.norm.eps = 0.5


def bias(model):
    model.model.layers[0].mlp.up_proj.bias = mx.zeros(24)


def one_block_more(model):
    model.model.layers.append(main.Block(model.config, 2))


def one_block_less(model):
    model.model.layers.pop()


def no_mlp(model):
    del model.model.layers[0].mlp


def bfloat16(model):
    model.set_dtype(mx.bfloat16)


def other_shape(model):
    model.model.layers[0].mlp.up_proj.weight = mx.zeros((25, 16))


CHANGES = [gain, layer, dropout, subclass, other_layer, own_method, activation, rotation]
CHANGES += [no_rotation, eps, bias, one_block_more, one_block_less, no_mlp, bfloat16, other_shape]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_model_is_sampled_in_plain_mlx(change, step, capsys):
    """Which is said once; and a text that has begun is refused, as it was read otherwise."""
    model = make_model()
    begun = step.make_reader(model)
    begun.read([[1, 2]])
    change(model)
    step.said.clear()
    for _ in range(2):
        assert step.make_reader(model) is None
    assert capsys.readouterr().err.count("Sampling in plain MLX, which is slower: ") == 1
    with pytest.raises(UsageError, match="the model has changed: begin another text"):
        begun.read([[1, 2]])


REPLACED = ["Block.__call__", "LanguageModel.logits", "LanguageModel.output_matrix", "attend"]
REPLACED += ["KVCache.update_and_fetch", "Reader", "keep_top_k", "sample_token", "dropout"]
REPLACED += ["rotate", "Attention.project_qkv", "MLP.scale"]


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_function_is_sampled_in_plain_mlx(name, step, monkeypatch):
    """As in a notebook; also by one of the same name."""
    owner, _, member = name.rpartition(".")
    owner = getattr(main, owner) if owner else main

    def replacement(*arguments):
        return None

    def wrapper(*arguments):  # as if main.py itself had wrapped it
        return None

    functools.update_wrapper(wrapper, getattr(owner, member, replacement))
    wrapper.__code__ = wrapper.__code__.replace(co_filename=main.__file__)
    for own_name, function in (("mine", replacement), (name, replacement), (name, wrapper)):
        function.__qualname__ = own_name
        with monkeypatch.context() as patch:
            patch.setattr(owner, member, function, raising=False)
            assert step.make_reader(make_model()) is None
    assert step.make_reader(make_model())


@pytest.mark.parametrize("layer", [nn.Linear, nn.RMSNorm, nn.Embedding])
@pytest.mark.parametrize("name", ["__call__", "as_linear"])
def test_a_replaced_layer_of_mlx_is_not_sampled(layer, name, step, monkeypatch):
    monkeypatch.setattr(layer, name, lambda *arguments: None, raising=False)
    assert step.make_reader(make_model()) is None


def test_a_changed_table_of_activations(step, monkeypatch):
    monkeypatch.setitem(main.MLPS, "relu2", (nn.relu, False))
    assert step.make_reader(make_model()) is None


def test_an_edit_is_sampled_at_once(trained, text, tmp_path):
    """From a checkpoint, and in training; the screen says so."""
    negative = {anchors.LOGITS: "        return -output_layer(hidden).astype(mx.float32)\n"}
    program = ["-B", copy_program(tmp_path / "copy", negative)]
    *_, folder = run_folders(trained)
    line = ["--prompt", "the ", "--temperature=0", "--save_dir", trained]
    line += ["--identifier", folder.name, "--max_tokens=30"]
    edited, err = run(*line, program=program)
    assert "edited   LanguageModel: computed by main.py" in err
    plain, _ = run(*line, program=program, env={"DISABLE_FAST": "1"})
    unedited, err = run(*line)
    assert edited == plain != unedited
    assert "plain" not in err and "edited" not in err
    line = ["--text", text, *TINY, "--num_iters=2", "--temperature=0", "--save_dir", tmp_path]
    out, _ = run(*line, program=program)
    assert "edited   LanguageModel" in out
    [sample] = (run_folder(tmp_path) / "samples.jsonl").read_text().splitlines()
    sample = json.loads(sample)
    line = ["--prompt", sample["prompt"], "--temperature=0", "--max_tokens=8"]
    plain, _ = run(*line, "--save_dir", tmp_path, program=program, env={"DISABLE_FAST": "1"})
    assert plain == sample["text"] + "\n"

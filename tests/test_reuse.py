"""Weights that travel: a run that begins with another's, LoRA, distillation."""

import re
import shutil

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, flags, ids, run
from datasets import ByteTokenizer
from mlx.utils import tree_flatten, tree_unflatten
from model import head_loss, trained_head_loss

from extras.huggingface import export_model


def make_model(vocab_size=257, seed=0, dim=64, **values):
    shape = dict(context_size=32, num_blocks=2, dim=dim, num_heads=4, num_kv_heads=4, mlp="swiglu", mlp_dim=2 * dim)
    model = main.LanguageModel(main.Config(vocab_size, **shape | values))
    random = np.random.default_rng(seed)
    values = {n: random.normal(1 if w.ndim == 1 else 0, 0.2, w.shape) for n, w in tree_flatten(model.parameters())}
    model.update(tree_unflatten([(name, mx.array(value.astype(np.float32))) for name, value in values.items()]))
    return model


def logits_of(model, tokens):
    return np.array(model(mx.array([list(tokens)]))[0])


# ---- LoRA -----------------------------------------------------------------------------------------------------------
def test_adapters_begin_as_nothing_and_alone_are_trained():
    model, base = make_model(mlp="relu2"), make_model(mlp="relu2")
    main.add_lora(model, 4, 8)
    given = flags(dim=64, batch_size=4, learning_rate=0.1, lr_warmup=0)
    main.init_weights(model, 1)
    tokens = np.random.default_rng(0).integers(257, size=20).tolist()
    np.testing.assert_array_equal(logits_of(model, tokens), logits_of(base, tokens))
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert len(names) == 2 * 2 * 6 and all(re.search(r"layers\.\d\.\w+\.\w+_proj\.lora_[ab]$", name) for name in names)
    optimizer = main.make_optimizer(model, given)
    step = main.make_step(model, optimizer, given, [mx.default_stream(mx.cpu)])
    batch = mx.array(np.random.default_rng(1).integers(257, size=(4, 9)))
    for _ in range(3):
        mx.eval(step(batch[:, :-1], batch[:, 1:]), model.state, optimizer.state)
    trained, before = (dict(tree_flatten(each.parameters())) for each in (model, base))
    assert all(mx.array_equal(trained[name], weight) for name, weight in before.items()), "the base stays as it was"
    assert all(mx.any(trained[name] != 0) for name in names)
    assert np.abs(logits_of(model, tokens) - logits_of(base, tokens)).max() > 0.01


@pytest.fixture
def base(tmp_path, text):
    """A folder with one checkpoint, 20 steps old, and its id."""
    line = [*TINY, "--mlp", "swiglu", "--learning_rate", 0.01, "--lr_warmup", 5, "--num_iters", 20]
    run("--text", text, *line, "--save_dir", tmp_path / "lm")
    return tmp_path / "lm", ids(tmp_path / "lm")[0]


LORA = "--lora_rank 2 --num_iters 30 --dropout 0.1 --learning_rate 0.03 --lr_warmup 5 --max_tokens 8".split()


def test_lora_run(base, text, tmp_path):
    """Its checkpoint holds adapters alone and names its base; sampling and export merge them; interrupted it is the same."""
    folder, id = base
    line = ["--text", text, "--init_from", id[:10], *LORA, "--save_dir"]
    shutil.copytree(folder, tmp_path / "other")
    out, _ = run(*line, folder)
    assert "trained" in out
    [record] = [record for record in main.list_checkpoints(folder) if record["id"] != id]
    assert record["uses"] == {"init_from": [id, id]} and record["flags"]["lora_alpha"] == 4
    weights = mx.load(str(folder / f"{record['id']}.safetensors"))
    assert len(weights) == 2 * 2 * 7 and all("lora_" in name for name in weights)

    run(*line, tmp_path / "other", "--num_iters", 11)
    run(*line, tmp_path / "other", "--num_iters", 30)
    assert ids(tmp_path / "other")[0] == record["id"]
    run("--text", text, "--save_dir", tmp_path / "other", "--num_iters", 31)  # goes on without the base being named again

    live, _ = main.load_model(folder, next(r for r in main.list_checkpoints(folder) if r["id"] == id))
    main.add_lora(live, 2, 4)
    live.load_weights(list(weights.items()), strict=False)
    merged, tokenizer = main.load_model(folder, record)
    tokens = tokenizer.encode("line 5: the quick").tolist()
    np.testing.assert_allclose(logits_of(merged, tokens), logits_of(live, tokens), rtol=0, atol=1e-4)
    run("--export", tmp_path / "hf", "--save_dir", folder)
    again, _, _ = main.open_model(folder, str(tmp_path / "hf"), "--init_from")
    np.testing.assert_array_equal(logits_of(again, tokens), logits_of(merged, tokens))


@pytest.mark.parametrize("options", [[], ["--lora_rank", 2]], ids=["all", "lora"])
def test_a_base_with_more_rows_than_ids(tmp_path, text, options):
    """As Qwen3's, padded for speed: its shape stays, in every leg."""
    export_model(make_model(257 + 24), ByteTokenizer(), tmp_path / "hf", None)
    line = ["--text", text, "--init_from", tmp_path / "hf", *options, "--max_tokens", 8, "--save_dir", tmp_path / "lm"]
    run(*line, "--num_iters", 2)
    out, _ = run(*line, "--num_iters", 4)
    assert "from iteration 2 to 4" in out
    assert main.list_checkpoints(tmp_path / "lm")[0]["config"]["vocab_size"] == 281
    run("--prompt", "line", "--max_tokens", 8, "--save_dir", tmp_path / "lm")


def test_a_base_that_is_needed_stays(base, text):
    folder, id = base
    run("--text", text, "--init_from", "latest", *LORA, "--save_dir", folder)
    name = next(r["run"] for r in main.list_checkpoints(folder) if r["id"] == id)
    for num_iters in (22, 24, 26):
        run("--identifier", name, "--num_iters", num_iters, "--keep", 1, "--save_dir", folder)
    left = [record["iteration"] for record in main.list_checkpoints(folder) if record["run"] == name]
    assert left == [26, 20]


def test_a_base_that_is_missing_or_changed(base, text, tmp_path):
    folder, id = base
    run("--export", tmp_path / "hf", "--save_dir", folder)
    run("--text", text, "--init_from", tmp_path / "hf", *LORA, "--save_dir", folder)
    resumed = ["--text", text, "--save_dir", folder, "--num_iters", 40]
    model, tokenizer, _ = main.open_model(folder, str(tmp_path / "hf"), "")
    model.update(tree_unflatten([("model.norm.weight", model.model.norm.weight * 2)]))
    export_model(model, tokenizer, tmp_path / "hf", None)
    for line in (resumed, ["--prompt", "line", "--save_dir", folder]):
        assert "as it was" in run(*line, status=1)[1].splitlines()[-1]
    shutil.rmtree(tmp_path / "hf")
    for line in (resumed, ["--prompt", "line", "--save_dir", folder]):
        err = run(*line, status=1)[1].splitlines()[-1]
        assert "needs the model it was begun with" in err and str(tmp_path / "hf") in err


def test_all_weights_from_another_model(base, text, tmp_path):
    """Full fine-tuning begins with the base's weights, on other text, and needs it no more when it goes on."""
    folder, id = base
    (tmp_path / "more.txt").write_text("señor fox\n" * 400)
    line = ["--text", tmp_path / "more.txt", "--init_from", id, "--learning_rate", 1e-9, "--save_dir", folder]
    run(*line, "--num_iters", 1, "--context_size", 16, "--max_tokens", 5)
    records = main.list_checkpoints(folder)
    (new, tokenizer), (old, _) = (main.load_model(folder, record) for record in records)
    assert records[0]["uses"] == {} and new.config.context_size == 16 and new.config.mlp == "swiglu"
    for (name, mine), (_, theirs) in zip(tree_flatten(new.parameters()), tree_flatten(old.parameters())):
        np.testing.assert_allclose(np.array(mine), np.array(theirs), atol=1e-6, err_msg=name)
    for path in folder.glob(f"{id}.*"):
        path.unlink()
    run(*line, "--num_iters", 2)
    assert main.list_checkpoints(folder)[0]["iteration"] == 2


@pytest.mark.parametrize("typed, words", [
    (["--init_from", "zzz"], "--init_from 'zzz' matches no checkpoint"),
    (["--init_from", "latest", "--dim", 32], "--dim 32 contradicts --init_from, which has 16"),
    (["--init_from", "latest", "--mlp", "gelu"], "--mlp gelu contradicts"),
    (["--init_from", "latest", "--tokenizer", "word"], "--tokenizer word contradicts"),
    (["--lora_rank", 4], "--lora_rank goes with --init_from"),
    (["--lora_alpha", 4], "--lora_alpha goes with --lora_rank"),
    (["--teacher", "zzz"], "--teacher 'zzz' matches no checkpoint"),
])  # fmt: skip
def test_mistakes(base, text, typed, words):
    folder, _ = base
    line = [*typed, "--save_dir", folder, "--text", text, "--num_iters", 1, "--new_model"]
    err = run(*line, status=2)[1]
    assert words in err.splitlines()[-1] and "Traceback" not in err


# ---- Distillation ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight, temperature, expected", [
    (0.0, 2.0, 2 * -np.log(0.25)),  # two positions, whose answer has a quarter of the student's probability
    (1.0, 1.0, 2 * (0.8 * np.log(0.8 / 0.75) + 0.2 * np.log(0.2 / 0.25))),
    # The square roots of 4:1 and 3:1 as odds, times 4.
    (1.0, 2.0, 2 * 4 * (2 / 3 * np.log(2 / 3 / 0.6339746) + 1 / 3 * np.log(1 / 3 / 0.3660254))),
    (0.25, 1.0, 2 * (-0.75 * np.log(0.25) + 0.25 * (0.8 * np.log(0.8 / 0.75) + 0.2 * np.log(0.2 / 0.25)))),
])  # fmt: skip
def test_distillation_by_hand(weight, temperature, expected):
    """Hidden states are 1, the student's logits log 3 and 0, the teacher's log 4 + 1, 1 and one of a padded vocabulary."""
    student, teacher = mx.array([[np.log(3.0)], [0.0]]), mx.array([[np.log(4.0) + 1], [1.0], [99.0]])
    states, mixture = mx.ones((2, 1)), mx.array([weight, temperature])
    loss, *_ = head_loss(states, student, mx.array([1, 1]), mx.ones(2), states, teacher, mixture)
    assert abs(loss.item() - expected) < 1e-5


@pytest.mark.parametrize("rows, vocab_size", [(6, 31), (300, 40000)])
def test_gradients_of_distillation(rows, vocab_size):
    """They are those of the plain formula by automatic differentiation, in one chunk and in several."""
    random = np.random.default_rng(0)
    hidden, head, states, their_head = (
        mx.array(random.normal(size=shape).astype(np.float32)) for shape in ((rows, 8), (vocab_size, 8), (rows, 5), (vocab_size + 3, 5))
    )
    targets, weights = mx.array(random.integers(vocab_size, size=rows)), mx.array(random.random(rows).astype(np.float32))

    def plain(hidden, head, share=0.3, T=1.7):
        log_p = mx.log(mx.softmax((states @ their_head.T)[:, :vocab_size] / T, axis=-1))
        logits = hidden @ head.T
        log_q = logits / T - mx.logsumexp(logits / T, axis=-1, keepdims=True)
        divergence = (mx.exp(log_p) * (log_p - log_q)).sum(-1)
        nats = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return (weights * ((1 - share) * nats + share * T * T * divergence)).sum()

    def ours(hidden, head):
        return trained_head_loss(hidden, head, targets, weights, states, their_head, mx.array([0.3, 1.7]))[0]

    expected, gradients = mx.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    loss, mine = mx.value_and_grad(ours, argnums=(0, 1))(hidden, head)
    assert abs(loss.item() / expected.item() - 1) < 1e-3  # sums of 40,000 in float32
    for a, b in zip(mine, gradients):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=0, atol=2e-4 * np.abs(np.array(b)).max())


def test_a_student_ends_nearer_to_its_teacher(base, text):
    folder, id = base
    distances, tokens = [], None
    teacher = main.load_model(folder, main.list_checkpoints(folder)[0])[0]
    for weight in (0.0, 1.0):
        line = [*TINY, "--text", text, "--teacher", id, "--teacher_weight", weight, "--learning_rate", 0.01]
        run(*line, "--lr_warmup", 5, "--num_iters", 40, "--new_model", "--save_dir", folder)
        record = main.list_checkpoints(folder)[0]
        assert record["uses"] == {"teacher": [id, id]}
        student, tokenizer = main.load_model(folder, record)
        tokens = tokenizer.encode(text.read_text()[:400]).tolist()
        wanted, given = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits_of(teacher, tokens), logits_of(student, tokens)))
        distances.append((np.exp(wanted) * (wanted - given)).sum(-1).mean())
    assert distances[1] < 0.8 * distances[0]


def test_a_teacher_of_other_tokens(base, text):
    folder, id = base
    run("--text", text, *TINY, "--tokenizer", "word", "--num_iters", 1, "--save_dir", folder)
    other = ids(folder)[0]
    err = run("--text", text, "--init_from", id, "--teacher", other, "--new_model", "--save_dir", folder, status=2)[1]
    assert f"--teacher {other} has another tokenizer" in err.splitlines()[-1]

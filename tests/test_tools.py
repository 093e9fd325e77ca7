"""Tools against independent computations: sliding evaluation, logs, pictures, cases."""

import csv
import fcntl
import hashlib
import json
import os
import random
import re
import signal
import time

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, flags, ids, run, start
import model as model_file
from datasets import byte_tokenizer
from test_evaluation import make_model, nats_of
from test_interrupts import wait_for


@pytest.mark.parametrize("length", [2, 8, 9, 10, 33, 50])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_sliding_evaluation(length, stride):
    """Each token is scored once, alone, with the context of the first window that reaches it."""
    model, L, total = make_model(), 8, 0.0
    tokens = np.random.default_rng(length).integers(13, size=length).astype(np.uint16)
    for place in range(length - 1):
        begin = max(0, -(-(place + 1 - L) // stride)) * stride
        logits = model(mx.array(tokens[begin : place + 1][None].astype(np.int32)))[0, -1:]
        total += nats_of(logits, tokens[place + 1 : place + 2]).sum()
    for batch_size in (1, 4):
        score = main.evaluate(model, tokens, batch_size, stride=stride)
        assert score == pytest.approx(total / (length - 1), rel=1e-5)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with two runs of a byte model that has learnt a little."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    for seed in (1, 2):
        line = ["--text", folder / "text.txt", *TINY, "--context_size", 32, "--learning_rate", 0.01, "--lr_warmup", 5]
        run(*line, "--num_iters", 60, "--steps_per_eval", 20, "--seed", seed, "--save_dir", folder / "lm")
    return folder / "lm"


def rows_of(path):
    return list(csv.DictReader(path.open()))


# ---- Logs -----------------------------------------------------------------------------------------------------------
def test_log(trained):
    for record in main.list_checkpoints(trained)[:1]:
        rows = rows_of(trained / f"{record['run']}.csv")
        assert list(rows[0]) == main.LOG
        assert [(row["split"], int(row["iteration"])) for row in rows] == [
            (split, i) for i in range(10, 61, 10) for split in ("train", "valid") if split == "train" or i % 20 == 0
        ]
        scores = {int(row["iteration"]): float(row["loss"]) for row in rows if row["split"] == "valid"}
        assert scores == pytest.approx(dict(record["scores"]), rel=1e-5)
        for row in rows:
            assert int(row["tokens"]) == int(row["iteration"]) * 4 * 32
            assert float(row["bits_per_byte"]) == pytest.approx(float(row["loss"]) / np.log(2), rel=0.01)  # bytes, some <eos>
        seconds = [float(row["seconds"]) for row in rows]
        assert seconds == sorted(seconds) and seconds[-1] == pytest.approx(record["seconds"], rel=1e-5)


def test_log_counts_the_tokens_of_batches_as_they_were(tmp_path, text):
    line = ["--text", text, *TINY, "--steps_per_report", 2, "--save_dir", tmp_path]
    run(*line, "--num_iters", 2)
    run(*line, "--num_iters", 4, "--batch_size", 2)
    assert [int(row["tokens"]) for row in rows_of(next(tmp_path.glob("*.csv")))] == [2 * 4 * 8, 2 * 4 * 8 + 2 * 2 * 8]


def test_a_log_is_written_anew_under_the_lock(tmp_path, monkeypatch):
    """Else another process that cleans the folder would take it for what a killed save has left."""
    write, tries = main.Path.write_text, []

    def watched(path, text):
        descriptor = os.open(tmp_path, os.O_RDONLY)  # as a second process would
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        tries.append(path)
        return write(path, text)

    monkeypatch.setattr(main.Path, "write_text", watched)
    main.open_log(tmp_path / "run.csv", 0, False)
    assert tries and (tmp_path / "run.csv").read_text().strip() == ",".join(main.LOG)


def test_log_of_a_run_that_is_killed(tmp_path, text):
    """Whatever stops it, the log ends with the lines, and the losses, of the run never touched."""
    line = ["--text", text, *TINY, "--context_size", 64, "--steps_per_report", 1, "--steps_per_eval", 12, "--steps_per_save", 3]
    chance = random.Random(0)
    for _ in range(6):
        process = start(*line, "--save_dir", tmp_path / "killed")
        wait_for(process, "  loss ")
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(chance.choice([signal.SIGKILL, signal.SIGINT]))
        process.communicate(timeout=120)
    num_iters = main.list_checkpoints(tmp_path / "killed")[0]["iteration"] + 15
    logs = []
    for name in ("killed", "whole"):
        run(*line, "--save_dir", tmp_path / name, "--num_iters", num_iters)
        [log] = (tmp_path / name).glob("*.csv")
        logs.append([(row["iteration"], row["split"], row["loss"], row["gradient_norm"]) for row in rows_of(log)])
    assert logs[0] == logs[1] and len(logs[0]) >= num_iters
    assert not list((tmp_path / "killed").glob("*.new"))


def test_a_score_that_was_not_saved_is_logged_once(tmp_path):
    path = tmp_path / "run.csv"
    for scored, expected in ((True, ["10", "10"]), (False, ["10"])):
        path.write_text(",".join(main.LOG) + "\n" + "10,train,1,,,,,,,\n10,valid,1,,,,,,,\n20,train,1,,,,,,,\n20,va")
        path.write_bytes(path.read_bytes() + b"\xff")  # damaged, which is no reason to stop a run
        log = main.open_log(path, 10, scored)
        assert [row["iteration"] for row in rows_of(path)] == expected
        log(11, "train", 1 / 3, "", "", "", 5, "", "", 0.25)
        assert path.read_text().splitlines()[-1] == "11,train,0.333333,,,,5,,,0.25"


def test_what_a_checkpoint_was_made_by(trained):
    record = main.list_checkpoints(trained)[0]
    assert record["command"][1:3] == ["--text", str(trained.parent / "text.txt")] and "--seed" in record["command"]
    for name in ("main.py", "model.py", "datasets.py"):
        assert record["sources"][name] == hashlib.sha1((ROOT / name).read_bytes()).hexdigest()


# ---- Pictures -------------------------------------------------------------------------------------------------------
def test_plot(trained, tmp_path, monkeypatch):
    runs = sorted({record["run"] for record in main.list_checkpoints(trained)})
    run("--plot", tmp_path / "all.png", "--save_dir", trained)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    figures = []
    monkeypatch.setattr(main, "save_figure", lambda figure, path: figures.append(figure))
    for names in ([], runs[1:]):
        main.plot_runs(trained, names, "x.png")
        by_iteration, by_minute = figures.pop().axes
        wanted = [(name, split) for name in names or runs for split in ("train", "valid")]
        assert [line.get_label() for line in by_iteration.lines] == [f"{name} {split}" for name, split in wanted]
        for axis, column, unit in ((by_iteration, "iteration", 1), (by_minute, "seconds", 60)):
            for line, (name, split) in zip(axis.lines, wanted):
                rows = [row for row in rows_of(trained / f"{name}.csv") if row["split"] == split]
                assert line.get_xydata().tolist() == [[float(row[column]) / unit, float(row["loss"])] for row in rows]


def rotated(x, base=10000.0):
    """RoPE of [H, L, d] by complex numbers, the first half of d real and the second imaginary."""
    L, half = x.shape[1], x.shape[2] // 2
    angles = np.outer(np.arange(L), base ** (-np.arange(half) / half))
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_weights(kv_heads):
    model, tokens = make_model(num_kv_heads=kv_heads, dim=16), [1, 5, 3, 3, 12]
    weights = main.attention_weights(model, tokens)
    assert weights.shape == (2, 2, 5, 5)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (weights[..., ~np.tri(5, dtype=bool)] == 0).all()
    block = model.model.layers[0]
    hidden = np.array(model.model.embed_tokens.weight, np.float64)[tokens]
    hidden *= np.array(block.input_layernorm.weight) / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-5)
    project = lambda layer: rotated((hidden @ np.array(layer.weight).T).reshape(5, -1, 8).transpose(1, 0, 2))
    queries, keys = project(block.self_attn.q_proj), project(block.self_attn.k_proj)
    for head in range(2):
        scores = queries[head] @ keys[head * kv_heads // 2].T / 8**0.5
        powers = np.exp(scores) * np.tri(5)
        np.testing.assert_allclose(weights[0, head], powers / powers.sum(-1, keepdims=True), atol=1e-5)
    assert "watched" not in model_file.attend.__name__, "the watch is over"


def test_picture_of_attention(trained, tmp_path, monkeypatch):
    _, err = run("--attention", tmp_path / "a.png", "--prompt", "the $fox\n", "--save_dir", trained)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and "a.png" in err
    figures = []
    monkeypatch.setattr(main, "save_figure", lambda figure, path: figures.append(figure))
    model, tokenizer = make_model(vocab_size=257), byte_tokenizer()
    main.plot_attention(model, tokenizer, "a fox", "x.png")
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == [f"block {i}, head {j}" for i in range(2) for j in range(2)]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == list("a fox")
    np.testing.assert_array_equal(axes[3].images[0].get_array(), main.attention_weights(model, list(b"a fox"))[1, 1])


# ---- Cases ----------------------------------------------------------------------------------------------------------
CASES = [("the quick", " brown"), ("", "t"), ("the lazy", "x"), ("o" * 50, "ver"), ("😀", "😀")]  # json.dumps halves them


def test_cases(trained, tmp_path):
    path = tmp_path / "cases.yaml"
    path.write_text(json.dumps([{"prompt": prompt, "expected": expected} for prompt, expected in CASES]))  # which is YAML, too
    line = ["--cases", path, "--save_dir", trained, "--output", tmp_path / "out.json"]
    out, _ = run(*line, "--identifier", *ids(trained)[:2])
    assert max(map(len, out.splitlines())) <= 100
    results = json.loads((tmp_path / "out.json").read_text())
    assert [result["checkpoint"] for result in results] == [id for id in ids(trained)[:2] for _ in CASES]
    record = next(record for record in main.list_checkpoints(trained) if record["id"] == ids(trained)[0])
    model, tokenizer = main.load_model(trained, record)
    for (prompt, expected), result in zip(CASES, results):
        text, ranks, chance = tokenizer.encode(prompt).tolist() or [tokenizer.eos], [], 1.0
        for token in tokenizer.encode(expected).tolist():
            window = text[-(32 - len(expected) + 1 + len(ranks)) :]
            logits = np.array(model(mx.array([window]))[0, -1], np.float64)
            ranks.append(int((logits > logits[token]).sum()) + 1)
            chance *= np.exp(logits[token]) / np.exp(logits).sum()
            text.append(token)
        assert result["rank"] == max(ranks) and result["passed"] == (max(ranks) <= 5)
        assert result["probability"] == pytest.approx(chance, rel=1e-3) and len(result["top"]) == 5
    assert len(re.findall(r"^  (pass|FAIL) ", out, re.M)) == 10 and "of 5 within the 5 likeliest" in out
    every, _ = run("--cases", path, "--save_dir", trained, "--top_k", 257)
    assert every.count("5 of 5 within the 257") == len(ids(trained))


@pytest.mark.parametrize("typed, words", [
    (["--cases", "none.yaml"], "none.yaml"),
    (["--cases", "text.txt"], "is no YAML list of prompt and expected"),
    (["--cases", "text.txt", "--identifier", "zzz", "latest"], "--identifier 'zzz' matches no checkpoint"),
    (["--plot", "nowhere/x.png"], "cannot write nowhere/x.png"),
    (["--plot", "x.nonsense"], "cannot write x.nonsense"),
    (["--plot", "x.png", "--identifier", "zzz"], "--identifier 'zzz' matches no checkpoint"),
    (["--attention", "x.png"], "--attention goes with --prompt"),
    (["--attention", "nowhere/x.png", "--prompt", "x"], "cannot write nowhere/x.png"),
    (["--evaluate", "valid", "--eval_stride", 33], "at most 32"),
    (["--prompt", "x", "--identifier", "latest", "best"], "--identifier takes one name"),
    (["--plot", "x.png", "--cases", "y"], "exclude each other"),
])  # fmt: skip
def test_mistakes(trained, typed, words):
    err = run(*typed, "--save_dir", trained, status=2, cwd=trained.parent)[1]
    assert words in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize("typed", [["--cases", "c.yaml"], ["--plot", "x.png"], ["--attention", "x.png", "--prompt", "x"]])
def test_an_empty_folder(tmp_path, typed):
    (tmp_path / "c.yaml").write_text("[]")
    err = run(*typed, "--save_dir", tmp_path, status=2, cwd=tmp_path)[1]
    assert str(tmp_path) in err.splitlines()[-1] and "train" in err


def test_the_example_file_of_cases(trained):
    out, _ = run("--cases", ROOT / "tests" / "cases.yaml", "--identifier", "latest", "--save_dir", trained)
    assert "within the 5 likeliest" in out


# ---- What a model weighs and costs ----------------------------------------------------------------------------------
def test_an_activation_of_ones_own_can_be_benchmarked():
    gelu, own = (main.Config(257, 32, 2, 64, 4, 4, mlp, 256) for mlp in ("gelu", "silu"))
    assert main.predict_memory(own, flags(), 1000, 2) == main.predict_memory(gelu, flags(), 1000, 2)


@pytest.mark.parametrize("shape", [
    "--dim 64 --num_heads 4 --num_blocks 3 --context_size 32 --batch_size 16",
    "--dim 128 --num_heads 4 --num_kv_heads 2 --num_blocks 2 --context_size 64 --batch_size 8 --mlp swiglu --untie --qk_norm",
    "--dim 256 --num_heads 4 --num_blocks 4 --context_size 16 --batch_size 4",  # gradients outweigh activations
], ids=["plain", "all", "large"])  # fmt: skip
def test_benchmark(shape, text, tmp_path):
    out, _ = run("--benchmark", "--text", text, *shape.split(), "--save_dir", tmp_path)
    result = json.loads(out.splitlines()[-1])
    given = flags(**{name: int(value) if value.isdigit() else value for name, value in re.findall(r"--(\w+) (\w+)", shape)})
    D, K, L, untied = given.dim, given.num_kv_heads * given.dim // given.num_heads, given.context_size, "--untie" in shape
    norms = (2 * given.num_blocks + 1) * D + ("--qk_norm" in shape) * given.num_blocks * 2 * D // given.num_heads
    assert result["parameters"] == {
        "embeddings": 257 * D, "attention": given.num_blocks * (2 * D * D + 2 * D * K), "norms": norms,
        "mlp": given.num_blocks * D * given.mlp_dim * (3 if given.mlp == "swiglu" else 2), "output": untied * 257 * D,
    }  # fmt: skip
    products = result["parameters"]["attention"] + result["parameters"]["mlp"] + 257 * D
    assert result["flops_per_token"]["forward"] == 2 * products + given.num_blocks * 4 * D * L
    weights = 4 * sum(result["parameters"].values())
    assert result["memory"]["weights"] == weights and result["memory"]["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    if main.make_streams(64, 64)[1:2] and not main.make_streams(64, 64)[2:]:  # what the prediction was fitted to, on an idle machine
        assert result["predicted_peak"] == pytest.approx(result["measured_peak"], rel=0.25)
    assert all(result[name] > 0 for name in ("tokens_per_second", "matrix_flops", "share_of_matrix_speed", "decoded_per_second"))
    assert max(map(len, out.splitlines()[-7:-1])) <= 100
    assert not ids(tmp_path), "nothing is saved"


def test_a_case_of_words_that_the_model_cannot_know(text, tmp_path):
    (tmp_path / "cases.yaml").write_text("- {prompt: line, expected: zyzzyva}\n- {prompt: the, expected: quick}\n")
    line = ["--text", text, "--tokenizer", "word", *TINY, "--num_iters", 1, "--save_dir", tmp_path / "lm"]
    run(*line)
    run("--cases", "cases.yaml", "--top_k", 100000, "--output", "out.json", "--save_dir", tmp_path / "lm", cwd=tmp_path)
    unknown, known = json.loads((tmp_path / "out.json").read_text())
    assert not unknown["passed"] and known["passed"], "<unk> is not the word that was expected"

"""A run that begins with another's weights: what it takes over, and when it is resumed."""

import re
import shutil

from conftest import TEXT, TINY, arrays, assert_equal, begin, ids, run, run_folder, saved

from datasets import PackageTokenizer

import main


def test_all_weights_from_another_model(base, text, tmp_path):
    """Full fine-tuning begins with the base's weights, on other text.

    What the base decides may be given, too. It needs the base no more when it goes on.
    """
    folder, id = base
    (tmp_path / "more.txt").write_text("señor fox\n" * 400)
    line = ["--text", tmp_path / "more.txt", "--init_from", id, "--save_dir", folder]
    line += "--learning_rate 1e-9 --context_size 16 --sample_tokens 5".split()
    name, _, _ = begin(*line, "--num_iters", 1)
    new_checkpoint, old_checkpoint = saved(folder)
    assert not (new_checkpoint.folder / "init_from").exists()
    new = main.read_contents(new_checkpoint).load_model()
    old = main.read_contents(old_checkpoint).load_model()
    assert new.config.context_size == 16
    assert new.config.mlp == "swiglu"
    assert_equal(arrays(new), arrays(old), atol=1e-6)
    assert begin(*line, "--dim", 16, "--tokenizer", "byte", "--num_iters", 2)[:2] == (name, 1)
    shutil.rmtree(old_checkpoint.folder)
    _, err = run(*line, "--num_iters", 3, status=2)
    assert err.endswith("; if a run's model is gone, resume the run with --identifier RUN\n")
    named = ["--identifier", name, "--save_dir", folder, "--num_iters", 3]
    assert begin(*named)[:2] == (name, 2)


def test_a_base_is_the_same_whatever_it_is_called(word_model, text, tmp_path, monkeypatch):
    """By its id or the beginning of that, by its run's folder, or from where that lies.

    That folder is no other program's model. The vocabulary of the base counts.
    """
    folder = shutil.copytree(word_model, tmp_path / "lm")
    [id] = ids(folder)
    of_base = run_folder(folder)
    monkeypatch.chdir(folder)
    line = ["--text", text, "--save_dir", ".", "--sample_tokens", 1]
    for iteration, name in enumerate((id, id[:8], of_base, of_base.name)):
        _, begun, _ = begin(*line, "--init_from", name, "--num_iters", iteration + 1)
        assert begun == iteration, "it is the same run"
        assert saved(folder)[0].parents == {"init_from": id}


def test_a_base_with_a_tokenizer_of_its_own(text, tmp_path):
    """Its child is a run like any other, with the file and without."""
    file = tmp_path / "$OWN.json"
    file.write_text(PackageTokenizer.train([TEXT], 300).vocabulary)
    line = ["--text", text, "--save_dir", tmp_path / "lm", "--num_iters"]
    base, _, _ = begin(*line, 1, *TINY, "--tokenizer", file)
    name, _, _ = begin(*line, 1, "--init_from", base, "--learning_rate", 0.001)
    file.unlink()
    assert begin(*line, 2, "--init_from", base, "--learning_rate", 0.001)[:2] == (name, 1)
    for each, iteration in ((name, 2), (base, 1)):
        named = ["--save_dir", tmp_path / "lm", "--identifier", each, "--num_iters", 3]
        assert begin(*named)[:2] == (each, iteration)


def test_a_folder_called_latest(base, text, tmp_path, monkeypatch):
    """The word stands for the newest checkpoint; the folder is ./latest."""
    folder, id = base
    (tmp_path / "latest").mkdir()
    monkeypatch.chdir(tmp_path)
    line = ["--text", text, "--save_dir", folder, "--sample_tokens", 1]
    run(*line, "--init_from", "latest", "--num_iters", 1)
    assert saved(folder)[0].parents == {"init_from": id}


def test_a_text_that_the_base_was_trained_on_validates_nothing(text, tmp_path):
    """Nor does one that the base of the base was trained on."""
    lines = [f"{i * i} other words, {i} of them\n" for i in range(900)]
    (tmp_path / "other.txt").write_text("".join(lines))
    folder = ["--save_dir", tmp_path / "lm", "--num_iters", 1]
    base, _, _ = begin("--text", text, *TINY, *folder)
    tuned, _, _ = begin("--text", tmp_path / "other.txt", "--init_from", base, *folder)
    line = ["--text", tmp_path / "other.txt", "--init_from", tuned, "--seed", 1, *folder]
    assert "was trained on" not in begin(*line)[2]
    _, _, said = begin(*line, "--valid_text", text)
    [percent] = re.findall(
        r"^--init_from or .* was trained on about (\d+)% of the validation", said, re.M
    )
    assert 70 < int(percent) < 98, "a tenth was held out"

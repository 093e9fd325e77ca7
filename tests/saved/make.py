"""Saves the runs in this folder anew: python tests/saved/make.py

Later code has to read them (tests/test_saved.py), so they are made once for each format of
checkpoints. Without the code that trained them, which git has.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = Path("/tmp/transformer-lm-saved")  # a run records where its text lies
SHAPE = (
    "--dim 8 --num_heads 2 --num_blocks 1 --context_size 8 --batch_size 2 --sample_tokens 0 "
    "--lr_warmup 2 --steps_per_eval 2 --steps_per_save 2"
)
# How each run begins, by its name in the format with which it was saved.
COMMANDS = {
    "text-4d807419": f"--text {FOLDER}/text.txt --num_iters 4 {SHAPE}",
    "text-fb408f09": (
        f"--text {FOLDER}/notes --valid_text {FOLDER}/valid.txt --tokenizer word --num_iters 4 "
        f"{SHAPE}"
    ),
    "text-4232c425": (
        f"--text {FOLDER}/text.txt --init_from text-4d807419 --lora_rank 1 --num_iters 2 {SHAPE}"
    ),
    "text-a2574c80": "--identifier text-4d807419 --learning_rate 1e-2 --num_iters 6",
}


def write_texts():
    """Writes the texts of the runs, the same each time, where the runs have recorded them."""
    lines = [f"{i} bottles of beer on the wall, {i} bottles of beer\n" for i in range(99, 0, -1)]
    parts = {"text.txt": lines, "notes/a.txt": lines[::2], "notes/b.md": lines[1::2]}
    parts["valid.txt"] = lines[:9]
    for name, part in parts.items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{os.getpid()}")  # other tests may read the old one at the same time
        new.write_text("".join(part))
        new.replace(path)


if __name__ == "__main__":
    write_texts()
    for name, line in COMMANDS.items():
        command = [sys.executable, ROOT / "main.py", *line.split(), "--save_dir", FOLDER / "runs"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(HERE / name, ignore_errors=True)
        without = shutil.ignore_patterns("code-*")
        shutil.copytree(FOLDER / "runs" / name, HERE / name, ignore=without)
    shutil.rmtree(FOLDER)

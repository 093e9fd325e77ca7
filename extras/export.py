"""Writes a checkpoint's model and tokenizer for other programs.

    python -m extras.export hf                       a folder for transformers and mlx-lm
    python -m extras.export hf --quantize 4          the same with packed weights, for mlx-lm
    python -m extras.export model.gguf --quantize 8  a file for llama.cpp and Ollama

--quantize 16 writes float16. What is written for whom: huggingface.py, gguf.py.
"""

# First: it chooses the BLAS before MLX takes one.
from extras.common import make_parser, read_flags, start

import sys

from main import open_checkpoint
from support.cli import extra
from support.code import EDITED_NAMES
from support.flags import path_name
from support.reports import announce


def main(arguments):
    """Exports as these arguments specify."""
    parser = make_parser("export", __doc__, "identifier", "quantize")
    target = "a new folder, or a new file FILE.gguf"
    parser.add_argument("path", metavar="PATH", type=path_name, help=target)
    flags = read_flags(parser, arguments)
    contents = open_checkpoint(flags)
    model = contents.load_model()
    if flags.path.lower().endswith(".gguf"):
        write = extra("gguf").export_gguf
    else:
        write = extra("huggingface").export_model
    kind = write(model, contents.tokenizer, flags.path, flags.quantize)
    print(f"{kind} and its tokenizer are in {flags.path}", file=sys.stderr)
    announce(contents.checkpoint)
    if EDITED_NAMES:
        edited = ", ".join(EDITED_NAMES)
        print(f"Other programs know nothing of your edit of {edited}.", file=sys.stderr)


if __name__ == "__main__":
    start("export", main)

"""Continues many prompts, sixteen at a time.

    python -m extras.batch prompts.txt --output answers.jsonl --max_tokens 20

Each line of the file is a prompt. Each continuation is a line of JSON: prompt, seed, checkpoint,
sampling flags, completion and tokens. Rerun the same command to resume.
"""

# First: it chooses the BLAS before MLX takes one.
from extras.common import make_parser, read_flags, start

import os

from datasets import end_of_text
from main import Conversation, Detokenizer, encode_prompt, open_checkpoint, warn_about_prompt
from support.cli import UsageError, explain_errors
from support.flags import FLAGS, Flag, get_values, path_name
from support.reports import announce
from extras.features.prompt_files import append_lines, json_line, read_prompt_lines
from extras.features.decode import BatchDecoder
from extras.features.quantize import quantize

BATCH_SIZE = 16
# The flags that, besides the seed, determine a completion.
SAMPLING_FLAGS = [name for name in FLAGS["sampling"] if name not in ("num_samples", "draft")]


def main(arguments):
    """Writes --num_samples continuations of each prompt to --output or stdout.

    An --output that holds the first of these lines is resumed. Raises UsageError or RunError if it
    cannot be resumed (see append_lines).
    """
    output = Flag(None, path_name, "JSON Lines; resumed if it exists (default: stdout)")
    names = ["identifier", "gpu", "num_samples", "seed", *SAMPLING_FLAGS]
    parser = make_parser("batch", __doc__, *names, output=output)
    file_help = "UTF-8 text, a prompt per line"
    parser.add_argument("file", metavar="FILE", type=path_name, help=file_help)
    flags = read_flags(parser, arguments)
    contents = open_checkpoint(flags)
    model = contents.load_model()
    tokenizer = contents.tokenizer
    if flags.quantize:
        quantize(model, flags.quantize, is_packed=flags.gpu)
    if flags.output and os.path.realpath(flags.output) == os.path.realpath(flags.file):
        raise UsageError(f"--output {flags.output} would overwrite the prompts: rename it")
    with explain_errors(f"{flags.file} must be a UTF-8 file", OSError, ValueError):
        prompts = read_prompt_lines(flags.file)
    settings = {"checkpoint": contents.checkpoint.id} | get_values(flags, SAMPLING_FLAGS)
    jobs = []
    for prompt in prompts:
        for _ in range(flags.num_samples):
            jobs.append({"prompt": prompt, "seed": flags.seed + len(jobs)} | settings)
    with explain_errors(f"cannot write --output {flags.output}: name another", OSError):
        if flags.output:
            out, answered = append_lines(flags.output, jobs)
        else:
            out = os.fdopen(os.dup(1), "wb")  # stdout itself stays open
            answered = []
    with out:
        announce(contents.checkpoint)
        conversation = Conversation(tokenizer, model)
        for prompt in dict.fromkeys(job["prompt"] for job in jobs[len(answered) :]):
            warn_about_prompt(conversation, prompt)
        for first in range(len(answered), len(jobs), BATCH_SIZE):
            batch = jobs[first : first + BATCH_SIZE]
            for line in answer_batch(model, tokenizer, batch, flags):
                out.write(json_line(line))
            out.flush()  # a kill costs at most the current batch


def answer_batch(model, tokenizer, jobs, flags):
    """The jobs, dicts of a prompt and a seed, with their completion and its tokens added.

    The tokens include the end token that ended a text; the completion does not.
    """
    texts = [encode_prompt(tokenizer, job["prompt"]) for job in jobs]  # the decoder extends them
    detokenizers = [Detokenizer(tokenizer, text) for text in texts]
    lines = [job | {"completion": "", "tokens": []} for job in jobs]
    end = end_of_text(tokenizer) if flags.stop_at_end else None
    running = set(range(len(jobs)))  # the indices of the texts that have not ended
    decoder = BatchDecoder(model, texts)
    for ids in decoder.generate(flags.max_tokens, flags, [job["seed"] for job in jobs]):
        for i in [*running]:
            line = lines[i]
            line["tokens"].append(ids[i])
            if ids[i] != end:
                line["completion"] += detokenizers[i].add_token(ids[i])
            has_stop = flags.stop and flags.stop in line["completion"]
            if has_stop or ids[i] == end:
                running.remove(i)
        if not running:
            break
    for line, detokenizer in zip(lines, detokenizers):
        line["completion"] += detokenizer.finalize()
        if flags.stop:
            line["completion"], _, _ = line["completion"].partition(flags.stop)
    return lines


if __name__ == "__main__":
    start("batch", main)

"""Other programs' names for flags and values.

Whoever passes one, on the command line or in a --config file, is told ours.
"""

import os
import re
from pathlib import Path

from datasets import CORPORA

# Our flags and their names in other programs.
OTHER_NAMES = {
    "batch_size": "batch bsz device_batch_size micro_batch_size per_device_train_batch_size",
    "beta1": "adam_beta1 b1",
    "beta2": "adam_beta2 b2",
    "config": "config_file config_path recipe",
    "context_size": "block_size context context_length ctx max_length max_position_embeddings"
    " max_seq_len max_seq_length n_ctx n_positions seq_len seq_length sequence_length",
    "data_dir": "cache_dir data_cache",
    "dataset": "corpus dataset_name",
    "dim": "d_model emb_dim embed_dim embedding_dim hidden_dim hidden_size model_dim n_embd"
    " n_embed",
    "draft": "draft_model speculative speculative_decoding speculative_sampling",
    "dropout": "attention_dropout dropout_rate resid_dropout",
    "dtype": "amp mixed_precision precision",
    "eval_test": "test_at_end",
    "evaluate": "eval eval_only test",
    "grad_accumulation": "accum_steps grad_accum grad_accum_steps gradient_accumulation"
    " gradient_accumulation_steps",
    "grad_checkpoint": "gradient_checkpointing activation_checkpointing",
    "grad_clip": "clip clip_grad clip_grad_norm clip_norm gradient_clip max_grad_norm",
    "identifier": "checkpoint_path ckpt ckpt_path load"
    " resume_from resume_from_checkpoint",
    "inference": "chat generate generation interactive repl sample",
    "init_from": "from_pretrained model model_name model_name_or_path model_path pretrained",
    "keep": "keep_last save_total_limit",
    "learning_rate": "base_lr lr max_lr peak_lr",
    "lora_alpha": "alpha",
    "lora_rank": "lora lora_r rank use_lora",
    "lr_cooldown": "cooldown cooldown_frac decay_frac warmdown warmdown_ratio",
    "lr_schedule": "lr_scheduler lr_scheduler_type schedule scheduler",
    "lr_warmup": "warmup warmup_iters warmup_steps num_warmup_steps",
    "max_tokens": "gen_len length max_gen_len max_new_tokens n_predict num_tokens",
    "min_lr": "final_lr lr_end lr_min min_learning_rate",
    "mlp": "act activation activation_function hidden_act",
    "mlp_dim": "d_ff dim_feedforward ff_dim ffn_dim ffn_hidden_size intermediate_size",
    "num_blocks": "depth layers n_layer n_layers num_hidden_layers num_layers",
    "num_heads": "attention_heads heads n_head n_heads num_attention_heads",
    "num_iters": "iters lr_decay_iters lr_decay_steps max_iters max_steps num_iterations num_steps"
    " num_train_steps steps total_steps train_steps",
    "num_kv_heads": "kv_heads n_kv_head n_kv_heads num_key_value_heads",
    "num_samples": "n_samples",
    "optimizer": "optim",
    "prompt": "start",
    "quantize": "bits q_bits quant",
    "repetition_penalty": "rep_penalty repeat_penalty",
    "sample_prompt": "eval_prompt eval_prompts sample_prompts",
    "save_dir": "checkpoint_dir ckpt_dir log_dir out out_dir output_dir save_path",
    "seed": "random_seed rng_seed",
    "steps_per_eval": "eval_every eval_freq eval_interval eval_steps val_every",
    "steps_per_report": "log_every log_interval logging_steps print_every report_every",
    "steps_per_save": "checkpoint_every save_every save_freq save_interval save_steps",
    "stop": "extra_eos_token reverse_prompt stop_sequence stop_sequences stop_words",
    "teacher": "teacher_model teacher_path",
    "temperature": "temp",
    "text": "data data_file data_path input input_file text_file train_data train_file",
    "text_field": "content_key dataset_text_field text_column text_key",
    "top_k": "topk",
    "top_p": "nucleus topp",
    "valid_fraction": "split test_size val_fraction val_size val_split valid_split",
    "weight_decay": "wd",
}
# Names without a counterpart here, and what to do instead.
NOT_NEEDED = {
    "adapter_file adapter_path resume_adapter_file": "a LoRA run is a run like any other:"
    " --save_dir is where it is saved, --identifier names it",
    "advanced hardware": "a section needs flags below it, such as `dim: 8`",
    "always_save_checkpoint": "each evaluation saves; --keep counts what is kept",
    "attention log_attention plot_attention show_attention": "python -m extras.attention draws it",
    "benchmark": "python -m extras.benchmark takes these flags",
    "bf16 fp16": "--dtype bfloat16 is for processors that are faster with it",
    "bias": "new models have no biases",
    "cases": "python -m extras.cases scores files of them",
    "checkpoint": "gradient checkpointing takes no value; --identifier names a checkpoint",
    "checkpoints": "--save_dir names their folder, --steps_per_save their interval, --keep how"
    " many stay",
    "compile": "every step is compiled",
    "cpu": "the CPU is the default",
    "cuda mps": "--gpu selects an Apple or NVIDIA GPU",
    "device": "--gpu, or nothing for the CPU",
    "distill_from": "python -m extras.collect --distill_from collects a corpus",
    "epochs max_epochs n_epochs num_epochs num_train_epochs": "--num_iters counts steps; the start"
    " screen shows the steps per epoch",
    "eval_batches eval_iters test_batches val_batches": "--eval_tokens counts tokens, not batches",
    "export export_gguf gguf_path hf_path": "python -m extras.export writes a folder or FILE.gguf",
    "fine_tune_type peft train_type": "--lora_rank trains adapters, else all weights are trained",
    "ignore_eos": "--no-stop_at_end goes on after the end of a text",
    "load_in_4bit load_in_8bit": "--quantize 4 or 8, for sampling and --evaluate, and for"
    " python -m extras.export",
    "mask_prompt": "the loss is that of all tokens",
    "plot": "python -m extras.plot draws losses",
    "prompts_file": "python -m extras.batch continues each line of a file",
    "resume": "a run resumes by itself; --identifier names another, --new_model starts over",
    "seeds": "one --seed for each run; a loop over values trains several",
    "stream": "text is always printed as it is sampled",
    "tie tie_embeddings tie_weights tie_word_embeddings weight_tying": "tied, unless --untie",
    "train": "training is the default",
    "train_fraction train_split": "--valid_fraction is the share that is held out: 1 minus this",
    "tensorboard trackio wandb wandb_log": "--report_to wandb, or tensorboard",
}
# Flags, and values that they do not take, with what to do instead.
OTHER_VALUES = {
    "dataset": {
        "openwebtext c4 fineweb pile": "download files of it, and name them by --text",
        "penn_treebank treebank": "ptb",
        "shakespeare shakespeare_char": "tinyshakespeare, by characters unless --tokenizer is set",
        "text": "--text names files of yours",
        "wikitext wikitext-2": "wikitext2",
        "wikitext-103": "wikitext103",
    },
    "dtype": {"bf16 float16 fp16 half mixed": "bfloat16", "fp32 float": "float32"},
    "init_from": {
        "gpt2 gpt2-medium gpt2-large gpt2-xl": "GPT-2's weights cannot be loaded; --config gpt2"
        " trains a new model of its size",
        "resume": "to resume a run, rerun its command, or name it by --identifier",
        "scratch": "leave --init_from out",
    },
    "lr_schedule": {"wsd trapezoidal": "linear, with --lr_cooldown 0.2"},
    "mlp": {"gelu_new geglu": "gelu", "relu": "relu2", "silu swish": "swiglu"},
    "optimizer": {"adam sgd adafactor lion": "adamw or muon"},
}


RECIPES = Path(__file__).parent / "recipes"


def explain(name, flags):
    """A hint for a name that is none of a command's `flags`; None if there is none."""
    for ours, theirs in OTHER_NAMES.items():
        if ours in flags and name in theirs.split():
            return f"--{name} is --{ours} here"
    for theirs, text in NOT_NEEDED.items():
        named = set(re.findall(r"--(?:no-)?(\w+)", text))
        if named <= {name, *flags} and name in theirs.split():
            return f"--{name}: {text}"
    return None


def explain_word(word, flags):
    """A hint for a word that belongs to none of a command's `flags`; None if there is none."""
    name, equals, _ = word.partition("=")
    if equals and name in flags:
        return f"--{word}?"
    if word.endswith(".py") and "config" in flags:
        return "flags are typed, or come from a YAML file or a recipe: --config first"
    flag = None
    if os.path.exists(word):
        flag = "text"
    if word in CORPORA and word != "text":
        flag = "dataset"
    if os.path.exists(RECIPES / f"{word}.yaml") or word.endswith((".yaml", ".yml")):
        flag = "config"
    if flag in flags:
        return f"is --{flag} before {word} missing?"
    return None


def explain_value(flag, value):
    """A hint for a value that a flag does not take; None if there is none."""
    for theirs, text in OTHER_VALUES.get(flag, {}).items():
        if value.lower() in theirs.split():
            return text
    return None

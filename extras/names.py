"""Other programs' names for flags.

Whoever passes one, on the command line or in a --config file, is told ours.
"""

# Our flags and their names in other programs.
OTHER_NAMES = {
    "batch_size": "batch bsz device_batch_size micro_batch_size per_device_train_batch_size",
    "beta1": "adam_beta1 b1",
    "beta2": "adam_beta2 b2",
    "context_size": "block_size context context_length ctx max_length max_position_embeddings"
    " max_seq_len max_seq_length n_ctx n_positions seq_len seq_length sequence_length",
    "dataset": "corpus dataset_name",
    "dim": "d_model emb_dim embed_dim embedding_dim hidden_dim hidden_size model_dim n_embd"
    " n_embed",
    "draft": "draft_model",
    "dtype": "amp bf16 fp16 mixed_precision precision",
    "evaluate": "eval eval_only test",
    "export": "export_gguf gguf_path hf_path",
    "grad_accumulation": "accum_steps grad_accum grad_accum_steps gradient_accumulation"
    " gradient_accumulation_steps",
    "grad_checkpoint": "gradient_checkpointing activation_checkpointing",
    "grad_clip": "clip clip_grad clip_grad_norm clip_norm gradient_clip max_grad_norm",
    "identifier": "adapter_path checkpoint_path ckpt ckpt_path load resume_adapter_file"
    " resume_from resume_from_checkpoint",
    "inference": "chat generate interactive repl sample",
    "init_from": "from_pretrained model model_name model_path pretrained",
    "keep": "keep_last save_total_limit",
    "learning_rate": "base_lr lr max_lr peak_lr",
    "lora_alpha": "alpha",
    "lora_rank": "lora lora_r rank",
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
    "weight_decay": "wd",
}
# Names without a counterpart here, and what to do instead.
NOT_NEEDED = {
    "bias": "no layer has a bias",
    "compile": "every step is compiled",
    "cpu": "the CPU is the default",
    "cuda mps": "--gpu selects an Apple or NVIDIA GPU",
    "device": "--gpu, or nothing for the CPU",
    "distill_from": "python -m extras.collect --distill_from collects a corpus",
    "epochs max_epochs n_epochs num_epochs num_train_epochs": "--num_iters counts steps",
    "eval_batches eval_iters val_batches": "--eval_tokens counts tokens, not batches",
    "ignore_eos": "--no-stop_at_end goes on after the end of a text",
    "resume": "a run resumes by itself; --identifier names another, --new_model starts over",
    "stream": "text is always printed as it is sampled",
    "tie tie_embeddings tie_weights tie_word_embeddings weight_tying": "tied, unless --untie",
    "train": "training is the default",
    "tensorboard trackio wandb wandb_log": "--report_to wandb, or tensorboard, trackio",
}


def explain(name):
    """A hint for a name that is not a flag here; None if the name is unknown."""
    for ours, theirs in OTHER_NAMES.items():
        if name in theirs.split():
            return f"--{name} is --{ours} here"
    for theirs, text in NOT_NEEDED.items():
        if name in theirs.split():
            return f"--{name}: {text}"
    return None

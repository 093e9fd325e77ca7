"""The flags of other programs: those that have another name here, and those that are not here."""

# {a flag: its names in other programs, where meaning and unit are the same, on one device}
ALIASES = {
    "dataset": "dataset_name",
    "valid_text": "eval_file val_data val_file validation_file",
    "valid_fraction": "val_fraction val_split",
    "text_field": "text_column",
    "context_size": (
        "block_size context_length n_ctx seq_len seq_length max_seq_len max_seq_length "
        "sequence_length"
    ),
    "num_blocks": "depth n_layer n_layers num_layers num_hidden_layers",
    "dim": "d_model embedding_dim hidden_size n_embd n_embed",
    "num_heads": "n_head n_heads num_attention_heads",
    "num_kv_heads": "n_kv_head n_kv_heads num_key_value_heads",
    "mlp": "activation",
    "mlp_dim": "d_ff ff_dim ffn_dim intermediate_size",
    "seed": "random_seed",
    "optimizer": "optim",
    "batch_size": "device_batch_size micro_batch_size per_device_train_batch_size",
    "grad_accumulation": "gradient_accumulation_steps grad_accum_steps",
    "learning_rate": "lr max_lr",
    "min_lr": "final_lr",
    "weight_decay": "wd",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "lr_warmup": "warmup_iters warmup_steps num_warmup_steps",
    "lr_schedule": "lr_scheduler_type",
    "grad_clip": "clip_grad_norm gradient_clip_val max_grad_norm",
    "num_iters": (
        "iters max_iters max_steps max_train_steps num_iterations num_steps total_steps train_steps"
    ),
    "patience": "early_stopping_patience",
    "steps_per_report": "log_every log_every_n_steps log_interval logging_steps print_every",
    "steps_per_eval": "eval_every eval_interval eval_steps",
    "steps_per_save": (
        "ckpt_every ckpt_interval every_n_train_steps save_every save_interval save_steps"
    ),
    "quantize": "quantization",
    "keep": "save_top_k save_total_limit",
    "grad_checkpoint": "checkpoint gradient_checkpointing",
    "max_tokens": "max_new_tokens n_predict num_tokens",
    "num_samples": "num_return_sequences",
    "temperature": "temp",
    "draft": "draft_model",
    "inference": "interactive",
    "prompt": "start",
    "identifier": "ckpt resume_from_checkpoint",
    "save_dir": "out_dir output_dir",
}

# {names: what to say}
NOT_HERE = {
    "epochs num_epochs num_train_epochs max_epochs": (
        "--num_iters counts steps, and the start screen says how many an epoch has"
    ),
    "eval_iters eval_batches val_batches": "--eval_tokens counts tokens, not batches",
    "check_val_every_n_epoch eval_strategy evaluation_strategy": (
        "--steps_per_eval is the interval in steps"
    ),
    "save_strategy save_only_best load_best_model_at_end": (
        "the best checkpoint is kept: sample from it with --identifier best"
    ),
    "sample_every sample_interval generate_every": "a sample follows each save: --steps_per_save",
    "resume resume_from auto_resume": (
        "the same command resumes its run; --identifier RUN names another, and RUN@5000 its step"
    ),
    # In main.py, --checkpoint is --grad_checkpoint; other programs have no such flag.
    "checkpoint checkpoints ckpt_path": "--identifier names a checkpoint",
    "checkpoint_dir save_path": "--save_dir is the folder of all runs",
    "overwrite_output_dir": "nothing is overwritten; --new_model begins a new run",
    "logging_dir run_name experiment_name model_tag": (
        "each run has a folder in --save_dir, named by its flags"
    ),
    "max_time max_hours time_limit": "--max_minutes ends the run",
    "device accelerator cuda mps cpu use_cpu": (
        "the CPU is the default, --gpu an Apple or NVIDIA GPU"
    ),
    "devices num_nodes strategy backend": "several processes: mlx.launch, see extras/README.md",
    "threads n_threads num_threads": "all cores are used; taskset gives fewer",
    "num_workers dataloader_num_workers": "texts are mapped into memory: nothing loads them",
    "deterministic": "runs are exact; python -m extras.check tests it",
    "flash_attn use_flash flash_attention use_flash_attention": (
        "see attend in main.py, and its fast version"
    ),
    "mixed_precision precision amp bf16 fp16 fp32 tf32": (
        "--dtype bfloat16 is for processors that are faster with it"
    ),
    "model from_pretrained model_name_or_path": "--init_from names a model to start from",
    "data data_path train_file train_data train_path input input_file text_file": (
        "--text names files of yours, --dataset a corpus"
    ),
    "logger wandb wandb_log wandb_project wandb_run_name tensorboard": (
        "--report_to wandb; log.csv in the run's folder has all"
    ),
    "compile torch_compile": "steps are always compiled",
    "stream streaming": "continuations are always streamed",
    "speculative_sampling speculative_decoding": "--draft names a draft model",
    "distill distill_from groq_api_key teacher_model": "see python -m extras.collect",
    "export": "python -m extras.export PATH",
    "plot": "python -m extras.plot FILE",
    "attention log_attention": "python -m extras.attention FILE --prompt TEXT",
    "cases": "python -m extras.cases FILE, with no flag before it",
    "prompts_file": "python -m extras.batch FILE",
    "output": "python -m extras.batch FILE --output FILE",
    "perplexity": "python main.py --evaluate valid",
    "count_parameters num_parameters": "the start screen says how many a model has",
    "benchmark throughput memory profile generation": (
        "python -m extras.benchmark measures memory, training and sampling, without a flag for each"
    ),
    "test_batches": "python -m extras.benchmark measures one --batch_size at a time",
    "generate sample": "--prompt continues a text, --inference several",
    "mqa use_mqa multi_query_attention": "--num_kv_heads 1",
    "dropout_annealing": "--dropout_final is the rate at the end",
    "accumulate_grad_batches": "--grad_accumulation",
    "bias tie_embeddings tie_word_embeddings weight_tying": "no biases; tied, unless --untie",
    "rope_theta rope_scaling norm_eps window sliding_window attn_dropout": (
        "edit the section Model of main.py"
    ),
    "label_smoothing_factor z_loss ignore_index": "edit training_loss in main.py",
    "adam_epsilon": "MLX's, 1e-8; edit make_adamw in main.py",
    "ema ema_decay": "--average 0.2 averages the weights over about the last fifth of the steps",
    "total_batch_tokens total_batch_size": (
        "a step has --batch_size times --grad_accumulation rows of --context_size tokens"
    ),
    "merges_file vocab_file": "--tokenizer takes a tokenizer.json",
    "do_train do_eval do_sample": (
        "main.py trains, unless --evaluate, --prompt or --inference is given"
    ),
    "max_length min_length": "--max_tokens counts new tokens",
    "num_beams": "no beams; --temperature 0 is greedy",
    "add_bos system chat_template messages instruct": "models continue texts here: no chats",
    "validation_split_percentage train_split train_fraction train_output val_output": (
        "--valid_fraction is the share that is held out"
    ),
    "split": "--evaluate valid or test; --valid_fraction is the share that is held out",
    "use_lora lora peft": "--lora_rank 8 trains adapters on --init_from",
}

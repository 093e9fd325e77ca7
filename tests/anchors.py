"""Lines of main.py that tests edit, by name. Each stands there once: see test_code.py.

Whoever rewords one of them enters the new wording here.
"""

# ---- Top ----------------------------------------------------------------------------------------

IMPORT = "import datasets\n"
TOP = 'FLAGS["model"] = {'
MODEL_SECTION = "# ---- Model ---"
RECENT_LOSS = "    recent_loss: float = 0.0  # the sum of their losses\n"
COUNT_LOSS = '    run.count_step(inputs.size, time.perf_counter() - start, metrics["loss"])\n'

# ---- Model --------------------------------------------------------------------------------------

ATTEND = "    scale = queries.shape[-1] ** -0.5\n    return mx.fast"
MASK = "mask=mask)"
QK_NORM = "        if config.qk_norm:\n"
JOINED = "    joined = attended"
PROJECT_OUT = "return self.o_proj(joined)"
ROTATE = "def rotate(x, frequencies, offset):\n"
RELU2 = "mx.square(nn.relu(x))\n"
RELU2_ENTRY = '"relu2": (relu2,'
MLP = "class MLP(nn.Module):"
DOWN_PROJECTION = "        self.down_proj = nn.Linear(config.mlp_dim, config.dim, bias=False)\n"
PROJECT_DOWN = "        return self.down_proj(inner)\n"
EMBEDDINGS = "        self.embed_tokens = "
EMBED = "        hidden = dropout(self.embed(tokens), dropout_masks, mask_index=0)\n"
NORM = "        self.norm = nn.RMSNorm(config.dim, config.norm_eps)\n"
FINAL_NORM = "        return self.norm(hidden)\n"
HEAD = "nn.Linear(config.dim, config.vocab_size, bias=False)"
CALL = "        return self.logits(hidden)\n"
LOGITS = "        return output_layer(hidden).astype(mx.float32)\n"
NORMAL_INIT = "rng.standard_normal(shape"
EMBEDDINGS_SCALE = "* 5 / model.config.dim"
LAST_OF_INIT = "    model.load_weights(weights)\n"

# ---- Loss, optimizer, batches -------------------------------------------------------------------

TRAINING_LOSS = "nn.losses.cross_entropy(logits, targets)  # [B, L]"
LOSS = "return (losses * scale).sum()"
CLIP = "return optim.clip_grad_norm(gradients, max_norm)"
MOMENTUM = "momentum=0.9"
NEWTON_SCHULZ = "  for _ in range(5):"
COSINE = '"cosine": cosine_schedule'
SCHEDULES = "SCHEDULES = {"
WARMUP = "    warmup = min("
WARMED_UP = "(iteration, flags) * warmup"
RATE = "    return flags.learning_rate *"
ORDER = "default_rng([self.seed, epoch])"

# ---- Training and evaluation --------------------------------------------------------------------

STEP = "    metrics = step_fn(dropout_rate, inputs, targets, row_keys)\n"
IS_DONE = "is_time_up or run.iteration >="
DIVERGENCE = """\
            if not math.isfinite(metrics["loss"] + metrics["gradient_norm"]):
                raise reports.divergence_error(run, "loss or gradient", run.iteration - 1)
"""
METRICS = '{"loss": nn.losses.cross_entropy(logits, targets)}'
BEGIN_EVALUATION = "    totals = Counter()"
END_EVALUATION = """\
    stop_signal, _ = ranks.agree(stop_signal)
    if stop_signal:
        interrupts"""

# ---- Runs ---------------------------------------------------------------------------------------

LOADED = "            mx.eval(model.parameters())\n        return model\n"
VOCAB_SIZE = "Config(dataset.tokenizer.vocab_size, "
BATCHES = "    batches = Batches(dataset.train.tokens,"
INIT = "init_weights(model, flags.seed)"

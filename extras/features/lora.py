"""LoRA: train small adapters on top of a frozen model (Hu et al. 2021).

    python main.py --init_from MODEL --lora_rank 8 --text mine.txt

A LoRA run's checkpoints hold only the adapters and identify their base by its SHA1.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from main import normal_init


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update: [..., I] to [..., O]."""

    def __init__(self, layer, lora_a, scale):
        super().__init__()
        self.layer = layer  # frozen
        self.lora_a = lora_a  # [rank, I]
        self.lora_b = mx.zeros((len(layer.weight), len(lora_a)))  # [O, rank]
        self.scale = scale

    def __call__(self, hidden):
        update = (hidden @ self.lora_a.T) @ self.lora_b.T  # [..., rank] in between
        return self.layer(hidden) + update * self.scale


def add_lora(model, rank, alpha, seed):
    """Replaces each linear layer of the blocks with a LoRALinear; nothing else is trained then.

    A is normal with standard deviation 1 / sqrt(inputs), B is 0, so the update starts at 0.
    """

    def replace(name, layer):
        if not name.startswith("model.layers.") or not isinstance(layer, nn.Linear):
            return layer
        inputs = layer.weight.shape[1]
        lora_a = normal_init(f"{name}.lora_a", (rank, inputs), seed) * inputs**-0.5
        return LoRALinear(layer, lora_a, alpha / rank)

    layers = model.leaf_modules()
    model.update_modules(tree_map_with_path(replace, layers, is_leaf=nn.Module.is_module))
    model.freeze()
    model.unfreeze(keys=["lora_a", "lora_b"], strict=False)  # not strict: most layers have neither


def merge(base, adapters, rank, alpha):
    """The weights of the model `base`, {name: array}, with the adapters' updates added."""
    weights = dict(tree_flatten(base.parameters()))
    for name in adapters:
        if name.endswith(".lora_a"):
            layer = name.removesuffix(".lora_a")
            update = adapters[f"{layer}.lora_b"] @ adapters[name]  # [O, rank] @ [rank, I] = [O, I]
            weights[f"{layer}.weight"] += update * (alpha / rank)
    return weights

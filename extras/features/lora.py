"""LoRA: train small adapters on top of a frozen model (Hu et al. 2021).

    python main.py --init_from MODEL --lora_rank 8 --text mine.txt

A LoRA run's checkpoints hold only the adapters and identify their base by its SHA1.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from main import linear_product, normal_init


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update: [..., I] to [..., O]."""

    def __init__(self, layer, rank, alpha):
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.weight = layer.weight  # [O, I], frozen
        if "bias" in layer:
            self.bias = layer.bias  # [O], frozen
        self.scale = alpha / rank
        self.lora_a = mx.zeros((rank, inputs))
        self.lora_b = mx.zeros((outputs, rank))

    def __call__(self, hidden):
        update = (hidden @ self.lora_a.T) @ self.lora_b.T  # [..., rank] in between
        product = linear_product(hidden, self.weight) + update * self.scale
        if "bias" in self:
            product = product + self.bias
        return product


def add_lora(model, rank, alpha, seed):
    """Replaces each linear layer of the blocks with a LoRALinear; nothing else is trained then.

    A is normal with standard deviation 1 / sqrt(inputs), B is 0, so the update starts at 0.
    """

    def replace(layer):
        return LoRALinear(layer, rank, alpha) if isinstance(layer, nn.Linear) else layer

    for block in model.model.layers:
        layers = block.leaf_modules()
        block.update_modules(tree_map(replace, layers, is_leaf=nn.Module.is_module))
    model.freeze()
    model.unfreeze(keys=["lora_a", "lora_b"], strict=False)  # not strict: most layers have neither
    weights = []
    for name, adapter in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_a"):
            normal = normal_init(name, adapter.shape, seed)
            weights.append((name, normal * adapter.shape[1] ** -0.5))
    model.load_weights(weights, strict=False)


def merge(base, adapters, rank, alpha):
    """The weights of the model `base`, {name: array}, with the adapters' updates added."""
    weights = dict(tree_flatten(base.parameters()))
    for name in adapters:
        if name.endswith(".lora_a"):
            layer = name.removesuffix(".lora_a")
            update = adapters[f"{layer}.lora_b"] @ adapters[name]  # [O, rank] @ [rank, I] = [O, I]
            weights[f"{layer}.weight"] += update * (alpha / rank)
    return weights

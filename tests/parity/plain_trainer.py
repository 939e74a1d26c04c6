"""The recipe in plain PyTorch: one process, the whole micro-batch at once, torch's own AdamW and clipping.

Written from the recipe, not from ds_seg's engine. With `bf16` the backbone's parameters are bf16 and AdamW moves FP32
copies of them, which are rounded back after every step; several micro-batches add up in FP32.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from plain_model import PlainModel
from recipe import DEPTH, Recipe, make_micro_batches

Training = dict[str, object]


class PlainTrainer:
    """Trains one model by one recipe.

    Attributes:
        masters: the FP32 value of every parameter by name; in FP32 the parameter itself.
    """

    def __init__(self, recipe: Recipe, initial: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.recipe = recipe
        self.model = PlainModel(recipe)
        self.model.load_state_dict(initial)
        self.model.to(dtype)
        if recipe.bf16:
            self.model.backbone.bfloat16()
        self.parameters = dict(self.model.named_parameters())
        self.masters = {name: self._master(parameter) for name, parameter in self.parameters.items()}
        groups = [
            {"params": [master], "weight_decay": self._decay(name), "base_lr": recipe.lr * self._lr_scale(name)}
            for name, master in self.masters.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999), eps=1e-8)
        self.averages = {name: master.detach().clone() for name, master in self.masters.items()}
        self.steps_made = 0

    def train(self) -> Training:
        """Train to the end: losses and norms of all steps, and the final values."""
        losses, norms = [], []
        for step in range(self.recipe.steps):
            if step in self.recipe.bad_steps:
                continue
            loss, norm = self._step(step)
            losses.append(loss)
            norms.append(norm)
        buffers = {name: value for name, value in self.model.state_dict().items() if name not in self.masters}
        final = {name: master.detach().clone() for name, master in self.masters.items()}
        return {"losses": losses, "norms": norms, "final": {**final, **buffers}, "averages": self.averages}

    def _step(self, step: int) -> tuple[float, float]:
        total = 0.0
        for batch in make_micro_batches(self.recipe, step):
            loss = self.model(batch)
            (loss / self.recipe.accumulation).backward()
            self._collect_gradients()
            total += loss.item() / self.recipe.accumulation
        limit = self.recipe.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(list(self.masters.values()), limit).item()
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * self._schedule(self.steps_made)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._round_masters()
        if self.recipe.ema_momentum:
            self._average()
        self.steps_made += 1
        return total, norm

    def _average(self) -> None:
        momentum = min(self.recipe.ema_momentum, (1 + self.steps_made) / (100 + self.steps_made))
        for name, average in self.averages.items():
            average.copy_((1 - momentum) * average + momentum * self.masters[name].detach())

    def _schedule(self, step: int) -> float:
        poly = 1 - step / self.recipe.max_steps
        if step >= self.recipe.warmup_steps:
            return poly
        return poly * (1 - (1 - step / self.recipe.warmup_steps) * (1 - self.recipe.warmup_ratio))

    def _lr_scale(self, name: str) -> float:
        if self.recipe.layer_decay is None:
            return 1.0
        layers = DEPTH + 2
        layer = layers - 1
        if name.startswith(("backbone.patch_embed", "backbone.cls_token", "backbone.pos_embed")):
            layer = 0
        elif name.startswith("backbone.blocks"):
            layer = int(name.split(".")[2]) + 1
        return self.recipe.layer_decay ** (layers - 1 - layer)

    def _decay(self, name: str) -> float:
        exempt = self.parameters[name].ndim == 1
        if name in ("backbone.cls_token", "backbone.pos_embed"):
            exempt = not self.recipe.decay_embeddings
        return 0.0 if exempt else self.recipe.weight_decay

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.detach().float()) if parameter.dtype == torch.bfloat16 else parameter

    def _collect_gradients(self) -> None:
        """Add what a micro-batch left in bf16 parameters to the FP32 gradients of their masters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter:
                master.grad = parameter.grad.float() + (0 if master.grad is None else master.grad)
                parameter.grad = None

    def _round_masters(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

"""Parameter groups and the learning-rate schedule, by the names that a config uses."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor, PolyLR
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS
from torch import nn

from pretrain.layer_decay import lr_rate

VIT = "backbone.vit."
# Positions and special tokens: not one-dimensional, but no weights of a layer.
UNDECAYED = ("cls_token", "reg_token", "pos_embed", "pos_field", "cls_pos")


def param_groups(
    model: nn.Module, *, lr: float, weight_decay: float, layer_decay: float = 1.0, decay_all: bool = False
) -> list[dict[str, Any]]:
    """AdamW's parameter groups, one for each combination of settings.

    Args:
        model: a segmentor whose ViT is ``backbone.vit``.
        weight_decay: of weight matrices and convolutions. Norms, biases, LayerScale, positions and special
            tokens have 0, unless ``decay_all``.
        layer_decay: the lr of block i of L is ``lr * layer_decay ** (L - i)``, that of everything before the
            first block ``lr * layer_decay ** (L + 1)``; the final norm and the head have ``lr``.
    """
    depth = len(model.get_submodule(VIT + "blocks"))  # type: ignore[arg-type]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = decay_all or (parameter.ndim > 1 and name.rpartition(".")[2] not in UNDECAYED)
        rate = lr_rate(name.removeprefix(VIT), depth, layer_decay) if name.startswith(VIT) else 1.0
        groups.setdefault((lr * rate, weight_decay if decays else 0.0), []).append(parameter)
    return [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PosfieldOptimConstructor(DefaultOptimWrapperConstructor):
    """:func:`param_groups` for mmengine: ``paramwise_cfg=dict(layer_decay=1.0, decay_all=False)``.

    mmengine's own rules (``norm_decay_mult``, ...) make a group for each tensor: AdamW cannot fuse its loops.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """mmengine calls it once, with the whole model and an empty list."""
        params.extend(param_groups(module, lr=self.base_lr, weight_decay=self.base_wd, **self.paramwise_cfg))


@PARAM_SCHEDULERS.register_module()
class PosfieldPolyLR(PolyLR):
    """Polynomial decay to a fraction of each group's own lr.

    ``lr_t = lr_0 * (f + (1 - f) * (1 - t / (T - 1)) ** power)`` for iteration t of T, with f =
    ``eta_min_ratio``. mmengine's PolyLR takes an absolute ``eta_min``, which does not follow a sweep of the lr.
    MMSegmentation's Segmenter config has 1e-4, above B.3's whole grid: the lr would rise.
    """

    def __init__(self, optimizer: Any, eta_min_ratio: float, **options: Any) -> None:
        self.eta_min_ratio = eta_min_ratio
        super().__init__(optimizer, **options)

    def _get_value(self) -> list[float]:
        left = max(0.0, 1 - self.last_step / max(1, self.total_iters))
        factor = self.eta_min_ratio + (1 - self.eta_min_ratio) * left**self.power
        return [base * factor for base in self.base_values]

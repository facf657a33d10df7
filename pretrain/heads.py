"""The projection head of DINO: MLP, normalized bottleneck and weight-normalized prototypes of fixed norm."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.precision import at_least_float32
from pretrain.settings import Settings, setting


class MLPSettings(Settings):
    """The MLP of a head."""

    hidden_dim: int = setting(2048, "width of the hidden layers", source="DINOv2", ge=1)
    bottleneck_dim: int = setting(256, "width of the output", source="DINOv2", ge=1)
    n_layers: int = setting(3, "linear layers", source="DINOv2", ge=1, le=64)


class HeadSettings(MLPSettings):
    """A head of DINO; each loss has its own (Table 6: separate heads)."""

    n_prototypes: int = setting(65536, "prototypes of a head", source="Table 6", ge=1)


class HeadOutput(NamedTuple):
    """Tokens in the bottleneck, and the prototypes to compare them with: the logits are their cosines."""

    bottleneck: Tensor  # [..., d], of norm 1
    prototypes: Tensor  # [K, d], of norm 1

    @property
    def logits(self) -> Tensor:
        """All of them, [..., K]: for small sizes and for tests."""
        return self.bottleneck @ self.prototypes.T


class ProjectionHead(nn.Module):
    """Tokens to the bottleneck and the prototypes (METHOD.md 5). Nothing needs all the logits at once.

    Args:
        in_dim: width of the tokens.
        n_prototypes: K.
        hidden_dim, bottleneck_dim, n_layers: of the MLP.
    """

    def __init__(
        self, in_dim: int, n_prototypes: int, hidden_dim: int, bottleneck_dim: int, n_layers: int
    ) -> None:
        super().__init__()
        self.mlp = mlp(in_dim, hidden_dim, bottleneck_dim, n_layers)
        self.last_layer = nn.Linear(bottleneck_dim, n_prototypes, bias=False)

    def forward(self, x: Tensor) -> HeadOutput:
        """[..., D] -> bottleneck rows [..., d] and prototypes [K, d], all of norm 1."""
        x = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):
            return HeadOutput(F.normalize(at_least_float32(x), dim=-1), unit_rows(self.last_layer.weight))


def mlp(in_dim: int, hidden_dim: int, out_dim: int, n_layers: int) -> nn.Sequential:
    """Linear layers with GELU between them, no batch norm: [..., in_dim] -> [..., out_dim]; PaKA's head."""
    widths = [in_dim, *[hidden_dim] * (n_layers - 1), out_dim]
    layers: list[nn.Module] = []
    for width, following in zip(widths[:-1], widths[1:]):
        layers += [nn.Linear(width, following), nn.GELU()]
    for layer in layers[::2]:  # after all are made: a seed gives the weights that it always gave
        assert isinstance(layer, nn.Linear)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers[:-1])


def unit_rows(weight: Tensor) -> Tensor:
    """[K, d] -> rows of norm 1, by torch's fused weight norm: a quarter of the time of ``F.normalize``."""
    return torch._weight_norm(weight, weight.new_ones(len(weight), 1), 0)

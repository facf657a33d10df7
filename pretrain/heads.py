"""The projection head of DINO: an MLP, a normalised bottleneck, and weight-normalised prototypes of fixed norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.prototypes import Projection


class ProjectionHead(nn.Module):
    """Tokens to the bottleneck, and the prototypes that they are compared with (METHOD.md 5: 3 layers, hidden 2048, bottleneck 256,
    65,536 prototypes). The logits are not made here: nothing needs all of them at once.

    Args:
        in_dim: width of the tokens.
        n_prototypes: K.
        hidden_dim, bottleneck_dim, n_layers: of the MLP.
    """

    def __init__(self, in_dim: int, n_prototypes: int, hidden_dim: int, bottleneck_dim: int, n_layers: int) -> None:
        super().__init__()
        self.mlp = mlp(in_dim, hidden_dim, bottleneck_dim, n_layers)
        self.last_layer = nn.Linear(bottleneck_dim, n_prototypes, bias=False)

    def forward(self, x: Tensor) -> Projection:
        """[..., D] -> bottleneck rows [..., d] and prototypes [K, d], all of norm 1."""
        x = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):
            rows = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
            return Projection(rows, unit_rows(self.last_layer.weight))


def mlp(in_dim: int, hidden_dim: int, out_dim: int, n_layers: int) -> nn.Sequential:
    """Linear layers with GELU between them, no batch norm: [..., in_dim] -> [..., out_dim]. The whole head of PaKA."""
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
    """[K, d] -> rows of norm 1, by the fused kernel of torch's weight norm: a quarter of the time of ``F.normalize``."""
    return torch._weight_norm(weight, weight.new_ones(len(weight), 1), 0)

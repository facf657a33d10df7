"""The projection head of DINO: an MLP, a normalised bottleneck, and weight-normalised prototypes of fixed norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Tokens to prototype logits (METHOD.md 5: 3 layers, hidden 2048, bottleneck 256, 65,536 prototypes).

    Args:
        in_dim: width of the tokens.
        n_prototypes: K.
        hidden_dim, bottleneck_dim, n_layers: of the MLP.
    """

    def __init__(self, in_dim: int, n_prototypes: int, hidden_dim: int, bottleneck_dim: int, n_layers: int) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (n_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for width, following in zip(widths[:-1], widths[1:]):
            layers += [nn.Linear(width, following), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = nn.Linear(bottleneck_dim, n_prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> logits [..., K]: cosines between the bottleneck and the prototypes."""
        x = self.mlp(x)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        x = F.normalize(x, dim=-1, eps=eps)
        return F.linear(x, F.normalize(self.last_layer.weight, dim=-1))

"""What a patch is like: the cosine similarity of its feature to those of all patches of the image."""

import torch.nn.functional as F
from torch import Tensor

from pretrain.errors import UserError

Place = tuple[float, float]


def similarity_to(features: Tensor, query: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Cosine of the patch at ``query`` (row, column) with every patch: [N, D] -> [h, w] float32 on the
    CPU."""
    x = F.normalize(features.detach().float(), dim=1)
    return (x @ x[query[0] * grid[1] + query[1]]).unflatten(0, grid).cpu()


def read_place(text: str) -> Place:
    """``0.25,0.5``: x and y in image units.

    Raises:
        UserError: not two numbers in [0, 1].
    """
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise UserError(f"query {text!r} is not x,y in image units, such as 0.25,0.5") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):  # nan is refused, too
        raise UserError(f"query {text!r} lies outside the image: x and y are from 0 to 1")
    return x, y

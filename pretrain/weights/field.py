"""A learned grid of positions as a position field, so that a public network can be trained on with crop-tied positions (ours)."""

import math
import warnings
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from pretrain.backbones.position import FIELD_INTERPOLATIONS, axis_weights, patch_centers
from pretrain.errors import UserError
from pretrain.weights.checkpoint import Checkpoint

# Least samples of a field for each cell of its grid. With fewer, the finest waves of the grid fall between the samples: to meet
# them at the patches, the field overshoots elsewhere, 50 times at one sample a cell and never twice from here on.
SAMPLES_A_CELL = Fraction(4, 3)


def grid_to_field(n_cells: int, n_samples: int, interpolation: str = "bicubic") -> Tensor:
    """A [F, G], float64: the samples of a field along one axis from the cells of a grid, which R reads back exactly, R A = 1.

    R [G, F] reads the field at the centers of G patches (:func:`pretrain.backbones.position.axis_weights`). A smooth resampling S
    of the cells, bicubic with replicated borders, is nearly its inverse; the least change makes it one: A = S + R^+ (1 - R S).
    """
    zero = torch.zeros(1, dtype=torch.float64)
    read = axis_weights(patch_centers(zero, zero + 1, n_cells)[0], n_samples, interpolation)
    corners = torch.arange(n_samples, dtype=torch.float64) / (n_samples - 1)  # of the image, where the field's samples stand
    cells = (corners * n_cells - 0.5) / max(n_cells - 1, 1)  # the same between the centers of the outermost cells
    smooth = axis_weights(cells, n_cells)
    return smooth + torch.linalg.pinv(read) @ (torch.eye(n_cells, dtype=torch.float64) - read @ smooth)


def with_position_field(checkpoint: Checkpoint, size: int, interpolation: str = "bicubic") -> Checkpoint:
    """The same network with its learned grid of positions as a field; one that has a field already stays as it is.

    On whole images of the grid's own size it is the same function. Elsewhere the field is a smooth continuation, as every rule by
    which grids are resampled, but no public one: those differ from each other, too.

    Args:
        size: F, samples a side of the field.
        interpolation: by which the field is read, ``bicubic`` | ``bilinear``.

    Raises:
        UserError: no positions; a field too small for the grid; an interpolation that fields do not have.
    """
    model_kwargs, path = checkpoint.model_kwargs, checkpoint.path
    encoding = model_kwargs.get("pos_encoding", "standard")
    if encoding == "field":
        return checkpoint
    if encoding == "none":
        raise UserError(f"weights: {path} has no absolute positions of which positions.encoding=field could make a field")
    if interpolation not in FIELD_INTERPOLATIONS:
        raise UserError(f"config: positions.interpolation={interpolation!r} is none of {FIELD_INTERPOLATIONS} for a position field")
    n_cls, side = int(model_kwargs["has_cls"]), model_kwargs["pos_grid"]
    least = math.ceil(side * SAMPLES_A_CELL)
    if size < least:
        raise UserError(
            f"config: positions.grid={size} is too small a field for the {side} x {side} positions of {path}; it takes {least}"
        )
    along = grid_to_field(side, size, interpolation)  # [F, G]
    state = dict(checkpoint.state)
    positions = state.pop("pos_embed")  # [1, 1 + G * G, D]
    grid = positions[0, n_cls:].double().T.unflatten(1, (side, side))  # [D, G, G]
    state["pos_field"] = (along @ grid @ along.T).unsqueeze(0).to(positions.dtype)  # [1, D, F, F]
    if n_cls:
        state["cls_pos"] = positions[:, :1].clone()
    became = f"its {side} x {side} positions become a field of {size} x {size} samples"
    warnings.warn(f"weights: {path}: {became}; the network is the same at {side} x {side} patches alone", stacklevel=2)
    return replace(
        checkpoint,
        state=state,
        model_kwargs={**model_kwargs, "pos_encoding": "field", "pos_grid": size, "pos_interpolation": interpolation},
        provenance={**checkpoint.provenance, "pos_grid_before": side},
    )

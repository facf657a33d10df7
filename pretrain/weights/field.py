"""Turn a learned grid of positions into a position field, so that a public network can continue with
crop-tied positions (ours)."""

import math
import warnings
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from pretrain.backbones.position import FIELD_INTERPOLATIONS, axis_weights, patch_centers
from pretrain.errors import UserError
from pretrain.weights.checkpoint import Checkpoint

# Fewest samples of a field for each cell of its grid. With fewer, the finest waves of the grid fall between
# the samples. The field then overshoots elsewhere to meet them at the patches: by a factor of 50 at one
# sample a cell, by less than 2 from here on.
SAMPLES_A_CELL = Fraction(4, 3)


def grid_to_field(n_cells: int, n_samples: int, interpolation: str = "bicubic") -> Tensor:
    """A [F, G], float64: maps the cells of a grid to the samples of a field along one axis. Reading the field
    gives them back.

    R [G, F] reads the field at the centers of G patches (:func:`pretrain.backbones.position.axis_weights`). A
    smooth resampling S of the cells, bicubic with replicated borders, is nearly its inverse. The smallest
    change makes it one: A = S + R^+ (1 - R S), so that R A = 1.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    read = axis_weights(patch_centers(zero, zero + 1, n_cells)[0], n_samples, interpolation)
    # of the image, where the field's samples stand
    corners = torch.arange(n_samples, dtype=torch.float64) / (n_samples - 1)
    # the same between the centers of the outermost cells
    cells = (corners * n_cells - 0.5) / max(n_cells - 1, 1)
    smooth = axis_weights(cells, n_cells)
    return smooth + torch.linalg.pinv(read) @ (torch.eye(n_cells, dtype=torch.float64) - read @ smooth)


def with_position_field(checkpoint: Checkpoint, size: int, interpolation: str = "bicubic") -> Checkpoint:
    """The same network with a position field in place of its learned grid. A network that has a field stays
    as it is.

    The function is the same on whole images of the grid's own size. At other sizes the field continues the
    grid smoothly. It equals no public rule for resampling grids; those differ from each other, too.

    Args:
        size: F, samples per side of the field.
        interpolation: how the field is read, ``bicubic`` | ``bilinear``.

    Raises:
        UserError: the network has no positions; the field is too small for the grid; fields have no such
            interpolation.
    """
    model_kwargs, path = checkpoint.model_kwargs, checkpoint.path
    encoding = model_kwargs.get("pos_encoding", "standard")
    if encoding == "field":
        return checkpoint
    if encoding == "none":
        raise UserError(
            f"weights: {path} has no absolute positions of which positions.encoding=field could make a field"
        )
    if interpolation not in FIELD_INTERPOLATIONS:
        raise UserError(
            f"config: positions.interpolation={interpolation!r} is none of {FIELD_INTERPOLATIONS} for a position field"
        )
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
    warnings.warn(
        f"weights: {path}: {became}; the network is the same at {side} x {side} patches alone", stacklevel=2
    )
    return replace(
        checkpoint,
        state=state,
        model_kwargs={
            **model_kwargs,
            "pos_encoding": "field",
            "pos_grid": size,
            "pos_interpolation": interpolation,
        },
        provenance={**checkpoint.provenance, "pos_grid_before": side},
    )

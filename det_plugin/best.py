"""The weights of a run's best evaluation, beside its checkpoints: on few images the last weights need not be the best."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from pretrain.errors import UserError
from pretrain.files import replacing, write_safetensors
from pretrain.log import log

FILE = "best.safetensors"


class Best:
    """Keeps the weights whose box AP is the highest so far, the first of equals.

    Args:
        folder: of the run.
        begins: the run begins: what another left goes.
    """

    def __init__(self, folder: Path, begins: bool) -> None:
        self.file = folder / FILE
        if begins:
            self.file.unlink(missing_ok=True)
        self.box_ap = float(metadata_of(self.file)["box_ap"]) if self.file.is_file() else -1.0

    def keep(self, model: nn.Module, box_ap: float, iteration: int) -> None:
        """Write the weights if they are better.

        Args:
            model: the detector, of one process.
            box_ap: of its evaluation, in percent.
            iteration: steps done.
        """
        if box_ap <= self.box_ap:
            return
        self.box_ap = box_ap
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        metadata = {"iteration": str(iteration), "box_ap": repr(box_ap)}
        with replacing(self.file) as partial:
            write_safetensors(partial, save(tensors, metadata))


def metadata_of(file: Path) -> dict[str, str]:
    """``iteration`` and ``box_ap`` of the best weights.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
        float(metadata["box_ap"]), int(metadata["iteration"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it to take the last weights") from error
    return metadata


def load(folder: Path, model: nn.Module, which: str) -> None:
    """Put the best weights into a model that holds the last ones.

    Args:
        which: ``best`` | ``last`` | ``auto``: the best where they were kept.

    Raises:
        UserError: there are none, though they are asked for; they do not fit.
    """
    file = folder / FILE
    if which == "last" or (which == "auto" and not file.is_file()):
        return
    if not file.is_file():
        raise UserError(f"{folder} has no {FILE}: it kept the last weights alone; take these")
    metadata = metadata_of(file)
    try:
        model.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{file} does not fit the run's detector ({str(error).splitlines()[0]})") from error
    log(f"{file}: iteration {metadata['iteration']}, box AP {float(metadata['box_ap']):.1f}")


def is_kept(deviations: dict[str, Any], evaluations: float) -> bool:
    """Whether a run keeps them: on other data than COCO's, with more than one evaluation."""
    return bool({"train_images", "val_images"} & deviations.keys()) and evaluations > 1

"""The weights of a run's best evaluation, beside its checkpoints: on few images the last weights need not be the best."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from det_plugin.protocol import DetectionProtocol
from pretrain.errors import UserError
from pretrain.files import replacing, write_safetensors
from pretrain.log import log, say

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
        self.box_ap, self.iteration = -1.0, 0
        if self.file.is_file():
            metadata = metadata_of(self.file)
            self.box_ap, self.iteration = float(metadata["box_ap"]), int(metadata["iteration"])

    def keep(self, model: nn.Module, box_ap: float, iteration: int) -> None:
        """Write the weights if they are better.

        Args:
            model: the detector, of one process.
            box_ap: of its evaluation, in percent.
            iteration: steps done.
        """
        if box_ap <= self.box_ap:
            return
        self.box_ap, self.iteration = box_ap, iteration
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        metadata = {"iteration": str(iteration), "box_ap": repr(box_ap)}
        with replacing(self.file) as partial:
            write_safetensors(partial, save(tensors, metadata))

    def is_stale(self, iteration: int, protocol: DetectionProtocol) -> bool:
        """Whether ``patience`` evaluations have passed, up to an iteration, since the best one."""
        waited = iteration - self.iteration
        return self.box_ap >= 0 and 0 < protocol.patience * protocol.eval_every <= waited

    def tell(self, iteration: int, protocol: DetectionProtocol) -> None:
        """Say at the end of a run what the best was, and why it is over before its last iteration."""
        why = (
            ""
            if iteration == protocol.max_iters
            else f"over after {iteration} iterations by patience={protocol.patience}; "
        )
        say(f"{why}best: box AP {self.box_ap:.2f} at iteration {self.iteration}, {self.file}")


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


def is_kept(protocol: DetectionProtocol, deviations: dict[str, Any]) -> bool:
    """Whether a run keeps them: where they may end it, and on other data than COCO's, with more than one evaluation."""
    is_own = bool({"train_images", "val_images"} & deviations.keys())
    return protocol.patience > 0 or (is_own and protocol.max_iters > protocol.eval_every)

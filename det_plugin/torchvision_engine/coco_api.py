"""pycocotools or its drop-in faster-coco-eval: whichever is installed, the reference implementation first."""

from types import ModuleType
from typing import Any, NamedTuple

from pretrain.errors import UserError


class CocoApi(NamedTuple):
    """The three names of pycocotools that this engine uses."""

    COCO: Any
    COCOeval: Any
    mask: ModuleType  # frPyObjects, merge, decode, encode


def coco_api() -> CocoApi:
    """Raises UserError when neither package is installed."""
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return CocoApi(COCO, COCOeval, mask)
    except ImportError:
        pass
    try:
        from faster_coco_eval import COCO, COCOeval_faster, mask

        return CocoApi(COCO, COCOeval_faster, mask)
    except ImportError as error:
        raise UserError("neither pycocotools nor faster-coco-eval is installed: pip install posfield[det]") from error

"""pycocotools, or its drop-in faster-coco-eval where only that is installed."""

from types import ModuleType
from typing import Any, NamedTuple

from pretrain.errors import UserError


class CocoApi(NamedTuple):
    """The three names of pycocotools that we use."""

    COCO: Any
    COCOeval: Any
    mask: ModuleType  # frPyObjects, merge, decode, encode


def coco_api() -> CocoApi:
    """The installed package. Raises UserError when there is neither."""
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
        raise UserError(
            "neither pycocotools nor faster-coco-eval is installed: pip install posfield[det]"
        ) from error

"""The first steps of a pipeline: random numbers that only depend on the place in the run, and loading that
names its files."""

import random
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmseg.datasets.transforms import LoadAnnotations, PhotoMetricDistortion
from mmseg.registry import TRANSFORMS

from pretrain.errors import UserError
from seg_plugin.data import check_whole
from seg_plugin.sampler import DrawnIndex


@TRANSFORMS.register_module()
class SeedFromPosition(BaseTransform):
    """First of a training pipeline: what the next transforms draw only depends on (seed, position in the
    run).

    So any number of data-loading and training processes augments images alike, and so does a resumed run. It
    seeds ``random`` and ``numpy.random``; mmcv's and MMSegmentation's transforms draw from nothing else. It
    does nothing without :class:`seg_plugin.sampler.PosfieldSampler`, or if a wrapper of the data set has
    changed the index.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Reads ``sample_idx``, changes nothing."""
        drawn = results.get("sample_idx")
        if isinstance(drawn, DrawnIndex):
            word = int(np.random.SeedSequence((drawn.seed, drawn.position)).generate_state(1)[0])
            random.seed(word)
            np.random.seed(word)
        return results


@TRANSFORMS.register_module()
class PosfieldLoadImage(LoadImageFromFile):
    """mmcv's ``LoadImageFromFile``, whose error names the file.

    The rest is mmcv's: 8-bit BGR, a gray image gets three equal channels, transparency is dropped, 16 bits
    become 8, and a photograph is turned by its EXIF orientation. Its mask has none, so it must be stored
    turned.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Adds ``img`` [H, W, 3], ``img_shape``, ``ori_shape``."""
        try:
            check_whole(results["img_path"])
            return super().transform(results)  # type: ignore[no-any-return]
        except UserError:
            raise
        except Exception as error:  # cv2.error, OSError, AssertionError, ...
            raise UserError(
                f"data: {results['img_path']} is no readable image ({_in_one_line(error)})"
            ) from error


@TRANSFORMS.register_module()
class PosfieldLoadLabels(LoadAnnotations):
    """MMSegmentation's ``LoadAnnotations``, whose error names the file."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds ``gt_seg_map`` [H, W] uint8."""
        try:
            return super().transform(results)  # type: ignore[no-any-return]
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
            raise UserError(
                f"data: {results['seg_map_path']} is no readable mask ({_in_one_line(error)})"
            ) from error


@TRANSFORMS.register_module()
class PosfieldDistortion(PhotoMetricDistortion):
    """MMSegmentation's ``PhotoMetricDistortion``, which fails at ``hue_delta=0``. Here the hue then stays as
    it is."""

    def hue(self, img: np.ndarray) -> np.ndarray:
        """[H, W, 3] uint8 BGR."""
        return super().hue(img) if self.hue_delta else img  # type: ignore[no-any-return]


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

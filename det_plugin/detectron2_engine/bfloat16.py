"""bfloat16 under any launcher. Detectron2's AMPTrainer only knows float16, so the model itself sets
autocast."""

from typing import Any

import torch

from det_plugin.detectron2_engine.requires import detectron2_installed

with detectron2_installed():
    from detectron2.modeling import GeneralizedRCNN


class BFloat16RCNN(GeneralizedRCNN):
    """Detectron2's detector, trained under bfloat16 autocast on CUDA. It needs no loss scaling.

    Evaluation stays in float32, as Detectron2's does.
    """

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As in ``GeneralizedRCNN``."""
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.training and self.device.type == "cuda"
        ):
            return super().forward(batched_inputs)

"""bfloat16 under any launcher: Detectron2's AMPTrainer knows float16 alone, so the model itself says what it computes in."""

from typing import Any

import torch

from det_plugin.requires import detectron2_installed

with detectron2_installed():
    from detectron2.modeling import GeneralizedRCNN


class BFloat16RCNN(GeneralizedRCNN):
    """Detectron2's detector that trains under bfloat16 autocast on CUDA; it needs no loss scaling. Evaluation is in float32, as
    Detectron2's is."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As ``GeneralizedRCNN``."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.training and self.device.type == "cuda"):
            return super().forward(batched_inputs)

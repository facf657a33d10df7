"""Comparisons with Detectron2."""

import det_plugin.detectron2_engine  # noqa: F401  which refuses where Detectron2 is not installed

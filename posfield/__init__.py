"""posfield: pre-train Vision Transformers for object detection, and compare them on detection and
segmentation."""

from importlib.metadata import version

__version__ = version("posfield")

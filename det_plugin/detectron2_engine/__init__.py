"""Fine-tuning with Detectron2, which is optional: without it, importing this package says what to do.

Raises:
    UserError: Detectron2 cannot be imported.
"""

from pretrain.errors import UserError

try:
    import detectron2.engine  # noqa: F401  which imports all the rest
except ImportError as error:
    told = "see its INSTALL guide (it is not on PyPI), or take --engine torchvision"
    raise UserError(f"Detectron2 is not installed: {told} ({error})") from error

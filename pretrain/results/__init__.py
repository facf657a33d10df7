"""What a run leaves, and what is made of it; a leaf above pretrain's errors, files and settings."""

from pretrain.results.provenance import file_hash
from pretrain.results.schema import Protocol, Result, read_result, write_result

__all__ = ["Protocol", "Result", "file_hash", "read_result", "write_result"]

"""What a run leaves (schema, provenance) and what is made of it (tables, report). A leaf above
pretrain.errors, pretrain.files and pretrain.settings."""

from pretrain.results.provenance import file_hash
from pretrain.results.schema import Protocol, Result, read_result, write_result

__all__ = ["Protocol", "Result", "file_hash", "read_result", "write_result"]

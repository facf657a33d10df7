"""What a run leaves (schema, provenance) and what is made of it (tables, report). A leaf above
pretrain.errors."""

from pretrain.results.choose import tables_of
from pretrain.results.dense import dense_table
from pretrain.results.merge import merge
from pretrain.results.paper import paper_tables
from pretrain.results.provenance import (
    config_hash,
    file_hash,
    git_commit,
    hardware,
    packages_in_use,
    peak_memory_mib,
    provenance,
)
from pretrain.results.published import PublishedRow, published_rows
from pretrain.results.render import render, render_all
from pretrain.results.schema import Protocol, Result, read_result, write_result
from pretrain.results.tables import comparison_table, pretraining_table

__all__ = [
    "Protocol",
    "PublishedRow",
    "Result",
    "comparison_table",
    "config_hash",
    "dense_table",
    "file_hash",
    "git_commit",
    "hardware",
    "merge",
    "packages_in_use",
    "paper_tables",
    "peak_memory_mib",
    "pretraining_table",
    "provenance",
    "published_rows",
    "read_result",
    "render",
    "render_all",
    "tables_of",
    "write_result",
]

"""Training pictures by copy descriptor: build an index, ask it for the nearest pictures, read their pixels again."""

from audit.index.build import IndexConfig, IndexSummary, build_index
from audit.index.descriptors import cache_folder, find_descriptor, open_descriptor
from audit.index.query import Index, index_info, search_image, verify_index

__all__ = [
    "Index",
    "IndexConfig",
    "IndexSummary",
    "build_index",
    "cache_folder",
    "find_descriptor",
    "index_info",
    "open_descriptor",
    "search_image",
    "verify_index",
]

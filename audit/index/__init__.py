"""Training pictures by copy descriptor: build an index, ask it for the nearest pictures, read their pixels again.

sources.py      what was given: which kind of source it is, and where its pixels are
items.py        a picture on its way into the index
files.py        folders and webdataset tars
tables.py       parquet, saved and hub data sets
embeddings.py   embeddings already computed
descriptors.py  which copy descriptor is used
embed.py        one part: read, decoded, described, committed
parts.py        parts as they lie in the folder: read, outdated, taken together
ann.py          nearest neighbours: FAISS proposes, exact cosines decide
build.py        `be-audit index build`
facts.py        index.json and index_info.json
query.py        an index to ask
"""

from audit.index.build import DEFAULT_INDEX, IndexConfig, IndexSummary, build_index
from audit.index.descriptors import cache_folder, find_descriptor, open_descriptor
from audit.index.query import Index, index_info, search_image, verify_index

__all__ = [
    "DEFAULT_INDEX",
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

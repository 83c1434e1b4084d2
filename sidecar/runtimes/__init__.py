"""Runtimes: one artifact variant loaded on one device, patches in and embeddings out."""

import os

# Every new shape of a run leaves compiled primitives behind, in a runtime's own cache and in oneDNN's. By default thousands are
# kept, and with pictures of any size and runs of any mix of them that is memory that grows for days. oneDNN reads this when it is
# first used, so it is said before any runtime is imported.
CACHED_PRIMITIVES = "32"
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", CACHED_PRIMITIVES)

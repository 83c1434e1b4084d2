"""Seeing: what is counted, the status page, traces, the log. Listens to the engine and the server, and decides nothing."""

import os as _os

# Where prometheus_client finds one of these as it is imported, it keeps every counter in files of that directory, shared with all
# processes that have it: vLLM's, which run beside this server and set it for themselves. They are for the import only.
_NAMES = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")
_hidden = {name: _os.environ.pop(name) for name in _NAMES if name in _os.environ}
import prometheus_client as _prometheus_client  # noqa: E402, F401

_os.environ.update(_hidden)

"""Seeing: what is counted, the status page, traces, the log. Listens to the engine and the server, and decides nothing."""

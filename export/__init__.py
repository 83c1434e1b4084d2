"""Export: a checkpoint becomes a sealed artifact. Needs torch; the sidecar does not."""

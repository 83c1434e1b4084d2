"""Figures and the demonstration. Nothing here is imported by the sidecar or the export."""

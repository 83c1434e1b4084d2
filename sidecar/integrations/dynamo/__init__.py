"""Dynamo's encode component over one or many sidecars: `python -m sidecar.integrations.dynamo`, docs/dynamo.md."""

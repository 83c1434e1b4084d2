"""The sidecar: a gRPC server that turns images and videos into vision embeddings, and its clients."""

__version__ = "0.1.0"

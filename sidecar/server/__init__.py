"""The server: gRPC in front of the engine."""

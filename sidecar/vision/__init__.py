"""What the model is: geometry, pixels and the tower. Imports nothing else of this project."""

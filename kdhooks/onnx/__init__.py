"""ONNX files: reading them, running them, and turning them into torch modules and back."""

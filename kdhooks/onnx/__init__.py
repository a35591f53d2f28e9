"""ONNX files: reads and runs them, and converts them to torch modules and back."""

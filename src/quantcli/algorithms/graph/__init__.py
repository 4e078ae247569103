"""Quantizers of whole ONNX graphs, activations included."""

"""Rooms of `quantize` on ONNX graphs: where the graph is, what is planned, what it is fed with, what is written."""

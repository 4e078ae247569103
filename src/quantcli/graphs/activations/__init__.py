"""Integers for activations too: which nodes, and how onnxruntime's quantizers are given them."""

"""An ONNX graph's matrices: moments of what flows through it, scales, codes."""

"""GGUF files: what llama.cpp calls a model's tensors, numbers and tokens; written, and read as a checkpoint."""

"""A quantized folder, trained end to end to speak as the float model does."""

"""A graph as a file: opened, checked, saved, described, brought to a later opset, and what it is fed with."""

"""The way through a graph: its matrices, what makes a tensor's channels, parts that run one after the other."""

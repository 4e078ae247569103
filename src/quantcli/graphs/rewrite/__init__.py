"""From a float graph to a float graph that computes the same: what integers need, what scales better, what QNN has."""

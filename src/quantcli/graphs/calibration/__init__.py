"""What flows through a graph: inputs made of text, tensor ranges, second moments, the runs that give them."""

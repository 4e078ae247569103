"""Float to float, the function preserved: what makes a model easier to round."""

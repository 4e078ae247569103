"""Rounders: a weight, a scheme and perhaps statistics in, codes on a grid out."""

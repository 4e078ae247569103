"""A checkpoint block by block: read, solved as text comes through, written, forgotten."""

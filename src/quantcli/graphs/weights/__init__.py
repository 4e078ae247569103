"""Codes in the place of float weights: MatMulNBits, MatMulBnb4, GatherBlockQuantized, DequantizeLinear."""

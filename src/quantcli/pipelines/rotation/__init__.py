"""Rotations that are trained on calibration text."""

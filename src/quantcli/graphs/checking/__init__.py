"""What was written is what was computed, and what it costs: weights read back, graphs run side by side."""

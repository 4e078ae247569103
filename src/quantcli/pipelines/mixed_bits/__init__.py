"""Bits per layer, chosen to meet a target by what each costs."""

"""Rooms of `tune`: what is tried, how it is judged, what is tried next, and where trials run."""

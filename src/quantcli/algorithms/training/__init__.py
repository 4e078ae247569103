"""Training: what follows a rounder and changes, by gradient, what it has left."""

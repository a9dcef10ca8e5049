"""Weights of other projects in, and ours out."""

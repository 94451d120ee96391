"""Estimates what a call costs, without running it."""

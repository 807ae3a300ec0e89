"""Tuning to an accuracy goal: from a run's settings to the network that meets it."""

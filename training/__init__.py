"""Trains the embedded model family; nothing in the application imports this package."""

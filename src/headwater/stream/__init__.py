"""Patterns over streams of events, by their own time."""

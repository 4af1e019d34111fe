"""Headwater: an event backbone for Python teams."""

__version__ = "0.1.0"

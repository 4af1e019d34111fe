"""Booking: practitioners, their free hours, who takes them, and two read models that can be lost."""

"""Patterns of a business: sagas. On top of the runtime, in the application's own database."""

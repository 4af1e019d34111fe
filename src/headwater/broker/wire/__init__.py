"""Kafka's protocol as values: bytes in, values out, and back. Nothing here does I/O."""

"""Schemas as values: Avro, JSON Schema and Protobuf, what one can read of another, and how data travels with an id."""

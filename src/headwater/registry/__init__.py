"""The schema registry: Confluent's REST API and wire format, kept in `_schemas` on any Kafka."""

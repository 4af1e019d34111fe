"""The only door to Kafka's client library."""

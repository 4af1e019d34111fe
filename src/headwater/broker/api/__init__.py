"""Kafka's APIs, one a file: this listing is the coverage table."""

"""What operators do, on any Kafka: the command line uses these."""

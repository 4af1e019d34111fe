"""One node: Kafka's protocol in, Kafka's protocol out, Kafka's files in between."""

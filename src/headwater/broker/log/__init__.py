"""A partition on disk, in Apache Kafka's own format. Synchronous; one writer per partition."""

"""What an event is: typed data in an envelope. No Kafka, no database."""

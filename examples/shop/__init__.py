"""The shop: an order service and six services that react to its orders."""

"""What makes records believed by those who did not write them."""

"""The public test kit: a real broker in a quarter of a second, a clock that stands still, a disk that loses power."""

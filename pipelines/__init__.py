"""Jobs that a person submits, and the Ray code under them."""

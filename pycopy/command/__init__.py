"""What may be typed: options, the configuration they make, and what is refused."""

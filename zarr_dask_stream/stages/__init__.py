"""What is done with chunks: small frozen descriptions and pure functions."""

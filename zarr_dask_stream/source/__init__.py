"""What is stored, and how one batch of chunks is read. Knows nothing of Dask."""

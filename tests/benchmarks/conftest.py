"""What pytest does not look into."""

# Runs in the loading processes of PyTorch, and needs it.
collect_ignore = ["training.py"]

"""How many chunks are in flight, and what happens when one fails."""

"""What a person sees: observers of events, never imported by the rooms above."""

"""The search for the Plan that loses least under an exact budget."""

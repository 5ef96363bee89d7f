"""Other people's libraries, run as their users run them, for the comparisons in this folder."""

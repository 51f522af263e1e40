"""Two sides that answered the same questions: differences, intervals, verdicts. Pure functions."""

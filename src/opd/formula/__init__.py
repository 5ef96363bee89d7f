"""The formulas: one equation, one function, unreduced. Import torch and nothing of the loop."""

"""Pure functions from records to numbers, tables and cards."""

"""Checks of what the user gives: one clear error, before any work starts."""

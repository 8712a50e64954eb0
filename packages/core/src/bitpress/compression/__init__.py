"""Carrying out a plan: data-free, calibrated, or a search for a recipe."""

"""Whole models: one folder each, and the list of those that there are."""

"""Rows into slots of an array, such as a cache of keys."""

"""Grouped-query attention with sinks and a sliding window, over caches or without."""

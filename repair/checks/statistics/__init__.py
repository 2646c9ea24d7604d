"""Intervals, tests and stopping rules; numbers in, numbers out. Nothing here knows prompts or policies."""

"""Evaluation: distributions against the teacher, and greedy generation."""

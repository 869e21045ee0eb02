"""What a run consists of: the catalogue of stages, what identifies each, the plan, and why a stage
runs.
"""

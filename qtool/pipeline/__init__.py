"""The order of the steps: for Python programs (steps.py), and for whole runs of a command (runs.py)."""

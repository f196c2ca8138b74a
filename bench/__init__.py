"""Measurements: ops beside the machine's ceilings, and whole models beside their peers."""

"""Measurements, side by side on the machine they run on."""

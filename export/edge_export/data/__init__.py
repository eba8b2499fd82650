"""Texts to calibrate on and to measure on."""

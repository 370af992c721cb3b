"""Resampling, activation and convolution ops, each with its plain definition beside the faster form."""

"""Latency estimates for devices that are not available.

A roofline for each operator is calibrated on measured machines; the error bar is that of machines
left out of the fit.
"""

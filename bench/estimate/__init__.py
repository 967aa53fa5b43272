"""Estimates for a device that is not at hand: a roofline for each operator, calibrated on measured
machines, with the error that they show.
"""

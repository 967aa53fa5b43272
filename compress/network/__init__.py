"""The network that the surgery cuts: its architecture as plain data, its modules, its size and
cost, its files.
"""

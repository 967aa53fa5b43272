"""compress/lift"""

"""compress/data"""

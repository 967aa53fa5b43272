"""compress/train"""

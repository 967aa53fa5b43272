"""compress/vit"""

"""ONNX graphs: traced from torch or imported, stored, and selected by measurement."""

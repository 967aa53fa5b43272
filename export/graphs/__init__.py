"""ONNX graphs: traced, given, named, stored, and chosen by measurement."""

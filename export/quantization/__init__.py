"""Eight-bit and half-precision graphs."""

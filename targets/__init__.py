"""Target devices: validated profiles, detection of this machine, memory checks."""

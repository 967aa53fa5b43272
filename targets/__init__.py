"""What a device is: a validated profile, its limits and its measured costs."""

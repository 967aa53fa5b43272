"""Running an artifact on a device and telling the truth about it."""

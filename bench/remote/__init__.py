"""Measuring artifacts on other devices: over ssh and adb, and on the boards of a TVM tracker."""

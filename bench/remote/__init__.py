"""Measuring an artifact on another machine: ssh, adb, TVM RPC, the native runner."""

"""The one network of this project, built from an `Architecture`."""
